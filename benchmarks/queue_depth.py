"""What calls take, and what Redis holds, while few and while very many jobs wait."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import grpc
from ai4thai.queue.v1 import job_pb2, queue_service_pb2_grpc
from ai4thai.queue.v1 import queue_service_pb2 as pb

from benchmarks.pages import Page, console
from benchmarks.queue_callers import request
from benchmarks.queue_servers import Servers, answer_of, call

FEW = 100
GOAL_TIMES = 2.0
CALLS = 100
FINISHED_COUNT = 1000
BATCH = 1000
FINISHED_S = 60.0


def measure_depth(page: Page, servers: Servers, many: int) -> None:
    """Few, then `many` waiting; nobody works. At last some are done by a worker, for what a finished one takes."""
    console.print(f"{FEW} waiting …")
    finished_bytes = _bytes_of_finished(servers, min(FINISHED_COUNT, many))
    servers.clear()
    _fill(servers, FEW)
    with grpc.insecure_channel(servers.address, options=[("grpc.max_receive_message_length", 64 << 20)]) as channel:
        stub = queue_service_pb2_grpc.QueueServiceStub(channel)
        few_ms = _times_ms(stub)
        few_count, few_bytes = servers.not_ended_count(), servers.used_memory_bytes()
        console.print(f"{many:,} waiting …")
        _fill(servers, many - few_count)
        waiting_bytes = (servers.used_memory_bytes() - few_bytes) / (servers.not_ended_count() - few_count)
        many_ms = _times_ms(stub)
    page.say(
        f"One caller; medians of {CALLS} calls. ListJobs: a page of 50 of the jobs that are QUEUED. A job is a question of one "
        "word: its record, its work, its message, its places in the indexes. Redis holds "
        f"**{waiting_bytes:,.0f} bytes for each that waits and {finished_bytes:,.0f} bytes for each that is done** (with its "
        "result, until its retention ends)."
    )
    page.table(
        ["call", f"{FEW} waiting, ms", f"{many:,} waiting, ms", "times"],
        [
            [name, f"{few_ms[name]:.2f}", f"{many_ms[name]:.2f}", f"{many_ms[name] / few_ms[name]:.2f}"]
            for name in few_ms
        ],
    )
    worst = max(many_ms[name] / few_ms[name] for name in few_ms)
    page.goal(
        f"with {many:,} waiting each call takes at most {GOAL_TIMES:g} × its time with {FEW} ({worst:.2f} ×)",
        worst <= GOAL_TIMES,
    )


def _fill(servers: Servers, count: int) -> None:
    how = ["--count", str(count), "--callers", "2", "--batch", str(min(BATCH, count))]
    answer_of(call("benchmarks.queue_callers", "--address", servers.address, *how))


def _times_ms(stub: queue_service_pb2_grpc.QueueServiceStub) -> dict[str, float]:
    job_id = stub.SubmitJob(request()).job.job_id
    calls: dict[str, Callable[[], object]] = {
        "SubmitJob": lambda: stub.SubmitJob(request()),
        "GetJob": lambda: stub.GetJob(pb.GetJobRequest(job_id=job_id)),
        "ListJobs": lambda: stub.ListJobs(
            pb.ListJobsRequest(states=[job_pb2.JOB_STATE_QUEUED], queue="default", page_size=50)
        ),
        "GetQueueStats": lambda: stub.GetQueueStats(pb.GetQueueStatsRequest()),
    }
    return {name: _median_ms(one) for name, one in calls.items()}


def _median_ms(one: Callable[[], object]) -> float:
    for _ in range(CALLS // 5):
        one()  # connections and caches are there
    times_ms = []
    for _ in range(CALLS):
        began_s = time.perf_counter()
        one()
        times_ms.append((time.perf_counter() - began_s) * 1000)
    return statistics.median(times_ms)


def _bytes_of_finished(servers: Servers, count: int) -> float:
    """What Redis holds for each of `count` jobs that are done, over what it held before them."""
    servers.clear()
    servers.start_workers()
    _fill(servers, 1)  # counters, histograms, the workers' own keys are there
    _until_none(servers)
    before_bytes = servers.used_memory_bytes()
    _fill(servers, count)
    _until_none(servers)
    servers.stop_workers()
    return (servers.used_memory_bytes() - before_bytes) / count


def _until_none(servers: Servers) -> None:
    until_s = time.monotonic() + FINISHED_S
    while servers.not_ended_count() > 0:
        if time.monotonic() > until_s:
            raise RuntimeError(f"{servers.not_ended_count()} jobs had not ended after {FINISHED_S:g} s")
        time.sleep(0.02)
