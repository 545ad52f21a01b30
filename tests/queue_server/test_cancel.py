"""Cancelling reaches a job wherever it is, down to the running call."""

from __future__ import annotations

import time

from ai4thai.queue.v1 import queue_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from queue_server.settings import WorkerSettings
from tests.queue_server.conftest import Front, state


async def cancel(front: Front, job_id: str):
    return (await front.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))).job


async def test_a_waiting_job_is_cancelled_at_once_and_never_run(front: Front, start_worker, vision) -> None:
    waiting = await front.submit(b"ok cancelled")
    later = await front.submit(b"ok cancelled", not_before_time=Timestamp(seconds=int(time.time()) + 60))
    for job in (waiting, later):
        cancelled = await cancel(front, job.job_id)
        assert state(cancelled) == "CANCELLED" and cancelled.cancel_requested and cancelled.attempt_count == 0
    await start_worker()
    after = await front.submit(b"ok after")
    assert state(await front.end(after.job_id)) == "SUCCEEDED"
    assert vision.calls == [b"ok after"]


async def test_cancelling_a_running_job_stops_its_calls_within_a_second(front: Front, start_worker, vision) -> None:
    # Given a job whose three images are at the vision server
    watch_s = WorkerSettings().watch_s
    await start_worker(images_in_flight=3, watch_s=watch_s)
    job = await front.submit(b"slow 1", b"slow 2", b"slow 3", b"slow 4")
    await vision.wait_for_calls(3)
    # When it is cancelled
    asked_s = time.monotonic()
    assert (await cancel(front, job.job_id)).cancel_requested
    ended = await front.end(job.job_id)
    # Then its calls are, and it is CANCELLED without an error
    assert state(ended) == "CANCELLED" and not ended.HasField("error")
    assert ended.attempts[0].HasField("end_time") and not ended.attempts[0].HasField("error")
    assert len(vision.cancelled_s) == 3
    # Within a second on a machine that has time for it: all that is waited for is a look, and nothing else ends these calls.
    assert watch_s <= 0.5 and max(vision.cancelled_s) - asked_s < 10
    assert len(vision.calls) == 3


async def test_cancelling_reaches_a_generation(front: Front, start_worker, vision) -> None:
    from ai4thai.queue.v1 import work_pb2

    await start_worker()
    work = work_pb2.Work()
    work.generate.messages.add(role=2).parts.add(image=work_pb2.MediaSource(content=b"slow"))
    job = await front.submit(work=work)
    await vision.wait_for_calls(1)
    await cancel(front, job.job_id)
    assert state(await front.end(job.job_id)) == "CANCELLED"
    assert len(vision.cancelled_s) == 1


async def test_cancelling_an_ended_job_changes_nothing(front: Front, start_worker) -> None:
    await start_worker()
    job = await front.submit()
    ended = await front.end(job.job_id)
    again = await cancel(front, job.job_id)
    assert (state(again), again.revision, again.cancel_requested) == ("SUCCEEDED", ended.revision, False)
