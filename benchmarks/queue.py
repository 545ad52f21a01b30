"""What a job costs besides its work, against plain Dramatiq; with many waiting; after kills: `python -m benchmarks.queue`."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
from ai4thai.queue.v1 import queue_service_pb2, queue_service_pb2_grpc

from benchmarks.pages import Page, console, run
from benchmarks.queue_depth import measure_depth
from benchmarks.queue_failures import measure_failures
from benchmarks.queue_plain import waiting
from benchmarks.queue_servers import CpuTaken, Servers, answer_of, call, quantile

CALLERS = 16
BATCH = 100
THREADS = 8
PROCESSES = (1, 2)
GOAL_RATIO = 0.6
GOAL_START_MS = 20.0
LOAD = 0.5
WAITING = 100_000
REPEATS = 3
GIVEN_UP_S = 120.0
POLL_S = 0.01


@dataclass(frozen=True)
class Rate:
    """Jobs for each second: enqueued alone, worked off alone, and both at once from the first call to the last end."""

    enqueued: float
    worked_off: float
    end_to_end: float
    cpu_ms: Mapping[str, float]
    """What each process took for a job, end to end."""


def measure(seconds: float) -> Page:
    """Everything; `seconds`: about as long as plain Dramatiq has to do for one figure."""
    return measure_queue(jobs=max(200, round(seconds * 1500)), waiting_jobs=WAITING, repeats=REPEATS)


def measure_queue(*, jobs: int, waiting_jobs: int, repeats: int) -> Page:
    """`jobs` for a figure; `waiting_jobs`: the depth that is compared with a small one; so many `repeats` of each failure."""
    page = Page("queue", "The queue")
    with Servers() as servers:
        page.say(
            f"{servers.redis_name} (the embedded broker, appendfsync everysec), queue server, workers and callers share the "
            "cores. Jobs do nothing: what is measured is what a job costs besides its work."
        )
        page.head("Jobs that do nothing, against plain Dramatiq")
        jobs_per_s = compare(page, servers, jobs)
        page.head("At half the load")
        measure_latency(page, servers, jobs_per_s * LOAD, max(100, jobs // 2))
    with Servers() as servers:
        page.head("With very many waiting")
        measure_depth(page, servers, waiting_jobs)
    page.head("After a kill, a cancel, an outage of Redis")
    measure_failures(page, repeats)
    return page


def compare(page: Page, servers: Servers, jobs: int) -> float:
    """Writes the table; answers the jobs/s of one worker process, end to end."""
    rates: dict[tuple[int, str], Rate] = {}
    for processes in PROCESSES:
        console.print(f"{processes} × {THREADS}: plain Dramatiq …")
        rates[processes, "plain Dramatiq"] = _measure_plain(servers, jobs, processes)
        console.print(f"{processes} × {THREADS}: the queue …")
        rates[processes, "SubmitJob"] = _measure_ours(servers, jobs, processes, ["--callers", str(CALLERS)])
        batches = ["--callers", "4", "--batch", str(BATCH)]
        rates[processes, "BatchSubmitJobs"] = _measure_ours(servers, jobs, processes, batches)
    page.say(
        f"{jobs:,} jobs for each figure. Plain Dramatiq: its own RedisBroker, an actor that does nothing, messages sent by 4 "
        f"threads of one process. SubmitJob: {CALLERS} callers of one process; BatchSubmitJobs: 4 callers, {BATCH} jobs a call. "
        "Worked off: jobs that wait already, no caller. End to end: from the first call to the last job's end, callers and "
        "workers at once."
    )
    columns = ["workers", "submitted by", "enqueued/s", "worked off/s", "end to end/s", "of plain"]
    page.table(
        [*columns, "CPU ms a job, end to end: queue server / workers / Redis"],
        [
            [
                f"{processes} × {THREADS}",
                name,
                f"{rate.enqueued:,.0f}",
                f"{rate.worked_off:,.0f}",
                f"{rate.end_to_end:,.0f}",
                f"{rate.end_to_end / rates[processes, 'plain Dramatiq'].end_to_end:.2f}",
                " / ".join(f"{rate.cpu_ms[part]:.2f}" for part in ("queue server", "worker", "Redis")),
            ]
            for (processes, name), rate in rates.items()
        ],
    )
    for processes in PROCESSES:
        plain, ours = rates[processes, "plain Dramatiq"], rates[processes, "SubmitJob"]
        for name, ratio in (
            ("worked off", ours.worked_off / plain.worked_off),
            ("end to end", ours.end_to_end / plain.end_to_end),
        ):
            page.goal(
                f"{processes} × {THREADS}, {name}: ≥ {GOAL_RATIO} of plain Dramatiq ({ratio:.2f})", ratio >= GOAL_RATIO
            )
    return rates[1, "SubmitJob"].end_to_end


def _measure_plain(servers: Servers, jobs: int, processes: int) -> Rate:
    servers.clear()

    def send() -> subprocess.Popen[str]:
        return call("benchmarks.queue_plain", "send", "--url", servers.url, "--count", str(jobs), "--callers", "4")

    arguments = ("work", "--url", servers.url, "--threads", str(THREADS))
    return _rate(
        servers,
        jobs,
        send,
        lambda: servers.start_workers("benchmarks.queue_plain", *arguments, count=processes),
        lambda: waiting(servers.redis),
    )


def _measure_ours(servers: Servers, jobs: int, processes: int, how: list[str]) -> Rate:
    servers.clear()

    def submit() -> subprocess.Popen[str]:
        return call("benchmarks.queue_callers", "--address", servers.address, "--count", str(jobs), *how)

    return _rate(
        servers, jobs, submit, lambda: servers.start_workers(count=processes), lambda: servers.not_ended_count()
    )


def _rate(
    servers: Servers,
    jobs: int,
    send: Callable[[], subprocess.Popen[str]],
    start_workers: Callable[[], object],
    left: Callable[[], int],
) -> Rate:
    start_workers()
    servers.signal_workers(signal.SIGSTOP)
    enqueued_s = answer_of(send())["seconds"]
    began_s = time.monotonic()
    servers.signal_workers(signal.SIGCONT)
    worked_off_s = _until_none(left) - began_s
    with CpuTaken(servers) as cpu:
        sent = answer_of(send())
        end_to_end_s = _until_none(left) - sent["began_s"]
    servers.stop_workers()
    cpu_ms = {name: seconds * 1000 / jobs for name, seconds in cpu.seconds.items()}
    return Rate(jobs / enqueued_s, jobs / worked_off_s, jobs / end_to_end_s, cpu_ms)


def _until_none(left: Callable[[], int]) -> float:
    until_s = time.monotonic() + GIVEN_UP_S
    while (count := left()) > 0:
        if time.monotonic() > until_s:
            raise RuntimeError(f"{count} jobs had not ended after {GIVEN_UP_S:g} s")
        time.sleep(POLL_S)
    return time.monotonic()


def measure_latency(page: Page, servers: Servers, rate_per_s: float, jobs: int) -> None:
    """Submissions in even steps; when each was answered, and when its job began."""
    console.print(f"{rate_per_s:.0f} jobs/s …")
    servers.clear()
    servers.start_workers()
    how = ["--count", str(jobs), "--rate", str(rate_per_s)]
    found = answer_of(call("benchmarks.queue_callers", "--address", servers.address, *how))
    _until_none(servers.not_ended_count)
    servers.stop_workers()
    starts_ms = _starts_ms(servers, found["job_ids"])
    p50_ms = quantile(starts_ms, 0.5)
    page.say(
        f"One worker process of {THREADS} threads. Jobs are submitted one by one in even steps, {rate_per_s:.0f} each second: "
        f"half of what the table above has for SubmitJob and 1 × {THREADS} end to end. A call counts from the moment it was due; "
        "a job's start is told by its record: create_time to start_time, both by Redis' clock."
    )
    page.table(
        ["", "p50 ms", "p99 ms"],
        [
            [name, f"{quantile(values, 0.5):.1f}", f"{quantile(values, 0.99):.1f}"]
            for name, values in (("SubmitJob", found["calls_ms"]), ("from enqueued to started", starts_ms))
        ],
    )
    page.goal(
        f"from enqueued to started at half the load: p50 ≤ {GOAL_START_MS:g} ms ({p50_ms:.1f} ms)",
        p50_ms <= GOAL_START_MS,
    )


def _starts_ms(servers: Servers, job_ids: list[str]) -> list[float]:
    with grpc.insecure_channel(servers.address) as channel:
        stub = queue_service_pb2_grpc.QueueServiceStub(channel)
        jobs = [stub.GetJob(queue_service_pb2.GetJobRequest(job_id=job_id)).job for job_id in job_ids]
    return [float(job.start_time.ToMilliseconds() - job.create_time.ToMilliseconds()) for job in jobs]


if __name__ == "__main__":
    run(measure, 2.0)
