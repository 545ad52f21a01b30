"""The state table, by property: jobs.py by itself, and the scripts against it under any order of events."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace
from typing import Any

import redis
from ai4thai.queue.v1 import queue_service_pb2 as pb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queue_server import keys
from queue_server.connection import Connection
from queue_server.errors import JobNotFound, WrongState
from queue_server.jobs import ENDED, FIRST, NEXT, Backoff, Failure, JobState, Priority, Submission, after_failure
from queue_server.records import history, read_job
from queue_server.store import Store
from queue_server.worker_store import Claim, Outcome, WorkerStore
from tests.queue_server.conftest import let_pass, queue_settings, serve, worker_settings


def test_every_state_can_be_reached_and_every_life_can_end() -> None:
    reached, edge = set(FIRST), set(FIRST)
    while edge:
        edge = {after for state in edge for after in NEXT[state]} - reached
        reached |= edge
    assert reached == set(JobState)
    assert all(NEXT[state] for state in set(JobState) - ENDED) and not any(NEXT[state] for state in ENDED)
    # Backwards from the ends, every state is found again
    can_end = set(ENDED)
    for _ in JobState:
        can_end |= {state for state in JobState if NEXT[state] & can_end}
    assert can_end == set(JobState)


@given(
    st.booleans(),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 100),
    st.floats(0, 1),
    st.floats(0, 500),
)
def test_a_failure_leads_to_another_attempt_or_the_end(
    retriable: bool, free: bool, spent: int, max_attempts: int, more: int, jitter: float, retry_after_s: float
) -> None:
    failure = Failure("R", "m", b"", retriable, free, retry_after_s)
    backoff = Backoff(1.0, 60.0)
    verdict = after_failure(
        failure, attempt=spent + more, spent=spent, max_attempts=max_attempts, backoff=backoff, jitter=jitter
    )
    assert verdict.state in NEXT[JobState.RUNNING] & {JobState.SCHEDULED, JobState.FAILED}
    if verdict.state == JobState.SCHEDULED:
        assert retriable and (free or spent < max_attempts)
        assert verdict.delay_s >= retry_after_s and 1.0 <= verdict.delay_s <= max(60.0, retry_after_s)
        assert not verdict.exhausted
    else:
        assert not retriable or spent >= max_attempts
        assert verdict.exhausted == retriable


@given(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_backoff_grows_and_stays_bounded(attempt: int, jitter: float, other: float) -> None:
    backoff = Backoff(1.0, 60.0)
    assert 1.0 <= backoff.delay_s(attempt, jitter) <= 60.0
    assert backoff.delay_s(attempt + 2, other) >= min(backoff.delay_s(attempt, jitter), 30.0)


JOB_ID, MEDIA_ID = "a" * 32, "sha256:" + "0" * 64

# What may happen to a job, in any order: each step is one script, called at the wrong moment as well as at the right one.
STEPS = (
    *("claim", "stale claim", "renew", "succeed", "fail", "retry", "hand back", "old attempt"),
    *("cancel", "delete", "due", "lost", "expired", "overdue", "redispatch"),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=3, max_size=14),
    later=st.booleans(),
    deadline=st.booleans(),
    max_attempts=st.integers(1, 3),
)
def test_no_order_of_events_leaves_the_state_table(
    broker_url: str, steps: list[str], later: bool, deadline: bool, max_attempts: int
) -> None:
    asyncio.run(_live(broker_url, steps, later, deadline, max_attempts))


async def _live(url: str, steps: list[str], later: bool, deadline: bool, max_attempts: int) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()
        connection = Connection(url, 2.0, queue_settings(url).terms)
        await connection.start()
        store = Store(connection, queue_settings(url))
        workers = WorkerStore(worker_settings(url, "localhost:1", lease_s=3600))
        workers.start()
        try:
            await _play(client, store, workers, steps, later, deadline, max_attempts)
        finally:
            workers.stop()
            await connection.stop()


async def _play(
    client: Any, store: Store, workers: WorkerStore, steps: list[str], later: bool, deadline: bool, max_attempts: int
) -> None:
    in_an_hour_ms = round(time.time() * 1000) + 3_600_000
    submission = Submission(
        job_id=JOB_ID,
        request_id="mine",
        fingerprint="f",
        queue="default",
        priority=Priority.STANDARD,
        not_before_ms=in_an_hour_ms if later else 0,
        deadline_ms=2 * in_an_hour_ms if deadline else 0,
        max_attempts=max_attempts,
        labels={},
        kind="detect",
        item_count=1,
        work=b"work",
        blobs={MEDIA_ID: b"image"},
        media_ids=(MEDIA_ID,),
    )
    job, created = await store.submit(submission)
    assert created and job.state in FIRST
    claims: list[Claim] = []
    numbers = itertools.count()
    for step in steps:
        before = job
        dispatch_no = int(client.hget(f"{{vq}}:job:{job.job_id}", "dispatch") or 0)
        match step:
            case "claim":
                claimed = workers.claim(job.job_id, dispatch_no, f"c{next(numbers)}", "w", b"status")
                if isinstance(claimed, Claim):
                    claims.append(claimed)
            case "stale claim":
                assert not isinstance(workers.claim(job.job_id, dispatch_no - 1, "never", "w", b""), Claim)
            case "renew" if claims:
                workers.renew(claims[-1], job.progress)
            case "succeed" if claims:
                workers.finish(claims[-1], Outcome(JobState.SUCCEEDED, result=b"result"))
            case "fail" if claims:
                workers.finish(claims[-1], Outcome(JobState.FAILED, error=b"e", job_error=b"e"))
            case "retry" if claims:
                workers.finish(claims[-1], Outcome(JobState.SCHEDULED, error=b"e", delay_s=0))
            case "hand back" if claims:
                workers.finish(claims[-1], Outcome(JobState.QUEUED, error=b"e", free=True))
            case "old attempt" if len(claims) > 1:
                assert not workers.finish(claims[-2], Outcome(JobState.SUCCEEDED))[0] or job.state != JobState.RUNNING
            case "cancel":
                await store.cancel(job.job_id)
            case "delete":
                try:
                    await store.delete(job.job_id)
                except WrongState:
                    assert not job.ended
                else:
                    assert job.ended
                    _assert_no_trace(client, job.job_id)
                    return
            case "due":
                let_pass(client, keys.DELAYED, JOB_ID)
                await store.sweep("sweep_due")
            case "lost":
                let_pass(client, keys.LEASES, JOB_ID)
                await store.sweep("sweep_lost", errors={"w": "ZQ=="})
            case "expired":
                let_pass(client, keys.DEADLINES, JOB_ID)
                await store.sweep("sweep_expired", expired="ZQ==")
            case "overdue":
                await store.sweep("sweep_overdue", priorities=["standard"], overdue_ms=0)
            case "redispatch":
                workers.redispatch(job.job_id, dispatch_no)
        job = await store.job(before.job_id)
        assert job.state == before.state or job.state in NEXT[before.state], (step, before.state, job.state)
        if before.ended:
            assert job == before, step
        assert job.attempt >= before.attempt and 0 <= job.spent <= max_attempts
        await _assert_consistent(client, store, job.job_id)


async def _assert_consistent(client: Any, store: Store, job_id: str) -> None:
    """The record is what its changes add up to, and the indexes say the same."""
    kept = await store.kept(job_id)
    job = read_job(kept.fields)
    lives = history(kept)
    assert lives[-1] == job
    assert [life.revision for life in lives] == list(range(1, job.revision + 1))
    for earlier, after in itertools.pairwise(lives):
        assert after.state == earlier.state or after.state in NEXT[earlier.state]
    for state in JobState:
        present = client.zscore(f"{{vq}}:idx:state:{state}", job_id) is not None
        assert present == (state == job.state)
        assert int(client.hget("{vq}:q:default:n", state) or 0) == int(present)
    expected = {
        "wait:standard": job.state == JobState.QUEUED,
        "q:default:wait": job.state == JobState.QUEUED,
        "leases": job.state == JobState.RUNNING,
        "delayed": job.state == JobState.SCHEDULED,
        "ended": job.ended,
    }
    for name, present in expected.items():
        assert (client.zscore(f"{{vq}}:{name}", job_id) is not None) == present, (name, job.state)
    # The image is kept while the job needs it, and has a lifetime afterwards
    assert (client.ttl("{vq}:media:" + MEDIA_ID) == client.ttl("{vq}:blob:" + MEDIA_ID) == -1) == (not job.ended)
    assert (client.get(f"{{vq}}:job:{job_id}:res") is not None) == (job.state == JobState.SUCCEEDED)
    if job.state == JobState.QUEUED:
        dispatch_no = client.hget(f"{{vq}}:job:{job_id}", "dispatch").decode()
        assert f"{job_id}.{dispatch_no}".encode() in client.lrange("{vq}:d:standard", 0, -1)


def _assert_no_trace(client: Any, job_id: str) -> None:
    names = [key.decode() for key in client.keys("*")]
    assert not [name for name in names if job_id in name]
    for name in names:
        if client.type(name) == b"zset":
            assert client.zscore(name, job_id) is None, name


async def test_forgotten_jobs_are_not_found(redis_url: str) -> None:
    connection = Connection(redis_url, 2.0, queue_settings(redis_url).terms)
    await connection.start()
    store = Store(connection, queue_settings(redis_url))
    for call in (store.job("x" * 32), store.cancel("x" * 32), store.delete("x" * 32), store.kept("x" * 32)):
        try:
            await call
        except JobNotFound:
            continue
        raise AssertionError("found")
    await connection.stop()


async def test_an_attempt_of_the_same_number_by_another_worker_is_fenced_too(redis_url: str, redis_client: Any) -> None:
    # Given a running attempt, and a Redis that came back without its last second, where another worker has begun attempt 1 anew
    async with serve(queue_settings(redis_url)) as front:
        job = await front.submit(b"ok")
        workers = WorkerStore(worker_settings(redis_url, "localhost:1", lease_s=3600))
        workers.start()
        ours = workers.claim(job.job_id, 1, "ours", "w", b"")
        assert isinstance(ours, Claim)
        redis_client.hset(f"{{vq}}:job:{job.job_id}", mapping={"claim": "theirs", "worker": "other"})
        # When the first one goes on, then it learns that it has lost the job, and may not end it
        assert workers.renew(ours, ours.job.progress) == "lost" and workers.look([ours]) == ["lost"]
        assert workers.finish(ours, Outcome(JobState.SUCCEEDED))[0] is False
        theirs = replace(ours, claim_id="theirs")
        assert workers.renew(theirs, ours.job.progress) == "ok"
        assert workers.finish(theirs, Outcome(JobState.SUCCEEDED)) == (True, "SUCCEEDED")
        workers.stop()


async def test_a_held_job_is_not_begun_by_a_message_that_comes_twice(redis_url: str) -> None:
    async with serve(queue_settings(redis_url)) as front:
        job = await front.submit(b"ok")
        await front.stub.PauseQueue(pb.PauseQueueRequest(queue="default"))
        workers = WorkerStore(worker_settings(redis_url, "localhost:1"))
        workers.start()
        assert [workers.claim(job.job_id, 1, f"c{number}", "w", b"") for number in range(2)] == ["paused", "stale"]
        workers.stop()
