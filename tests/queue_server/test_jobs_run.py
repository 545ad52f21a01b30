"""A job goes in, its result comes out: each kind of work through the real server, broker and worker."""

from __future__ import annotations

from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import generation_pb2
from google.rpc import error_details_pb2

from tests.queue_server.conftest import Front, detect, state


async def test_detect_job_answers_each_image_in_order(front: Front, start_worker, vision) -> None:
    # Given a worker, when a job of five images is submitted, one of them broken
    await start_worker()
    images = [b"ok 1", b"ok 2", b"bad 3", b"ok 4", b"ok 5"]
    job = await front.submit(*images)
    assert state(job) in ("QUEUED", "RUNNING")
    ended = await front.end(job.job_id)
    # Then it has succeeded with an item for each, in order, and the broken one is its own item's error
    assert state(ended) == "SUCCEEDED"
    items = ended.result.detect.items
    assert [item.WhichOneof("outcome") for item in items] == [
        "detection",
        "detection",
        "error",
        "detection",
        "detection",
    ]
    assert [item.detection.model for item in items] == ["ok 1", "ok 2", "", "ok 4", "ok 5"]
    info = error_details_pb2.ErrorInfo()
    assert items[2].error.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("IMAGE_UNREADABLE", "vision.ai4thai")
    assert (ended.progress.completed_count, ended.progress.total_count) == (5, 5)
    assert ended.attempt_count == 1 and ended.attempts[0].worker and ended.attempts[0].HasField("end_time")
    # And the vision server's log can name the job
    assert set(vision.request_ids) == {f"{job.job_id}.1"}
    assert ended.end_time.ToMilliseconds() >= ended.start_time.ToMilliseconds() >= ended.create_time.ToMilliseconds()


async def test_images_of_a_job_are_sent_a_few_at_a_time(front: Front, start_worker, vision) -> None:
    await start_worker(images_in_flight=3)
    job = await front.submit(*(f"slow {number}".encode() for number in range(6)))
    await vision.wait_for_calls(3)
    vision.release()
    ended = await front.end(job.job_id)
    assert [item.detection.model for item in ended.result.detect.items] == [f"slow {number}" for number in range(6)]
    assert vision.most_in_flight == 3


async def test_generate_job_answers_the_conversation(front: Front, start_worker, vision) -> None:
    await start_worker()
    work = work_pb2.Work()
    message = work.generate.messages.add(role=generation_pb2.ROLE_USER)
    message.parts.add(text="นี่คืออะไร")
    message.parts.add(image=work_pb2.MediaSource(content=b"ok picture"))
    work.generate.options.max_new_tokens = 7
    ended = await front.end((await front.submit(work=work)).job_id)
    assert ended.result.generate.summary.text == "สวัสดี"
    asked = vision.prompts[0]
    assert [part.WhichOneof("part") for part in asked.messages[0].parts] == ["text", "image"]
    assert asked.messages[0].parts[1].image.content == b"ok picture"
    assert asked.options.max_new_tokens == 7


async def test_analyze_job_answers_the_question_for_each_image(front: Front, start_worker) -> None:
    await start_worker()
    work = work_pb2.Work(analyze=work_pb2.AnalyzeWork(question="What"))
    for image in (b"ok", b"bad", b"ok"):
        work.analyze.images.add(content=image)
    ended = await front.end((await front.submit(work=work)).job_id)
    assert state(ended) == "SUCCEEDED"
    assert [item.analysis.text for item in ended.result.analyze.items] == ["What: a circle", "", "What: a circle"]


async def test_an_image_stored_before_is_used_by_its_id(front: Front, start_worker) -> None:
    # Given an image that came with one job, when another names it
    await start_worker()
    first = await front.submit(b"ok stored")
    await front.end(first.job_id)
    media_id = "sha256:" + __import__("hashlib").sha256(b"ok stored").hexdigest()
    work = work_pb2.Work(detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(media_id=media_id)]))
    ended = await front.end((await front.submit(work=work)).job_id)
    # Then the worker finds it
    assert ended.result.detect.items[0].detection.model == "ok stored"


async def test_workers_and_their_jobs_are_listed(front: Front, start_worker, vision) -> None:
    worker = await start_worker(worker_threads=3)
    job = await front.submit(b"slow")
    await vision.wait_for_calls(1)
    worker.beat()
    workers = (await front.stub.ListWorkers(pb.ListWorkersRequest())).workers
    assert [(one.worker, one.concurrency, list(one.job_ids)) for one in workers] == [(worker.name, 3, [job.job_id])]
    stats = await front.stub.GetQueueStats(pb.GetQueueStatsRequest())
    assert stats.worker_count == 1
    assert [(one.queue, one.depth, one.running, one.backlog) for one in stats.queues] == [("default", 0, 1, 1)]
    vision.release()
    await front.end(job.job_id)


async def test_a_result_that_is_too_large_fails_the_job(front: Front, start_worker) -> None:
    await start_worker(max_result_bytes=1500)
    work = detect(b"ok 1", b"ok 2")
    work.detect.options.annotate = True
    ended = await front.end((await front.submit(work=work)).job_id)
    assert state(ended) == "FAILED"
    assert "limit is 1500" in ended.error.message
