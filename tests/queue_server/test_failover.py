"""Processes that die and stop, a Redis that goes and comes: no job is lost, none is done twice."""

from __future__ import annotations

import asyncio
import signal
import time
from types import SimpleNamespace

import grpc
import pytest
import redis
from ai4thai.queue.v1 import job_pb2
from ai4thai.queue.v1 import queue_service_pb2 as pb

from queue_server import keys, sweeper
from queue_server.broker import Broker
from queue_server.jobs import JobState
from queue_server.service import NAME
from queue_server.worker_store import Claim, Outcome, WorkerStore
from tests.ports import free_port
from tests.queue_server.conftest import (
    Front,
    let_pass,
    queue_settings,
    serve,
    state,
    worker_environment,
    worker_settings,
)
from tests.queue_server.test_retries import reasons
from tests.queue_server.test_submit import refusal


async def running_on(front: Front, job_id: str) -> str:
    job = await front.until(job_id, lambda job: job.state == job_pb2.JOB_STATE_RUNNING)
    return job.attempts[-1].worker


async def test_a_killed_workers_job_succeeds_once_on_another(redis_url, front: Front, start_process, vision) -> None:
    # Given two worker processes and a job that one of them is at
    environment = worker_environment(redis_url, vision)
    processes = [start_process("queue_server.worker", **environment) for _ in range(2)]
    job = await front.submit(b"ok first", b"slow second")
    worker = await running_on(front, job.job_id)
    await vision.wait_for_calls(2)
    # When that one is killed
    (killed,) = [process for process in processes if f"-{process.popen.pid}-" in worker]
    killed.kill(signal.SIGKILL)
    await front.until(job.job_id, lambda job: job.attempt_count == 2)
    vision.release()
    seen = await front.watch(job.job_id)
    # Then the other does it, the record tells of both attempts, and it has ended once
    ended = seen[-1].job
    assert state(ended) == "SUCCEEDED"
    assert [item.detection.model for item in ended.result.detect.items] == ["ok first", "slow second"]
    first, second = ended.attempts
    assert first.worker == worker and reasons(first.error) == ["WORKER_LOST"]
    assert second.worker != worker and not second.HasField("error")
    assert [state(one.job) for one in seen].count("SUCCEEDED") == 1
    assert [one.revision for one in seen] == list(range(1, len(seen) + 1))
    # And the dead one is no longer listed
    async with asyncio.timeout(10):
        while True:
            workers = (await front.stub.ListWorkers(pb.ListWorkersRequest())).workers
            if worker not in {one.worker for one in workers}:
                break
            await asyncio.sleep(0.1)


async def test_a_job_that_kills_its_workers_ends(redis_url, front: Front, start_process, vision) -> None:
    job = await front.submit(b"slow", max_attempts=1)
    process = start_process("queue_server.worker", **worker_environment(redis_url, vision))
    await vision.wait_for_calls(1)
    process.kill(signal.SIGKILL)
    ended = await front.end(job.job_id)
    assert state(ended) == "FAILED" and reasons(ended.error) == ["WORKER_LOST"]


async def test_a_stopped_worker_gives_its_jobs_back_at_once(redis_url, front: Front, start_process, vision) -> None:
    # Given a worker that is at a job which has one attempt only
    process = start_process("queue_server.worker", **worker_environment(redis_url, vision, QUEUE_LEASE_S="60"))
    job = await front.submit(b"slow", max_attempts=1)
    await vision.wait_for_calls(1)
    # When it is told to stop
    process.kill(signal.SIGTERM)
    given_back = await front.until(job.job_id, lambda job: job.state == job_pb2.JOB_STATE_QUEUED, timeout_s=5)
    # Then it exits in order, the call is stopped, and the attempt has cost nothing
    assert process.wait() == 0
    assert len(vision.cancelled_s) == 1
    assert reasons(given_back.attempts[0].error) == ["DRAINING"]
    vision.release()
    start_process("queue_server.worker", **worker_environment(redis_url, vision))
    ended = await front.end(job.job_id)
    assert state(ended) == "SUCCEEDED" and ended.attempt_count == 2
    assert (await front.stub.ListWorkers(pb.ListWorkersRequest())).workers[0].worker == ended.attempts[1].worker


async def test_a_message_that_got_lost_is_sent_again(front: Front, start_worker, redis_client: redis.Redis) -> None:
    # Given a waiting job whose message Redis has lost
    job = await front.submit()
    redis_client.delete(keys.dramatiq_list("standard"), keys.dramatiq_messages("standard"))
    await start_worker()
    # Then it is sent again
    assert state(await front.end(job.job_id)) == "SUCCEEDED"


async def test_an_attempt_that_lost_its_lease_cannot_record_anything(redis_url, front: Front, vision) -> None:
    # Given a worker that stalls after it has claimed a job, until another has it
    store = WorkerStore(worker_settings(redis_url, vision.address, lease_s=0.2))
    store.start()
    job = await front.submit()
    first = store.claim(job.job_id, 1, "claim one", "slow worker", b"")
    assert isinstance(first, Claim)
    # The same claim again is the same attempt; another claim by the same number is stale
    assert store.claim(job.job_id, 1, "claim one", "slow worker", b"") == first
    assert store.claim(job.job_id, 1, "claim two", "other", b"") == "stale"
    await front.until(job.job_id, lambda job: job.state == job_pb2.JOB_STATE_QUEUED)
    second = store.claim(job.job_id, 2, "claim two", "other worker", b"")
    assert isinstance(second, Claim) and second.job.attempt == 2
    # Then whatever the first one says is refused
    for outcome in (JobState.SUCCEEDED, JobState.FAILED, JobState.SCHEDULED, JobState.QUEUED, JobState.CANCELLED):
        recorded, why = store.finish(first, Outcome(outcome))
        assert not recorded and "attempt 2" in why
    assert store.renew(first, first.job.progress) == "lost"
    assert store.look([first, second]) == ["lost", "ok"]
    # And the second one's word counts, also when it is said twice
    assert store.finish(second, Outcome(JobState.SUCCEEDED)) == (True, "SUCCEEDED")
    revision = (await front.get(job.job_id)).revision
    assert store.finish(second, Outcome(JobState.SUCCEEDED)) == (True, "SUCCEEDED")
    assert (await front.get(job.job_id)).revision == revision
    store.stop()


async def test_no_worker_is_lost_because_the_machine_stood_still(redis_url, redis_client, vision, monkeypatch) -> None:
    job_id, looks, leap_s = "", 0, 0.0

    def clock() -> float:
        nonlocal looks, leap_s
        looks, now_s = looks + 1, time.time() + leap_s
        # The sweeper looks before it sleeps and afterwards: when it wakes, a minute has passed for all on this machine.
        if job_id and not leap_s and looks % 2:
            let_pass(redis_client, keys.LEASES, job_id)
            leap_s = 60.0
        return now_s

    monkeypatch.setattr(sweeper, "time", SimpleNamespace(time=clock, monotonic=time.monotonic))
    async with serve(queue_settings(redis_url, lease_s=20.0)) as front:
        # Given a running job, when the machine stands still for longer than its lease
        store = WorkerStore(worker_settings(redis_url, vision.address))
        store.start()
        job = await front.submit()
        claim = store.claim(job.job_id, 1, "claim", "w", b"")
        assert isinstance(claim, Claim)
        job_id = job.job_id
        await front.until(job_id, lambda _: leap_s > 0)
        swept = looks + 4
        await front.until(job_id, lambda _: looks >= swept)
        # Then its worker may renew it
        assert store.renew(claim, claim.job.progress) == "ok"
        store.stop()


async def test_of_many_claims_one_wins(redis_url, front: Front, vision) -> None:
    store = WorkerStore(worker_settings(redis_url, vision.address))
    store.start()
    job = await front.submit()
    claims = await asyncio.gather(
        *(asyncio.to_thread(store.claim, job.job_id, 1, f"claim {number}", "w", b"") for number in range(30))
    )
    assert sum(isinstance(claim, Claim) for claim in claims) == 1
    assert sum(claim == "stale" for claim in claims) == 29
    store.stop()


@pytest.fixture
def own_broker(tmp_path):
    """A broker that the test may stop."""
    broker = Broker(tmp_path, free_port(), "64mb")
    broker.start()
    yield broker
    broker.stop()


async def serving(front: Front, wanted: bool) -> None:
    async with asyncio.timeout(10):
        async for now in front.health.watch(NAME):
            if now == wanted:
                return


async def test_while_redis_is_away_calls_fail_fast_and_recover_by_themselves(own_broker: Broker, start_worker) -> None:
    assert own_broker.running is not None
    url, port = own_broker.running.url, own_broker.running.port
    async with serve(queue_settings(url)) as front:
        await start_worker(redis_url=url)
        await serving(front, True)
        before = await front.submit(b"ok before", request_id="before")
        assert state(await front.end(before.job_id)) == "SUCCEEDED"
        # When Redis goes
        own_broker.stop()
        began_s = time.monotonic()
        code, reason, details = await refusal(front.submit(b"ok during", request_id="during"))
        # Then a submission fails at once, says when to come back, and health tells
        assert time.monotonic() - began_s < 10
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        await serving(front, False)
        assert any("redis" in why for why in front.health.why_not(NAME))
        # When it comes back, then everything goes on, and what was there is there
        again = Broker(own_broker._data_dir, port, "64mb")
        again.start()
        try:
            await serving(front, True)
            assert state(await front.get(before.job_id)) == "SUCCEEDED"
            during = await front.submit(b"ok during", request_id="during")
            assert state(await front.end(during.job_id)) == "SUCCEEDED"
        finally:
            again.stop()


async def test_a_redis_that_hangs_is_given_up_in_time(own_broker: Broker) -> None:
    assert own_broker.running is not None
    async with serve(queue_settings(own_broker.running.url)) as front:
        await front.submit()
        process = own_broker._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            code, reason, _ = await refusal(front.submit(b"ok picture"))
            assert time.monotonic() - began_s < 10
            assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        finally:
            process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(10):
            while True:
                try:
                    await front.submit()
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.1)


async def test_a_redis_that_would_delete_jobs_by_itself_is_not_used(redis_url, redis_client) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        async with serve(queue_settings(redis_url)) as front:
            await serving(front, False)
            async with asyncio.timeout(5):
                while not any("allkeys-lru" in why for why in front.health.why_not(NAME)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")


async def test_a_killed_redis_loses_nothing_that_was_answered(tmp_path, vision, start_worker) -> None:
    # Given jobs that were accepted, one of them running, when Redis is killed and started again
    broker = Broker(tmp_path, free_port(), "64mb")
    running = broker.start()
    async with serve(queue_settings(running.url)) as front:
        await start_worker(redis_url=running.url, worker_threads=1)
        jobs = [
            await front.submit(b"slow first"),
            *[await front.submit(f"ok {number}".encode()) for number in range(5)],
        ]
        await vision.wait_for_calls(1)
        assert broker._process is not None
        broker._process.kill()
        broker._process.wait()
        broker.stop()
        again = Broker(tmp_path, running.port, "64mb")
        again.start()
        try:
            vision.release()
            # Then all end, each once
            for job in jobs:
                async with asyncio.timeout(30):
                    while True:
                        try:
                            ended = await front.end(job.job_id)
                            break
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.2)
                assert state(ended) == "SUCCEEDED"
                assert [bool(attempt.error.code) for attempt in ended.attempts][-1] is False
        finally:
            again.stop()


async def test_the_record_lists_the_last_attempts_of_very_many(redis_url, front: Front, vision) -> None:
    # Given a job that stopping workers have given back thirty times
    store = WorkerStore(worker_settings(redis_url, vision.address))
    store.start()
    job = await front.submit(max_attempts=1)
    for number in range(1, 31):
        claim = store.claim(job.job_id, number, f"claim {number}", "w", b"")
        assert isinstance(claim, Claim)
        assert store.finish(claim, Outcome(JobState.QUEUED, free=True)) == (True, "QUEUED")
    seen = await front.get(job.job_id)
    # Then it tells of the last twenty, and its one attempt is still to come
    assert seen.attempt_count == 30 and [attempt.number for attempt in seen.attempts] == list(range(11, 31))
    last = store.claim(job.job_id, 31, "last", "w", b"")
    assert isinstance(last, Claim) and (last.job.attempt, last.job.spent) == (31, 1)
    store.stop()
