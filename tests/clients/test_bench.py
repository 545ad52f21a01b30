from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ai4thai.bench import Arrivals, Bench, Load
from ai4thai.bench_results import Latency, LoadProgress, LoadReport
from ai4thai.cli import app
from ai4thai.errors import NotFound, ServerFault, Unavailable
from ai4thai.vision.v1 import vision_service_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from serving.errors import Code, ServiceError
from serving.status import to_status
from tests.clients.fake_servers import BROKEN, FakeServer, FakeVision

IMAGE = b"\xff\xd8 a picture"


class Odd(FakeVision):
    """A FakeVision that can stall everybody, refuse every third call, break its streams, and mistake its frames."""

    def __init__(self) -> None:
        super().__init__()
        self.address = ""
        self.refuses = False
        self.breaks_after = 0
        self.mistakes = False
        self.stalls_at = 0
        """The call with which everybody begins to wait; the first one only asks whether somebody is there."""
        self.stalls_s = 10.0
        self.open = threading.Event()
        self.open.set()
        self._turns = itertools.count(1)

    def Detect(self, request: Any, context: Any) -> vision_service_pb2.DetectResponse:
        turn = next(self._turns)
        if turn == self.stalls_at:
            self.open.clear()
        if not self.open.wait(self.stalls_s):
            self.open.set()
        if self.refuses and turn % 3 == 0:
            full = ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "Full.", retry_after_s=0.02)
            self.script.fail_next("Detect", full)
        return super().Detect(request, context)

    def DetectStream(self, requests: Any, context: Any) -> Iterator[vision_service_pb2.DetectStreamResponse]:
        answers = super().DetectStream(requests, context)
        for number, answer in enumerate(answers, start=1):
            if self.mistakes:
                answer.result.frame_id += 1
            if self.breaks_after and number > self.breaks_after:
                context.abort_with_status(_status(ServiceError(Code.UNAVAILABLE, "DRAINING", "Leaving.")))
            yield answer


def _status(error: ServiceError) -> Any:
    return rpc_status.to_status(to_status(error, "vision.ai4thai"))


@pytest.fixture
def odd() -> Iterator[Odd]:
    fake = Odd()
    with FakeServer(fake) as server:
        fake.address = server.address
        yield fake
        fake.open.set()


def put(
    odd: Odd, load: Load, images: tuple[bytes, ...] = (IMAGE,), tell: Callable[[LoadProgress], object] = print
) -> LoadReport:
    return asyncio.run(Bench(odd.address, images, load, tell).run())


def adds_up(report: LoadReport) -> bool:
    failed = sum(failure.latency.count for failure in report.failures)
    return (
        report.sent_count == report.answered_count + report.failed_count + report.dropped_count
        and report.answered_count == report.latency.count == sum(report.batch_images.values())
        and report.failed_count == failed
    )


def test_callers_send_when_they_are_answered(odd: Odd) -> None:
    moments: list[LoadProgress] = []

    report = put(odd, Load(callers=3, seconds=0.6, warm_up_s=0), tell=moments.append)

    assert adds_up(report) and report.failed_count == 0
    # Each call that reached the server is in the report, but for the first, which asks whether somebody is there.
    assert report.sent_count == odd.script.calls.count("Detect") - 1 > 10
    assert len(report.images_by_caller) == 3 and sum(report.images_by_caller) == report.answered_count
    assert report.peak_outstanding <= 3
    assert report.batch_images == {1: report.answered_count} and report.mean_batch_size == 1
    # The answers within the seconds, of which the last three came later.
    assert 0 <= report.answered_count - report.images_per_s * 0.6 < 4
    steps = report.steps
    assert steps.server_ms == pytest.approx(12.5)  # what the fake's Timings say, all of it in no named step
    assert steps.server_ms + steps.outside_ms == pytest.approx(report.latency.mean_ms)
    assert moments and moments[-1].images_per_s > 0 and moments[-1].is_warm


def test_the_warm_up_does_not_count(odd: Odd) -> None:
    report = put(odd, Load(callers=1, seconds=0.3, warm_up_s=0.3))

    assert 0 < report.sent_count < odd.script.calls.count("Detect") - 1
    assert report.all_answered_count == odd.script.calls.count("Detect") - 1


def test_streams_keep_frames_on_their_way(odd: Odd) -> None:
    report = put(odd, Load(callers=2, seconds=1, warm_up_s=0, streams=True, in_flight=3), (IMAGE, BROKEN))

    assert adds_up(report) and report.answered_count > 10
    assert abs(report.answered_count - report.failed_count) <= 2  # every other frame is broken
    assert [(one.code, one.reason) for one in report.failures] == [("INVALID_ARGUMENT", "IMAGE_UNREADABLE")]
    assert report.peak_outstanding <= 6
    assert len(report.images_by_caller) == 2 and min(report.images_by_caller) > 0
    assert odd.script.requests["DetectStream"].max_in_flight == 3


@pytest.mark.parametrize("streams", [False, True])
def test_at_a_fixed_rate_so_many_are_due(odd: Odd, streams: bool) -> None:
    report = put(odd, Load(callers=2, seconds=1, warm_up_s=0.2, rate_per_s=40, streams=streams))

    assert adds_up(report) and report.sent_count == 40 and report.unsent_count == 0


def test_random_arrivals_come_at_the_same_rate(odd: Odd) -> None:
    load = Load(callers=2, seconds=1, warm_up_s=0, rate_per_s=60, arrivals=Arrivals.POISSON)

    report = put(odd, load)

    assert adds_up(report) and 30 < report.sent_count < 90


def test_a_server_that_stalls_is_charged_with_all_that_was_due_meanwhile(odd: Odd) -> None:
    # given a server that stands still for one second of two
    odd.stalls_at, odd.stalls_s = 15, 1

    # when images are due at a fixed rate
    report = put(odd, Load(callers=2, seconds=2, warm_up_s=0, rate_per_s=30))

    # then about every second one of them waited, up to the whole second: a caller who waits for answers would see one slow call
    assert adds_up(report) and report.sent_count == 60
    assert report.latency.p99_ms > 900
    assert report.latency.p90_ms > 400
    assert report.peak_outstanding >= 20


def test_what_is_due_beyond_the_bound_is_not_sent_but_told(odd: Odd) -> None:
    odd.stalls_at, odd.stalls_s = 15, 0.7

    report = put(odd, Load(callers=1, seconds=1, warm_up_s=0, rate_per_s=50, max_outstanding=5))

    assert adds_up(report)
    assert report.unsent_count > 10 and report.sent_count + report.unsent_count == 50
    assert report.peak_outstanding == 5


def test_failures_are_counted_by_code_and_reason_with_the_servers_advice(odd: Odd) -> None:
    odd.refuses = True

    report = put(odd, Load(callers=2, seconds=0.6, warm_up_s=0), (IMAGE, BROKEN))

    assert adds_up(report)
    failures = {(one.code, one.reason): one for one in report.failures}
    assert set(failures) == {("RESOURCE_EXHAUSTED", "QUEUE_FULL"), ("INVALID_ARGUMENT", "IMAGE_UNREADABLE")}
    full, broken = failures["RESOURCE_EXHAUSTED", "QUEUE_FULL"], failures["INVALID_ARGUMENT", "IMAGE_UNREADABLE"]
    assert full.retry_info_count == full.latency.count > 0
    assert full.retry_delay_min_s == pytest.approx(0.02) and full.retry_delay_mean_s == pytest.approx(0.02)
    assert broken.retry_info_count == 0 and broken.retry_delay_min_s is None
    assert full.message == "Full." and "no image" in broken.message


@pytest.mark.parametrize("rate_per_s", [None, 40.0])
def test_a_stream_that_breaks_is_counted_and_followed_by_the_next(odd: Odd, rate_per_s: float | None) -> None:
    odd.breaks_after = 4

    report = put(odd, Load(callers=1, seconds=2.5, warm_up_s=0, streams=True, rate_per_s=rate_per_s, deadline_s=2))

    assert adds_up(report)
    assert report.answered_count >= 8 and odd.script.calls.count("DetectStream") >= 2
    assert ("UNAVAILABLE", "DRAINING") in [(one.code, one.reason) for one in report.failures]


def test_a_result_out_of_turn_is_the_servers_fault(odd: Odd) -> None:
    odd.mistakes = True

    with pytest.raises(ServerFault, match="answered frame 1 when it was frame 0's turn"):
        put(odd, Load(callers=1, seconds=5, streams=True))


def test_what_never_comes_ends_at_its_deadline(odd: Odd) -> None:
    odd.stalls_at = 4

    report = put(odd, Load(callers=2, seconds=1, warm_up_s=0, deadline_s=1))

    assert adds_up(report)
    (failure,) = report.failures
    # One for each caller, but for one that gets to its second call only when the seconds are over.
    assert failure.code == "DEADLINE_EXCEEDED" and 1 <= failure.latency.count <= 2


def test_stop_ends_it_early_and_reports_what_was(odd: Odd) -> None:
    async def run() -> LoadReport:
        bench = Bench(odd.address, (IMAGE,), Load(callers=2, seconds=60, warm_up_s=0))
        running = asyncio.create_task(bench.run())
        while odd.script.calls.count("Detect") < 5:  # noqa: ASYNC110  # seen from outside, in the server's threads
            await asyncio.sleep(0.01)
        bench.stop()
        return await running

    report = asyncio.run(asyncio.wait_for(run(), 60))

    assert adds_up(report) and report.sent_count > 0 and report.seconds < 20


def test_nobody_there_or_no_such_model_is_told_at_once(odd: Odd) -> None:
    odd.script.fail_next("Detect", ServiceError(Code.NOT_FOUND, "MODEL_NOT_FOUND", "There is no model 'x'."))
    with pytest.raises(NotFound, match="There is no model"):
        put(odd, Load(seconds=60))
    with pytest.raises(Unavailable, match="No server answers"):
        asyncio.run(Bench("localhost:1", (IMAGE,), Load(seconds=60)).run())


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300))
def test_a_percentile_is_a_call_that_was_there(seconds: list[float]) -> None:
    latency = Latency.of(seconds)

    times_ms = sorted(second * 1000 for second in seconds)
    for percent, value in ((50, latency.p50_ms), (90, latency.p90_ms), (99, latency.p99_ms)):
        assert value in times_ms
        assert sum(time_ms <= value for time_ms in times_ms) * 100 >= percent * len(times_ms)
        assert sum(time_ms < value for time_ms in times_ms) * 100 < percent * len(times_ms)
    assert latency.max_ms == times_ms[-1] and latency.count == len(seconds)


# The command


def run_command(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["bench", *(str(argument) for argument in arguments)])


def test_the_command_prints_a_table(odd: Odd, tmp_path: Path) -> None:
    odd.refuses = True
    image = tmp_path / "scene.jpg"
    image.write_bytes(IMAGE)

    result = run_command(image, "--callers", 2, "--seconds", 0.5, "--warm-up", 0, "--vision", odd.address)

    assert result.exit_code == 0, result.output
    assert "images/s" in result.stdout and "2 callers" in result.stdout
    for word in ("answered", "p50", "p99", "batch size", "an image's time", "waiting for the model"):
        assert word in result.stdout
    assert "RESOURCE_EXHAUSTED QUEUE_FULL" in result.stdout
    assert "100% were told when to come back: after 0.02 s at least" in result.stdout


def test_the_command_prints_json_of_the_samples_at_a_fixed_rate(odd: Odd) -> None:
    result = run_command(
        *("--rate", 30, "--seconds", 0.5, "--warm-up", 0, "--stream", "--in-flight", 2, "--drop-oldest", "--json"),
        *("--vision", odd.address, "--model", "mine", "--arrivals", "poisson", "--max-outstanding", 50),
    )

    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert set(told) == {"address", "load", "report"}
    assert told["load"]["rate_per_s"] == 30 and told["load"]["arrivals"] == "poisson" and told["load"]["streams"]
    report = told["report"]
    assert set(report) == {
        *("seconds", "sent_count", "answered_count", "failed_count", "dropped_count", "unsent_count", "images_per_s"),
        *("latency", "failures", "batch_images", "steps", "peak_outstanding", "send_lag_p99_ms"),
        *("generator_cpu_ratio", "all_answered_count", "images_by_caller"),
    }
    assert set(report["latency"]) == {"count", "mean_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms"}
    assert report["sent_count"] == report["answered_count"] > 0
    config = odd.script.requests["DetectStream"]
    assert config.options.model == "mine" and config.overflow == vision_service_pb2.OVERFLOW_DROP_OLDEST
    assert odd.script.requests["Detect"].image.content[:2] in (b"\xff\xd8", b"\x89P", b"RI")  # a sample of the package


def test_the_command_exits_with_1_when_nothing_was_answered(odd: Odd, tmp_path: Path) -> None:
    image = tmp_path / "scene.jpg"
    image.write_bytes(BROKEN)

    result = run_command(image, "--callers", 1, "--seconds", 0.2, "--warm-up", 0, "--vision", odd.address)

    assert result.exit_code == 1 and "INVALID_ARGUMENT IMAGE_UNREADABLE" in result.stdout
    assert "None of them was told when to come back." in result.stdout
    nobody = run_command(image, "--vision", "localhost:1")
    assert nobody.exit_code == 1 and "No server answers at localhost:1" in nobody.stderr


def test_ctrl_c_ends_the_command_with_its_table(odd: Odd) -> None:
    command = [
        sys.executable,
        "-m",
        "ai4thai.cli",
        "bench",
        "--seconds",
        "60",
        "--warm-up",
        "0",
        "--vision",
        odd.address,
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            until_s = time.monotonic() + 20
            while odd.script.calls.count("Detect") < 20:
                assert time.monotonic() < until_s and process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            told, errors = process.communicate(timeout=20)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
    assert process.returncode == 130
    assert "images/s" in told and "answered" in told
    assert "Traceback" not in errors
