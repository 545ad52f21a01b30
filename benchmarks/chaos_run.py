"""One chaos run: starts all, lets submitters and kills loose on it, waits until it has settled, and has it judged."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import grpc
from ai4thai.queue.v1 import queue_service_pb2, queue_service_pb2_grpc

from benchmarks.chaos_moments import Chaos, moments
from benchmarks.chaos_oracle import Promise, Verdict, ask, judge, read_events, read_promises
from benchmarks.chaos_plan import Pace, Pictures, Planned, plan, stand_in_answer, stand_in_picture, write_plan
from benchmarks.chaos_redis import inconsistencies
from benchmarks.chaos_stack import SETTINGS, WORKERS, Stack
from benchmarks.processes import ENVIRONMENT, ROOT

PROBE_S = 0.1
PROBE_TIMEOUT_S = 1.0
INDEXES_S = 20.0
ANSWERED_S = 60.0
FIRST_S = 1.0


@dataclass(frozen=True)
class Mode:
    """How Redis keeps its file, and what a kill of it means."""

    name: str
    appendfsync: str
    power_loss: bool = False


@dataclass(frozen=True)
class Size:
    """How much of everything: `seconds` of chaos, then, once each job is acknowledged, `settle_s` until all must have ended."""

    jobs: int = 1000
    submitters: int = 8
    seconds: float = 200.0
    kills: int = 20
    pauses: int = 20
    settle_s: float = 90.0
    pace: Pace = field(default_factory=Pace)


SAID: Mapping[str, str] = {
    "stopped answering": "leases lost",
    "nobody had its message": "messages sent again",
    "the outcome was refused": "outcomes refused by the fence",
    "its lease was lost": "attempts given up, their lease was lost",
}
"""What is counted in the logs of queue server and workers: a part of the event, and its name on the page."""


@dataclass(frozen=True)
class Run:
    """What a run brought."""

    mode: Mode
    verdict: Verdict
    kills: Mapping[str, int]
    """By whom; and `pause`."""
    settled_s: float
    """From the last kill until the last submitter had seen the end of its last job."""
    outage_s: float
    """The longest time in which the queue server answered nobody."""
    said: Mapping[str, int]
    """How often the logs say each of SAID's values."""
    finished: Counter[str]
    """By job: its attempts that the vision server answered in full."""
    power_losses: int
    lost_bytes: int


def run(
    mode: Mode,
    size: Size,
    seed: int,
    folder: Path,
    *,
    without: str = "",
    real_vision: bool = False,
    settings: Mapping[str, str] = SETTINGS,
) -> Run:
    """One run in an empty folder, where the logs of all processes stay; `without`: see benchmarks.chaos_without."""
    with Stack(
        folder, appendfsync=mode.appendfsync, without=without, real_vision=real_vision, settings=settings
    ) as stack:
        picture, right = _real_pictures(stack) if real_vision else (stand_in_picture, stand_in_answer)
        plans = plan(seed, size.submitters, size.jobs, size.seconds, pace=size.pace, picture=picture)
        when = moments(seed, size.seconds, kills=size.kills, pauses=size.pauses, workers=WORKERS)
        chaos = Chaos(stack, when, power_loss=mode.power_loss)
        with Submitters(stack.address, plans, folder) as submitters, Probe(stack.address) as probe:
            chaos.start()
            try:
                chaos.join()
                submitters.wait_until_answered()
                waiting = submitters.wait(size.settle_s)
            finally:
                chaos.stop()
            settled_s = time.monotonic() - chaos.last_s
        promises = read_promises(chain(*plans), submitters.logs)
        job_ids = [job_id for promise in promises.values() for _, job_id in promise.job_ids]
        told = asyncio.run(ask(stack.address, job_ids))
        verdict = judge(promises, told, right, stack.power.cuts, stack.queue.killed_s)
        if waiting:
            verdict.problems.append(f"{waiting} submitters still waited for their jobs after {size.settle_s:g} s")
        # After a broken promise nothing is waited for.
        wait_s = 0.0 if verdict.problems else INDEXES_S
        verdict.problems += _settled_indexes(stack, wait_s)
        return Run(
            mode,
            verdict,
            chaos.done,
            settled_s,
            probe.longest_s,
            _count_said([stack.queue.log, *(worker.log for worker in stack.workers)]),
            _count_finished(stack.vision.log, promises),
            len(stack.power.cuts),
            sum(cut.size_bytes for cut in stack.power.cuts),
        )


class Submitters:
    """The submitters' processes; a context manager that ends them."""

    def __init__(self, address: str, plans: Sequence[Sequence[Planned]], folder: Path) -> None:
        self._address = address
        self._plans = plans
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.logs = [folder / f"submitter-{number}.log" for number in range(len(plans))]

    def __enter__(self) -> Submitters:
        started_s = time.monotonic() + FIRST_S
        for number, (jobs, path) in enumerate(zip(self._plans, self.logs, strict=True)):
            planned = self._folder / f"plan-{number}.jsonl"
            write_plan(planned, jobs)
            command = [sys.executable, "-m", "benchmarks.chaos_submitter", "--address", self._address]
            command += ["--plan", str(planned), "--started", str(started_s)]
            with path.open("wb") as log:
                self._processes.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def wait_until_answered(self) -> None:
        """Until each job was acknowledged or refused: on a busy machine the submitters may be late. Not for ever."""
        until_s = time.monotonic() + ANSWERED_S
        count = sum(len(jobs) for jobs in self._plans)
        while time.monotonic() < until_s:
            promises = read_promises(chain(*self._plans), self.logs).values()
            if sum(bool(one.job_ids or one.refusals or one.too_late) for one in promises) == count:
                return
            time.sleep(0.2)

    def wait(self, seconds: float) -> int:
        """Until all have seen all their jobs end, at most so long; how many have not."""
        until_s = time.monotonic() + seconds
        waiting = 0
        for process in self._processes:
            try:
                waiting += process.wait(max(0.0, until_s - time.monotonic())) != 0
            except subprocess.TimeoutExpired:
                waiting += 1
        return waiting


class Probe:
    """Asks GetQueueStats all the time; the longest time without an answer is the longest outage."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.longest_s = 0.0

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.max_reconnect_backoff_ms", 200)]
        with grpc.insecure_channel(self._address, options=options) as channel:
            stub = queue_service_pb2_grpc.QueueServiceStub(channel)
            answered_s = time.monotonic()
            while not self._ended.wait(PROBE_S):
                try:
                    stub.GetQueueStats(queue_service_pb2.GetQueueStatsRequest(), timeout=PROBE_TIMEOUT_S)
                    answered_s = time.monotonic()
                except grpc.RpcError:
                    self.longest_s = max(self.longest_s, time.monotonic() - answered_s)


def _settled_indexes(stack: Stack, wait_s: float) -> list[str]:
    """What does not fit in Redis; given time, because messages of jobs that have moved on are fetched and dropped by and by."""
    until_s = time.monotonic() + wait_s
    with stack.open_redis() as client:
        while (found := inconsistencies(client)) and time.monotonic() < until_s:
            time.sleep(0.5)
    return [f"in Redis: {line}" for line in found]


def _count_said(logs: Sequence[Path]) -> Mapping[str, int]:
    said = Counter(dict.fromkeys(SAID.values(), 0))
    for path in logs:
        for line in read_events(path):
            event = str(line.get("event", ""))
            said.update(name for words, name in SAID.items() if words in event)
    return said


def _count_finished(log: Path, promises: Mapping[str, Promise]) -> Counter[str]:
    answered = Counter(line["request_id"] for line in read_events(log) if line.get("event") == "answered")
    finished: Counter[str] = Counter()
    for promise in promises.values():
        for _, job_id in promise.job_ids:
            attempts = range(1, 1 + max(0, *(_attempt(name) for name in answered if name.startswith(job_id)), 0))
            count = len(promise.planned.images)
            finished[job_id] = sum(answered[f"{job_id}.{attempt}"] >= count for attempt in attempts)
    return finished


def _attempt(request_id: str) -> int:
    return int(request_id.rpartition(".")[2])


def _real_pictures(stack: Stack) -> tuple[Pictures, Callable[[bytes], str]]:
    """Drawn pictures, and what the vision server says of each while nothing is killed."""
    from benchmarks.chaos_pictures import learn  # cv2 and the scenes: only where they are needed

    return learn(f"127.0.0.1:{stack.vision_port}")
