"""How long the queue takes to get over a killed worker, to stop a cancelled call, to go on when Redis is back."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress

from ai4thai import QueueClient
from ai4thai.errors import Unavailable
from ai4thai.job_results import Job, JobState

from benchmarks.chaos_vision import write_image
from benchmarks.pages import Page, console
from benchmarks.queue_servers import Servers

GOAL_REDELIVERY_S = 10.0
GOAL_CANCEL_S = 1.0
GOAL_REDIS_S = 5.0
SLOW_S = 60.0
AWAY_S = 3.0
# More than the two workers have threads, so that some have not begun when Redis is killed.
WAITING = 60
IMAGE_S = 0.5
SEEN_S = 30.0


def measure_failures(page: Page, repeats: int) -> None:
    """With the product's default settings, real workers, and a vision server that takes a minute for an image when told to."""
    with Servers() as servers, QueueClient(servers.address) as client:
        servers.start_workers("queue_server.worker", count=2)
        console.print("cancels …")
        cancels_s = [_cancel_s(servers, client, number) for number in range(repeats * 3)]
        console.print("kills of a worker …")
        redeliveries_s = [_redelivery_s(servers, client, number) for number in range(repeats)]
        console.print("outages of Redis …")
        returns_s = [_return_s(servers, client, number) for number in range(repeats)]
    page.say(
        "Default settings, two workers, a vision server that takes as long as an image says. Redelivered: from kill -9 of the "
        "worker to the start of the next attempt on another. Cancelled: from the call of CancelJob to the moment at which the "
        f"vision server sees its call cancelled. Redis: kill -9 while {WAITING} jobs of {IMAGE_S:g} s run and wait, {AWAY_S:g} s "
        "of nothing, start; from its first answer to the end of the first job that was begun after it."
    )
    rows = (
        ("worker killed → next attempt begins", redeliveries_s, GOAL_REDELIVERY_S),
        ("CancelJob → the vision server's call ends", cancels_s, GOAL_CANCEL_S),
        ("Redis is back → first job done", returns_s, GOAL_REDIS_S),
    )
    page.table(
        ["", "times", "median s", "longest s"],
        [[name, len(values), f"{statistics.median(values):.2f}", f"{max(values):.2f}"] for name, values, _ in rows],
    )
    for name, values, limit_s in rows:
        page.goal(f"{name}: within {limit_s:g} s ({max(values):.2f} s at most)", max(values) <= limit_s)


def _slow_job(client: QueueClient, name: str) -> Job:
    """A job at the vision server."""
    job = client.submit_detect([write_image(SLOW_S, good=True, filling=name.encode())], max_attempts=20)
    return _until(client, job.job_id, lambda one: one.state == JobState.RUNNING)


def _cancel_s(servers: Servers, client: QueueClient, number: int) -> float:
    job = _slow_job(client, f"cancel {number} {os.getpid()}")
    request_id = f"{job.job_id}.{job.attempt_count}"
    servers.vision.wait_for("began", request_id=request_id)
    began_s = time.monotonic()
    client.cancel(job.job_id)
    ended = servers.vision.wait_for("cancelled", timeout_s=SEEN_S, request_id=request_id)
    return float(str(ended["at_s"])) - began_s


def _redelivery_s(servers: Servers, client: QueueClient, number: int) -> float:
    job = _slow_job(client, f"kill {number}")
    servers.kill_worker(job.attempts[-1].worker)
    killed_s = time.monotonic()
    servers.vision.wait_for("began", timeout_s=SEEN_S, request_id=f"{job.job_id}.{job.attempt_count + 1}")
    took_s = time.monotonic() - killed_s
    client.cancel(job.job_id)
    servers.start_workers("queue_server.worker")
    return took_s


def _return_s(servers: Servers, client: QueueClient, number: int) -> float:
    """Of the jobs that were begun after Redis came back, the first one's end; those in hand are recorded at once."""
    images = [write_image(IMAGE_S, good=True, filling=f"{number} {one}".encode()) for one in range(WAITING)]
    jobs = [client.submit_detect([image]) for image in images]
    servers.kill_broker()
    time.sleep(AWAY_S)
    servers.start_broker()
    back_s = time.time()
    ended = [_until(client, job.job_id, lambda one: one.has_ended) for job in jobs]
    ends_s = [
        job.end_time.timestamp() - back_s
        for job in ended
        if job.start_time is not None and job.end_time is not None and job.start_time.timestamp() > back_s
    ]
    if not ends_s or any(job.state != JobState.SUCCEEDED for job in ended):
        raise RuntimeError(f"the jobs ended {[job.state for job in ended]}, {len(ends_s)} begun after Redis' return")
    return min(ends_s)


def _until(client: QueueClient, job_id: str, true: Callable[[Job], bool]) -> Job:
    until_s = time.monotonic() + SEEN_S
    while True:
        with suppress(Unavailable):  # right after an outage
            if true(job := client.get(job_id)):
                return job
        if time.monotonic() > until_s:
            raise RuntimeError(f"job {job_id} is not what it should be after {SEEN_S:g} s")
        time.sleep(0.01)
