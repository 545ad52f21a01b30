"""What becomes of a job whose attempt fails, whose time has not come, whose deadline passes, who is wanted sooner than others."""

from __future__ import annotations

import asyncio
import time

import pytest
from ai4thai.queue.v1 import job_pb2, work_pb2
from ai4thai.vision.v1 import generation_pb2
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from queue_server import keys
from serving.errors import Code
from tests.ports import free_port
from tests.queue_server.conftest import Front, let_pass, queue_settings, serve, state
from tests.queue_server.fake_vision import FakeVision, error
from tests.queue_server.test_submit import stamp


def reasons(status: Status) -> list[str]:
    found = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            found.append(info.reason)
    return found


async def test_a_fault_of_the_vision_server_is_tried_again(front: Front, start_worker, vision) -> None:
    # Given a vision server that fails twice
    await start_worker()
    vision.failures = [error(Code.INTERNAL, "INTERNAL"), error(Code.ABORTED, "INTERNAL")]
    ended = await front.end((await front.submit()).job_id)
    # Then the third attempt succeeds, and the record tells of all three
    assert state(ended) == "SUCCEEDED" and not ended.HasField("error")
    assert [reasons(attempt.error) for attempt in ended.attempts] == [["INTERNAL"], ["INTERNAL"], []]
    assert [attempt.number for attempt in ended.attempts] == [1, 2, 3]


async def test_a_job_fails_when_its_attempts_are_used_up(front: Front, start_worker, vision) -> None:
    await start_worker()
    vision.always = error(Code.INTERNAL, "INTERNAL")
    ended = await front.end((await front.submit(max_attempts=2)).job_id)
    assert state(ended) == "FAILED" and ended.attempt_count == 2
    assert ended.error.code == 13
    # The vision server's own words and details are kept, behind the reason that it was the last attempt
    assert reasons(ended.error) == ["ATTEMPTS_EXHAUSTED", "INTERNAL"]
    assert ended.error.message == "told to answer INTERNAL"
    assert ended.expire_time.ToSeconds() - ended.end_time.ToSeconds() == 7 * 24 * 3600


async def test_a_job_that_does_not_say_has_the_attempts_of_its_kind(redis_url: str) -> None:
    async with serve(queue_settings(redis_url, default_max_attempts=5, max_attempts_by_kind={"detect": 2})) as front:
        assert (await front.submit()).max_attempts == 2
        assert (await front.submit(max_attempts=7)).max_attempts == 7
        conversation = work_pb2.Work()
        conversation.generate.messages.add(role=generation_pb2.ROLE_USER).parts.add(text="What")
        assert (await front.submit(work=conversation)).max_attempts == 5
    with pytest.raises(ValueError, match="no kind of work 'detekt'"):
        queue_settings(redis_url, max_attempts_by_kind={"detekt": 2})


async def test_bad_input_fails_at_once(front: Front, start_worker, vision) -> None:
    await start_worker()
    vision.always = error(Code.NOT_FOUND, "MODEL_NOT_FOUND")
    ended = await front.end((await front.submit(b"ok 1", b"ok 2")).job_id)
    assert state(ended) == "FAILED" and ended.attempt_count == 1
    assert reasons(ended.error) == ["MODEL_NOT_FOUND"] == reasons(ended.attempts[0].error)


async def test_a_full_or_loading_vision_server_costs_no_attempt(front: Front, start_worker, vision) -> None:
    # Given a job with one attempt, and a vision server that says "later" four times
    await start_worker()
    vision.failures = [
        error(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.2),
        error(Code.UNAVAILABLE, "MODEL_LOADING", 0.2),
        error(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.2),
        error(Code.UNAVAILABLE, "DRAINING", 0.2),
    ]
    began_s = time.monotonic()
    ended = await front.end((await front.submit(max_attempts=1)).job_id)
    # Then it is tried until it succeeds, never sooner than it was told
    assert state(ended) == "SUCCEEDED"
    assert [reasons(attempt.error) for attempt in ended.attempts] == [
        ["QUEUE_FULL"],
        ["MODEL_LOADING"],
        ["QUEUE_FULL"],
        ["DRAINING"],
        [],
    ]
    assert time.monotonic() - began_s > 4 * 0.2


async def test_jobs_wait_while_the_vision_server_is_away(front: Front, start_worker) -> None:
    # Given no vision server at the address
    port = free_port()
    await start_worker(vision_address=f"127.0.0.1:{port}")
    jobs = [await front.submit(f"ok {number}".encode(), max_attempts=1) for number in range(3)]
    waiting = await front.until(jobs[0].job_id, lambda job: bool(job.attempts) and job.attempts[0].HasField("end_time"))
    assert reasons(waiting.attempts[0].error) == ["VISION_UNAVAILABLE"]
    # When it comes, then all are done, though none had an attempt to spare
    late = FakeVision()
    await asyncio.sleep(0.5)
    late.start(port)
    try:
        for job in jobs:
            assert state(await front.end(job.job_id)) == "SUCCEEDED"
    finally:
        late.stop()


async def test_a_connection_that_breaks_during_the_work_costs_an_attempt(front: Front, start_worker, vision) -> None:
    # Given a job at a vision server that dies of it
    await start_worker()
    job = await front.submit(b"slow", max_attempts=2)
    await vision.wait_for_calls(1)
    port = vision.port
    vision.break_off()
    failed = await front.until(job.job_id, lambda job: job.attempts[0].HasField("end_time"))
    assert reasons(failed.attempts[0].error) == ["VISION_UNAVAILABLE"]
    late = FakeVision()
    late.start(port)
    try:
        # Then the next breaks off too, and the job has used up its attempts
        await late.wait_for_calls(1)
        late.break_off()
        ended = await front.end(job.job_id)
    finally:
        late.stop()
    assert state(ended) == "FAILED"
    assert reasons(ended.error) == ["ATTEMPTS_EXHAUSTED", "VISION_UNAVAILABLE"]


async def test_a_job_is_not_run_before_its_time(front: Front, start_worker, vision) -> None:
    await start_worker()
    due_s = time.time() + 1.0
    job = await front.submit(not_before_time=stamp(due_s))
    assert state(job) == "SCHEDULED"
    ended = await front.end(job.job_id)
    assert state(ended) == "SUCCEEDED"
    assert ended.start_time.ToMilliseconds() >= round(due_s * 1000)
    # And one whose time has passed is run at once
    assert state(await front.submit(not_before_time=stamp(time.time() - 60))) == "QUEUED"


async def test_a_job_expires_when_its_deadline_passes_before_it_runs(
    front: Front, start_worker, vision, redis_client
) -> None:
    # Given nobody who works
    now_s = time.time()
    waiting = await front.submit(deadline=stamp(now_s + 3600))
    later = await front.submit(deadline=stamp(now_s + 3600), not_before_time=stamp(now_s + 1800))
    for job in (waiting, later):
        let_pass(redis_client, keys.DEADLINES, job.job_id)
        ended = await front.end(job.job_id)
        assert state(ended) == "EXPIRED" and ended.attempt_count == 0
        assert reasons(ended.error) == ["JOB_EXPIRED"]
    # And a worker that comes too late does not run them
    await start_worker()
    await front.end((await front.submit(b"ok after")).job_id)
    assert vision.calls == [b"ok after"]


async def test_a_deadline_does_not_stop_a_job_that_runs(front: Front, start_worker, vision, redis_client) -> None:
    await start_worker()
    job = await front.submit(b"slow", deadline=stamp(time.time() + 3600))
    await vision.wait_for_calls(1)
    # When it passes, as the job's record and the index of deadlines tell, and the sweeper comes round
    redis_client.hset(keys.job(job.job_id), "deadline_ms", 1)
    let_pass(redis_client, keys.DEADLINES, job.job_id)
    await asyncio.sleep(0.3)
    vision.release()
    assert state(await front.end(job.job_id)) == "SUCCEEDED"


async def test_the_interactive_ones_go_first(front: Front, start_worker, vision) -> None:
    # Given one worker thread that is busy, and jobs of each priority, the least urgent first
    await start_worker(worker_threads=1, images_in_flight=1)
    busy = await front.submit(b"slow busy")
    await vision.wait_for_calls(1)
    jobs = []
    for priority in (job_pb2.PRIORITY_BATCH, job_pb2.PRIORITY_UNSPECIFIED, job_pb2.PRIORITY_INTERACTIVE):
        for number in range(2):
            name = f"ok {job_pb2.Priority.Name(priority)} {number}"
            jobs.append(await front.submit(name.encode(), priority=priority))
    await asyncio.sleep(0.3)
    # When the thread is free
    vision.release()
    for job in (busy, *jobs):
        assert state(await front.end(job.job_id)) == "SUCCEEDED"
    # Then the interactive ones came first and the batch ones last
    kinds = [call.decode().split("_")[1].split()[0] for call in vision.calls[1:]]
    assert kinds == ["INTERACTIVE", "INTERACTIVE", "UNSPECIFIED", "UNSPECIFIED", "BATCH", "BATCH"]
