"""The operator's hand (pause, resume, purge), fair shares between clients, batches, limits, and another try of an ended job."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
import redis
from ai4thai.queue.v1 import queue_service_pb2 as pb

from queue_server import keys
from queue_server.actors import QUEUE, build_broker, declare_actor
from queue_server.worker_store import Claim, WorkerStore
from serving.errors import Code
from tests.queue_server.conftest import Front, detect, let_pass, queue_settings, serve, state, worker_settings
from tests.queue_server.fake_vision import FakeVision, error
from tests.queue_server.test_submit import refusal, stamp


async def stats(front: Front, queue: str = "default") -> pb.QueueStats:
    (found,) = (await front.stub.GetQueueStats(pb.GetQueueStatsRequest(queue=queue))).queues
    return found


# ---- pause, resume, purge


async def test_a_paused_queue_keeps_its_jobs_and_a_resumed_one_runs_them_in_order(
    front: Front, start_worker, vision: FakeVision
) -> None:
    # Given a queue that is paused before its first job, beside one that is not
    await front.stub.PauseQueue(pb.PauseQueueRequest(queue="nightly"))
    await start_worker(worker_threads=1)
    held = [await front.submit(f"ok{number}".encode(), queue="nightly") for number in range(3)]
    await front.end((await front.submit(b"ok other")).job_id)
    # Then its jobs are accepted and wait, and everyone sees why
    assert all(job.held and state(job) == "QUEUED" for job in held)
    seen = await stats(front, "nightly")
    assert (seen.paused, seen.depth, seen.held, seen.running) == (True, 3, 3, 0)
    assert vision.calls == [b"ok other"]
    # When it is resumed (twice is fine), they run in the order in which they came
    for _ in range(2):
        await front.stub.ResumeQueue(pb.ResumeQueueRequest(queue="nightly"))
    for job in held:
        ended = await front.end(job.job_id)
        assert state(ended) == "SUCCEEDED" and not ended.held and ended.attempt_count == 1
    assert vision.calls == [b"ok other", b"ok0", b"ok1", b"ok2"]
    assert not (await stats(front, "nightly")).paused


async def test_jobs_whose_message_was_sent_before_the_pause_wait_too(front: Front, start_worker, vision) -> None:
    # Given jobs in the broker's list
    jobs = [await front.submit(f"ok{number}".encode()) for number in range(3)]
    await front.stub.PauseQueue(pb.PauseQueueRequest(queue="default"))
    # When a worker takes their messages
    await start_worker()
    for job in jobs:
        await front.until(job.job_id, lambda job: job.held)
    await asyncio.sleep(0.3)
    # Then none has been begun, no attempt was spent, and after the pause all run
    assert vision.calls == []
    await front.stub.ResumeQueue(pb.ResumeQueueRequest(queue="default"))
    assert [(await front.end(job.job_id)).attempt_count for job in jobs] == [1, 1, 1]


async def test_purging_cancels_what_waits_and_nothing_else(front: Front, start_worker, vision: FakeVision) -> None:
    # Given a running job, many that wait, one whose time has not come, and one of another queue
    await start_worker(worker_threads=1)
    running = await front.submit(b"slow")
    await front.until(running.job_id, lambda job: state(job) == "RUNNING")
    waiting = [await front.submit(b"ok") for _ in range(250)]
    later = await front.submit(b"ok", not_before_time=stamp(time.time() + 3600))
    other = await front.submit(b"ok", queue="other")
    # When the queue is purged
    answer = await front.stub.PurgeQueue(pb.PurgeQueueRequest(queue="default"))
    # Then the waiting ones have ended, the others go on
    assert answer.cancelled_count == 251
    for job in (waiting[0], waiting[-1], later):
        ended = await front.get(job.job_id)
        assert state(ended) == "CANCELLED" and ended.attempt_count == 0
    assert (await stats(front)).depth == 0
    vision.release()
    assert [state(await front.end(job.job_id)) for job in (running, other)] == ["SUCCEEDED", "SUCCEEDED"]
    # And a queue that never was is not purged silently
    code, reason, _ = await refusal(front.stub.PurgeQueue(pb.PurgeQueueRequest(queue="nightly")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "QUEUE_NOT_FOUND")


@pytest.mark.parametrize("method", ["PauseQueue", "ResumeQueue", "PurgeQueue"])
async def test_the_queue_must_be_named(front: Front, method: str) -> None:
    for name in ("", "Not A Name"):
        code, reason, details = await refusal(getattr(front.stub, method)(getattr(pb, f"{method}Request")(queue=name)))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert details["BadRequest"].field_violations[0].field == "queue"


async def test_no_more_queues_are_paused_than_there_may_be(redis_url: str) -> None:
    async with serve(queue_settings(redis_url, max_queues=2)) as front:
        for name in ("a", "b"):
            await front.stub.PauseQueue(pb.PauseQueueRequest(queue=name))
        code, reason, _ = await refusal(front.stub.PauseQueue(pb.PauseQueueRequest(queue="c")))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")


# ---- fair shares


async def test_a_client_with_many_jobs_does_not_make_the_others_wait(redis_url: str, redis_client) -> None:
    # Given a client that has submitted forty jobs, and after it two with two each
    async with serve(queue_settings(redis_url, client_window=2)) as front:
        names = {}
        for client, count in (("greedy", 40), ("somchai", 2), ("malee", 2)):
            for _ in range(count):
                names[(await front.submit(client=client)).job_id] = client
        seen = await stats(front)
        assert [(one.client, one.waiting) for one in seen.clients] == [("greedy", 40), ("somchai", 2), ("malee", 2)]
        assert (seen.depth, seen.held) == (44, 38)
        # When one worker begins one job after the other
        order = [names[job_id] for job_id in _claimed(redis_url, redis_client, 44, client_window=2)]
    # Then the clients have had their turns, and nobody's jobs were forgotten
    assert order[:8].count("somchai") == order[:8].count("malee") == 2
    assert order.count("greedy") == 40


async def test_urgent_jobs_without_end_do_not_starve_the_others(front: Front, redis_url: str, redis_client) -> None:
    # Given many urgent jobs, and one each of the other priorities behind them
    for _ in range(30):
        await front.submit(priority=1)
    standard, batch = await front.submit(priority=2), await front.submit(priority=3)
    # Then the urgent ones go first, and the others get their turn before all of those are done
    order = _claimed(redis_url, redis_client, 32)
    assert 4 < order.index(standard.job_id) < 20 and 4 < order.index(batch.job_id) < 20


async def test_one_clients_jobs_run_in_the_order_they_came(redis_url: str, redis_client) -> None:
    async with serve(queue_settings(redis_url, client_window=3)) as front:
        submitted = [(await front.submit(client="one")).job_id for _ in range(20)]
        assert _claimed(redis_url, redis_client, 20, client_window=3) == submitted


async def test_a_clients_running_jobs_are_bounded(redis_url: str, start_worker, vision: FakeVision) -> None:
    # Given a bound of two, and a worker with room for four
    async with serve(queue_settings(redis_url, client_running=2)) as front:
        await start_worker(client_running=2)
        jobs = [await front.submit(f"slow{number}".encode(), client="one") for number in range(5)]
        await vision.wait_for_calls(2)
        other = await front.submit(b"slow other", client="two")
        await vision.wait_for_calls(3)
        await asyncio.sleep(0.3)
        # Then two of one client's run, and the other client's beside them
        assert len(vision.calls) == 3 and b"slow other" in vision.calls
        vision.release()
        for job in (*jobs, other):
            assert state(await front.end(job.job_id)) == "SUCCEEDED"
        assert (await stats(front)).held == 0


async def test_the_client_is_told_by_metadata_too_and_jobs_are_listed_by_it(front: Front) -> None:
    request = pb.SubmitJobRequest(work=detect(b"ok"), request_id="mine")
    metadata = (("x-client-id", "team10"),)
    job = (await front.stub.SubmitJob(request, metadata=metadata)).job
    assert job.client == "team10"
    # The same request_id of another client is another's
    other = await front.submit(b"ok", request_id="mine", client="team11")
    assert other.job_id != job.job_id
    listed = (await front.stub.ListJobs(pb.ListJobsRequest(client="team10"))).jobs
    assert [found.job_id for found in listed] == [job.job_id]
    code, _, details = await refusal(front.submit(b"ok", client="no such name!"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "client"


def _claimed(redis_url: str, client: redis.Redis, count: int, **changes: Any) -> list[str]:
    """The ids in the order in which a worker with one thread begins them."""
    store = WorkerStore(worker_settings(redis_url, "localhost:1", **changes))
    store.start()
    broker = build_broker(client)
    declare_actor(broker, lambda job_id, dispatch_no: None)
    consumer = broker.consume(QUEUE, prefetch=1, timeout=10)
    order = []
    try:
        while len(order) < count:
            message = next(consumer)
            assert message is not None, f"only {len(order)} came"
            claim = store.claim(*message.args, f"claim {len(order)}", "w", b"")
            consumer.ack(message)
            assert isinstance(claim, Claim), claim
            order.append(claim.job_id)
    finally:
        store.stop()
    return order


# ---- limits


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        ("depth", {"max_depth": 2}),
        ("queue_depth", {"max_queue_depth": 2}),
        ("client_depth", {"max_client_depth": 2}),
        ("bytes", {"max_bytes": 450}),
        ("queue_bytes", {"max_queue_bytes": 450}),
        ("client_bytes", {"max_client_bytes": 450}),
    ],
)
async def test_what_is_full_says_so_and_takes_more_once_there_is_room(redis_url: str, limit: str, settings) -> None:
    image = b"ok" + b"." * 100
    async with serve(queue_settings(redis_url, **settings)) as front:
        # Given as much as there may be
        jobs = [await front.submit(image, client="one") for _ in range(2)]
        # When there comes one more
        code, reason, details = await refusal(front.submit(image, client="one"))
        # Then it is refused, with what is full and when to come back, and nothing of it is kept
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert details["ErrorInfo"].metadata["limit_name"] == limit
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        assert len((await front.stub.ListJobs(pb.ListJobsRequest())).jobs) == 2
        seen = await stats(front)
        assert seen.depth == 2 and 2 * len(image) < seen.size_bytes < 450
        # Others have their own room, where the limit is a queue's or a client's
        if limit.startswith("queue"):
            await front.submit(image, client="one", queue="other")
        if limit.startswith("client"):
            await front.submit(image, client="two")
        # And once one has ended there is room again
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=jobs[0].job_id))
        await front.submit(image, client="one")


# ---- batches


async def test_each_of_a_batch_has_its_own_outcome_in_its_place(front: Front, start_worker) -> None:
    # Given a batch of good ones, a bad one, a repeated one, and one whose id belongs to another body
    await front.submit(b"other", request_id="taken")
    good = [pb.SubmitJobRequest(work=detect(f"ok{number}".encode()), request_id=f"r{number}") for number in range(60)]
    requests = [*good[:30], pb.SubmitJobRequest(), good[0], *good[30:]]
    requests.append(pb.SubmitJobRequest(work=detect(b"mine"), request_id="taken"))
    # When it is sent, twice
    first = (await front.stub.BatchSubmitJobs(pb.BatchSubmitJobsRequest(requests=requests))).items
    second = (await front.stub.BatchSubmitJobs(pb.BatchSubmitJobsRequest(requests=requests))).items
    # Then each answer stands in its request's place, and the second time makes nothing new
    assert len(first) == len(requests)
    assert [item.WhichOneof("outcome") for item in first] == ["accepted"] * 30 + ["error"] + ["accepted"] * 31 + [
        "error"
    ]
    assert first[31].accepted.job.job_id == first[0].accepted.job.job_id and not first[31].accepted.created
    assert "work" in first[30].error.message and "taken" in first[-1].error.message
    assert sum(item.accepted.created for item in first) == 60
    assert not any(item.accepted.created for item in second)
    assert [item.accepted.job.job_id for item in first] == [item.accepted.job.job_id for item in second]
    # And they run
    await start_worker()
    for item in first[:30:10]:
        assert state(await front.end(item.accepted.job.job_id)) == "SUCCEEDED"


async def test_what_finds_no_room_in_a_batch_is_refused_alone(redis_url: str) -> None:
    async with serve(queue_settings(redis_url, max_depth=3)) as front:
        requests = [pb.SubmitJobRequest(work=detect(b"ok")) for _ in range(5)]
        items = (await front.stub.BatchSubmitJobs(pb.BatchSubmitJobsRequest(requests=requests))).items
        assert [item.WhichOneof("outcome") for item in items] == ["accepted"] * 3 + ["error"] * 2
        assert items[-1].error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


@pytest.mark.parametrize("count", [0, 1001])
async def test_a_batch_has_a_size(front: Front, count: int) -> None:
    request = pb.BatchSubmitJobsRequest(requests=[pb.SubmitJobRequest()] * count)
    code, _, details = await refusal(front.stub.BatchSubmitJobs(request))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "requests"


# ---- another try


async def test_a_failed_job_is_tried_again_by_hand(front: Front, start_worker, vision: FakeVision) -> None:
    # Given a job whose two attempts have failed
    await start_worker()
    vision.always = error(Code.INTERNAL, "INTERNAL")
    job = await front.submit(b"ok", max_attempts=2)
    failed = await front.end(job.job_id)
    assert (state(failed), failed.attempt_count) == ("FAILED", 2)
    # When the cause is gone and someone asks for another try
    vision.always = None
    again = (await front.stub.RetryJob(pb.RetryJobRequest(job_id=job.job_id))).job
    assert state(again) in ("QUEUED", "RUNNING", "SUCCEEDED") and again.revision > failed.revision
    ended = (await front.watch(job.job_id, failed.revision))[-1].job
    # Then it runs with all its attempts before it, and still tells of the first two
    assert state(ended) == "SUCCEEDED" and ended.WhichOneof("outcome") == "result"
    assert ended.attempt_count == 3 and [bool(attempt.error.code) for attempt in ended.attempts] == [True, True, False]
    assert ended.end_time.ToMilliseconds() > failed.end_time.ToMilliseconds()
    # And its history is whole: every state once and in order
    states = [state(change.job) for change in await front.watch(job.job_id)]
    assert states[0] == "QUEUED" and states.count("FAILED") == 1 and states[-1] == "SUCCEEDED"
    seen = await stats(front)
    assert (seen.failed, seen.depth, seen.size_bytes) == (0, 0, 0)


async def test_cancelled_and_expired_jobs_are_tried_again_too(front: Front, start_worker, redis_client) -> None:
    cancelled = await front.submit(b"ok")
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=cancelled.job_id))
    expired = await front.submit(b"ok", deadline=stamp(time.time() + 3600))
    let_pass(redis_client, keys.DEADLINES, expired.job_id)
    await front.until(expired.job_id, lambda job: state(job) == "EXPIRED")
    await start_worker()
    for job in (cancelled, expired):
        await front.stub.RetryJob(pb.RetryJobRequest(job_id=job.job_id))
        ended = await front.until(job.job_id, lambda job: state(job) == "SUCCEEDED")
        assert not ended.cancel_requested and not ended.HasField("deadline")


async def test_only_an_ended_unsuccessful_job_is_tried_again(front: Front, start_worker) -> None:
    job = await front.submit(b"ok")
    for wanted in ("QUEUED", "SUCCEEDED"):
        code, reason, details = await refusal(front.stub.RetryJob(pb.RetryJobRequest(job_id=job.job_id)))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
        assert details["ErrorInfo"].metadata["state"] == wanted
        if wanted == "QUEUED":
            await start_worker()
            await front.end(job.job_id)
    code, reason, _ = await refusal(front.stub.RetryJob(pb.RetryJobRequest(job_id="0" * 32)))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")


async def test_another_try_needs_its_images(front: Front, redis_client: redis.Redis) -> None:
    job = await front.submit(b"ok")
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    (media_id,) = redis_client.smembers(keys.job(job.job_id) + ":media")
    assert 0 < redis_client.ttl(keys.media(media_id.decode())) <= 24 * 3600
    redis_client.delete(keys.media(media_id.decode()))
    code, reason, _ = await refusal(front.stub.RetryJob(pb.RetryJobRequest(job_id=job.job_id)))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND")
    assert state(await front.get(job.job_id)) == "CANCELLED"
