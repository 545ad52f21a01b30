"""A job of many images and a vision server without room: slower, but what is done is not done again; whose turn, whose trace."""

from __future__ import annotations

import asyncio
import time

import pytest
from ai4thai.queue.v1 import job_pb2, work_pb2
from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.vision.v1 import generation_pb2

from serving.errors import Code
from tests.queue_server.conftest import Front, state
from tests.queue_server.fake_vision import error
from tests.queue_server.videos import even, write_video

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def analyze(*images: bytes) -> work_pb2.Work:
    sources = [work_pb2.MediaSource(content=image) for image in images]
    return work_pb2.Work(analyze=work_pb2.AnalyzeWork(images=sources, question="What"))


async def test_a_server_with_room_for_two_does_two_hundred_images_in_one_attempt(
    front: Front, start_worker, vision
) -> None:
    # Given a server that turns away whoever is the third
    await start_worker(images_in_flight=4)
    vision.room, vision.takes_s = 2, 0.005
    images = [f"ok {number}".encode() for number in range(200)]
    # When a job sends four at once
    ended = await front.end((await front.submit(*images, max_attempts=1)).job_id, timeout_s=40)
    # Then it is done in one attempt, in order, each image once
    assert (state(ended), ended.attempt_count) == ("SUCCEEDED", 1)
    assert [item.detection.model.encode() for item in ended.result.detect.items] == images
    assert sorted(vision.answered) == sorted(images)
    refused_count = len(vision.calls) - len(images)
    assert 0 < refused_count < 100, "it was turned away and slowed down"


async def test_an_analysis_too_waits_for_room(front: Front, start_worker, vision) -> None:
    await start_worker(images_in_flight=2)
    vision.failures_after = {3: error(Code.UNAVAILABLE, "MODEL_LOADING", 0.2)}
    began_s = time.monotonic()
    ended = await front.end((await front.submit(work=analyze(*[b"ok"] * 6))).job_id)
    assert (state(ended), ended.attempt_count, len(ended.result.analyze.items)) == ("SUCCEEDED", 1, 6)
    assert len(vision.calls) == 7
    assert time.monotonic() - began_s > 0.2


async def test_a_job_that_waits_too_long_for_room_is_given_back_at_no_cost(front: Front, start_worker, vision) -> None:
    # Given a server that is full from the fourth image on, for longer than a job is patient
    await start_worker(images_in_flight=1, image_patience_s=0.4)
    vision.failures_after = {number: error(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.1) for number in range(3, 12)}
    job = await front.submit(*(f"ok {number}".encode() for number in range(6)), max_attempts=1)
    ended = await front.end(job.job_id)
    # Then the job, which has one attempt, is tried again until it is done
    assert state(ended) == "SUCCEEDED" and ended.attempt_count > 1
    assert [item.detection.model for item in ended.result.detect.items] == [f"ok {number}" for number in range(6)]


@pytest.mark.parametrize("stop", ["cancel", "worker stops"])
async def test_waiting_for_room_can_be_stopped(front: Front, start_worker, vision, stop: str) -> None:
    worker = await start_worker(images_in_flight=1)
    vision.failures_after = {1: error(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 60)}
    job = await front.submit(b"ok 1", b"ok 2", b"ok 3")
    await vision.wait_for_calls(2)
    asked_s = time.monotonic()
    if stop == "cancel":
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert state(await front.end(job.job_id)) == "CANCELLED"
    else:
        await asyncio.to_thread(worker.stop)
        assert state(await front.get(job.job_id)) == "QUEUED"
    assert time.monotonic() - asked_s < 10, "it was to wait for a minute"


@pytest.mark.parametrize("priority", ["INTERACTIVE", "STANDARD", "BATCH"])
async def test_every_call_carries_the_jobs_priority_and_trace(
    front: Front, start_worker, vision, tmp_path, priority: str
) -> None:
    await start_worker()
    conversation = work_pb2.Work()
    conversation.generate.messages.add(role=generation_pb2.ROLE_USER).parts.add(text="What")
    video = work_pb2.Work()
    video.video.video.content = write_video(tmp_path / "a.mp4", even(2))
    detection = work_pb2.Work()
    detection.detect.images.add(content=b"ok")
    for work in (detection, analyze(b"ok"), conversation, video):
        request = pb.SubmitJobRequest(work=work, priority=job_pb2.Priority.Value(f"PRIORITY_{priority}"))
        job = (await front.stub.SubmitJob(request, metadata=[("traceparent", TRACE)])).job
        assert state(await front.end(job.job_id)) == "SUCCEEDED"
    assert len(vision.metadata) == 4
    assert {call["x-priority"] for call in vision.metadata} == {priority.lower()}
    assert {call["traceparent"].split("-")[1] for call in vision.metadata} == {TRACE.split("-")[1]}
