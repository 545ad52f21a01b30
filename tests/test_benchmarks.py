"""What the benchmarks conclude from what they see; the figures themselves are `make bench`'s."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import describer, queue, queue_depth
from benchmarks.__main__ import SHORT
from benchmarks.language_models import SHAPES, random
from benchmarks.layers import GARBAGE, LOOP, layer_of
from benchmarks.overload import recovered_after_s
from benchmarks.pages import Outsiders, Page
from benchmarks.processes import ENVIRONMENT, ROOT
from benchmarks.queue_servers import Servers, quantile
from benchmarks.soak import Rest, Soaked
from vision_server.describers.language_model import Limits


def test_without_a_gpu_its_benchmark_says_so_and_exits_with_2() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(
        command, cwd=ROOT, env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stderr.startswith("There is no CUDA device here") and len(done.stderr.splitlines()) == 1


def test_a_page_tells_machine_command_and_missed_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page("throughput", "Throughput")
    page.table(["callers", "images/s"], [[16, "99.5"]])
    page.goal("≥ 0.95", True)
    page.goal("p99 ≤ 3 × p50", False)

    page.write(tmp_path / "new")

    text = (tmp_path / "new" / "throughput.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert text.startswith("# Throughput\n") and f"{len(os.sched_getaffinity(0))} cores" in text
    assert "`python -m benchmarks.throughput`" in text
    assert re.search(r"Other programs took \d+\.\d\d cores meanwhile\.", text)
    assert "| callers | images/s |\n| --- | --- |\n| 16 | 99.5 |" in text
    assert "Goal: ≥ 0.95: reached." in text and "Goal: p99 ≤ 3 × p50: **missed**." in text
    assert page.missed == ["p99 ≤ 3 × p50"]
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_cores_that_others_take_spoil_a_page_and_our_own_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_s, own_s, now_s = 100.0, 10.0, 0.0
    monkeypatch.setattr("benchmarks.pages._machine_cpu_s", lambda: machine_s)
    monkeypatch.setattr("benchmarks.pages._own_cpu_s", lambda: own_s)
    monkeypatch.setattr("benchmarks.pages.time.perf_counter", lambda: now_s)
    outsiders = Outsiders()

    machine_s, own_s, now_s = 119.0, 29.0, 10.0  # we took both cores ourselves
    assert outsiders.cores() == 0
    assert outsiders.sentence() == "Other programs took 0.00 cores meanwhile."
    machine_s, own_s = 119.0, 20.0  # somebody took nearly one of them
    assert outsiders.cores() == pytest.approx(0.9)
    assert "not to be trusted" in outsiders.sentence()


def test_each_short_benchmark_writes_the_page_of_its_name() -> None:
    for name, (measure, _) in SHORT.items():
        assert measure.__module__ == f"benchmarks.{name}"
        assert f'Page("{name}", ' in Path(sys.modules[measure.__module__].__file__ or "").read_text()


@pytest.mark.parametrize(
    ("latencies_ms", "recovered_s"),
    [
        ([10] * 10, 0.0),
        ([10, 900, 10, 10, 10, 10], 0.0),  # one slow call in five is no overload
        ([900, 900, 900, 10, 10, 10, 10, 10], 3.0),
        ([900, 10, 900, 900, 900, 10, 10, 900, 10, 10], 5.0),  # one quick call is no recovery
        ([900] * 10, None),
        ([float("inf")] * 3 + [10] * 5, 3.0),
        ([10] * 3, None),  # too few to tell
    ],
)
def test_recovery_is_when_five_calls_are_as_before(latencies_ms: list[float], recovered_s: float | None) -> None:
    probes = [(float(second), latency_ms) for second, latency_ms in enumerate(latencies_ms)]
    assert recovered_after_s(probes, normal_p50_ms=9.0) == recovered_s


@pytest.mark.parametrize(
    ("innermost", "layer"),
    [
        (["CallInterceptor._around (serving/interceptors.py:10)", "malloc (libc.so.6)"], "interceptors"),
        (["answer_one (serving/interceptors.py:9)", "observe (prometheus_client/metrics.py:1)"], "metrics"),
        (["task_step (_asynciomodule.c:1)", "gc_collect_main (libpython)"], GARBAGE),
        (["0x7f (grpc/_cython/cygrpc.so)", "upb_Decode (_message.abi3.so)"], "protobuf"),
        (["uv_run (core.c:1)"], LOOP),
    ],
)
def test_a_sample_belongs_to_the_innermost_layer(innermost: list[str], layer: str) -> None:
    roots = ["thread (1): MainThread", "<module> (benchmarks/null_server.py:60)", "run (serving/process.py:5)"]
    assert layer_of([*roots, *innermost]) == layer


def soaked(*, rss_mb: list[float], threads: list[int], files: list[int], **what: Any) -> Soaked:
    rests = [
        Rest(60.0 * lap, 100 * lap, mb, thread_count, file_count)
        for lap, (mb, thread_count, file_count) in enumerate(zip(rss_mb, threads, files, strict=True))
    ]
    work = SimpleNamespace(kinds=["detects"], done=Counter(detects=7), unexplained=[], **what)
    return Soaked(work, rests, what.get("log_errors", []))  # type: ignore[arg-type]


def test_a_soak_that_holds_still_passes() -> None:
    # the first laps warm up; later ones go up and down
    fine = soaked(
        rss_mb=[500, 700, 880, 900, 880, 905, 890, 902, 895, 900], threads=[20] * 3 + [40] * 7, files=[9] * 10
    )
    assert fine.problems == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rss_mb": [800 + 20 * lap for lap in range(10)]}, "memory grew by 120 MB"),
        ({"threads": [20 + lap for lap in range(10)]}, "threads grew from 23 to 29"),
        ({"files": [9] * 7 + [12] * 3}, "open files grew from 9 to 12"),
    ],
)
def test_a_soak_that_grows_fails(change: dict[str, list[Any]], problem: str) -> None:
    still = {"rss_mb": [900.0] * 10, "threads": [20] * 10, "files": [9] * 10}
    found = soaked(**{**still, **change}).problems  # type: ignore[arg-type]
    assert len(found) == 1 and found[0].startswith(problem)


def test_a_soak_fails_for_one_unexplained_error_or_kind_of_work_that_was_never_done() -> None:
    one = soaked(rss_mb=[900.0] * 10, threads=[20] * 10, files=[9] * 10)
    one.work.unexplained.append("detects: INTERNAL INTERNAL: boom")
    one.work.done.clear()
    assert one.problems == ["unexplained: detects: INTERNAL INTERNAL: boom", "never done: detects"]


def test_generations_together_are_measured_against_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describer, "TOGETHER", (1, 16))
    monkeypatch.setattr(describer, "TOKENS", 6)
    monkeypatch.setattr(describer, "ARRIVALS", 4)
    page = Page("describer", "Trial")
    model = random(SHAPES["tiny"], tmp_path / "tiny", Limits(max_rows=16))

    describer.measure_model(page, model, requests=16, threads=[1], goal=None)

    rows = re.findall(r"^\| (\d+) together \| ([\d.]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", page.text, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "16"]
    assert all(float(figure) > 0 for row in rows for figure in row[1:4])
    assert re.search(r"^\| 0 \| [\d.]+ \| [\d.]+ \| 1 \|$", page.text, re.MULTILINE)
    assert re.search(r"^\| 8 \| [\d.]+ \| [\d.]+ \| \d+ \|$", page.text, re.MULTILINE)
    # How many steps a late comer waits for is for a quiet machine to say: this model's take a millisecond, as the way to it does.
    assert [goal for goal in page.missed if "late joiner" not in goal] == []


def test_the_queue_is_measured_against_plain_dramatiq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "PROCESSES", (1,))
    monkeypatch.setattr(queue, "BATCH", 20)
    monkeypatch.setattr(queue_depth, "CALLS", 5)
    page = Page("queue", "Trial")
    with Servers() as servers:
        jobs_per_s = queue.compare(page, servers, jobs=60)
        queue.measure_latency(page, servers, rate_per_s=100.0, jobs=30)
        queue_depth.measure_depth(page, servers, many=300)

    rows = re.findall(
        r"^\| 1 × 8 \| ([\w ]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|", page.text, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["plain Dramatiq", "SubmitJob", "BatchSubmitJobs"]
    assert jobs_per_s > 0 and all(int(figure.replace(",", "")) > 0 for row in rows for figure in row[1:4])
    assert re.search(r"^\| SubmitJob \| [\d.]+ \| [\d.]+ \|$", page.text, re.MULTILINE)
    assert re.search(
        r"Redis holds \*\*[\d,]{3,} bytes for each that waits and [\d,]{3,} bytes for each that is done", page.text
    )
    assert "| GetQueueStats |" in page.text


def test_a_quantile_is_one_of_the_values() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.25, 0.5, 0.99, 1.0)] == [1.0, 2.0, 4.0, 4.0]
