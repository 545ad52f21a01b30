"""Jobs on the whole platform: what a job brings is what a direct call brings, whatever happens to its worker."""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from ai4thai.queue.v1 import job_pb2, work_pb2
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb
from ai4thai.vision.v1 import detection_pb2, generation_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb

from tests.end_to_end.calling import Server, detect_request, generate_request, refusal, refused
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.pictures import jpeg, unseen
from tests.end_to_end.slowing import slowed
from tests.processes import ServerProcess

pytestmark = pytest.mark.usefixtures("workers")

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_EXPIRED)
THAI = "อธิบายภาพนี้"


def contents(count: int) -> list[bytes]:
    """Small JPEGs of different scenes, over and over."""
    files = [jpeg(picture.fitted(320).image) for picture in unseen(8)]
    return [files[number % 8] for number in range(count)]


def detect_work(images: Sequence[bytes], **options: Any) -> work_pb2.Work:
    sources = [work_pb2.MediaSource(content=content) for content in images]
    return work_pb2.Work(detect=work_pb2.DetectWork(images=sources, options=detection_pb2.DetectOptions(**options)))


def generate_work(content: bytes, question: str, **options: Any) -> work_pb2.Work:
    parts = [
        work_pb2.WorkMessagePart(image=work_pb2.MediaSource(content=content)),
        work_pb2.WorkMessagePart(text=question),
    ]
    message = work_pb2.WorkMessage(role=generation_pb2.ROLE_USER, parts=parts)
    return work_pb2.Work(
        generate=work_pb2.GenerateWork(messages=[message], options=generation_pb2.GenerateOptions(**options))
    )


def submit(server: Server, work: work_pb2.Work, **fields: Any) -> job_pb2.Job:
    job: job_pb2.Job = server.queue.SubmitJob(queue_pb.SubmitJobRequest(work=work, **fields), timeout=20).job
    return job


def get(server: Server, job_id: str) -> job_pb2.Job:
    job: job_pb2.Job = server.queue.GetJob(queue_pb.GetJobRequest(job_id=job_id), timeout=10).job
    return job


def watch(queue: Server, job_id: str, timeout_s: float = 60) -> list[job_pb2.Job]:
    """Every state that the watch tells of, to the end."""
    request = queue_pb.WatchJobRequest(job_id=job_id)
    return [response.job for response in queue.queue.WatchJob(request, timeout=timeout_s)]


def ended(queue: Server, job_id: str) -> job_pb2.Job:
    return watch(queue, job_id)[-1]


def running(queue: Server, job_id: str, but: Callable[[job_pb2.Job], bool] = lambda job: True) -> job_pb2.Job:
    """The job once it runs and `but` holds."""
    request = queue_pb.WatchJobRequest(job_id=job_id)
    call = queue.queue.WatchJob(request, timeout=60)
    for response in call:
        if response.job.state == job_pb2.JOB_STATE_RUNNING and but(response.job):
            call.cancel()
            job: job_pb2.Job = response.job
            return job
        assert response.job.state not in ENDED, response.job
    raise AssertionError("the watch ended before the job ran")


def assert_same_detection(result: pb.DetectResponse, direct: pb.DetectResponse) -> None:
    """Equal in all but the times, and in the last digits that depend on which images share a forward pass."""
    assert len(result.detections) == len(direct.detections)
    expected = pb.DetectResponse()
    expected.CopyFrom(direct)
    expected.timings.CopyFrom(result.timings)
    for one, other in zip(result.detections, expected.detections, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-3)
        for edge in ("x_min_px", "y_min_px", "x_max_px", "y_max_px"):
            assert getattr(one.box, edge) == pytest.approx(getattr(other.box, edge), abs=0.1)
        other.confidence = one.confidence
        other.box.CopyFrom(one.box)
    assert result == expected


def test_a_detect_jobs_result_is_the_direct_calls(vision: Server, queue: Server) -> None:
    images = [*contents(12), b"not an image"]
    job = ended(queue, submit(queue, detect_work(images, min_confidence=0.4), labels={"from": "a test"}).job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert (job.kind, job.queue, dict(job.labels)) == ("detect", "default", {"from": "a test"})
    assert (job.progress.completed_count, job.progress.total_count) == (13, 13)
    assert (job.attempt_count, len(job.attempts)) == (1, 1)
    items = job.result.detect.items
    assert len(items) == 13
    for item, content in zip(items[:-1], images[:-1], strict=True):
        direct = vision.vision.Detect(detect_request(content, min_confidence=0.4))
        assert_same_detection(item.detection, direct)
    # One bad image is its own item's error, the same that a direct call gives.
    assert refusal(items[-1].error) == refused(lambda: vision.vision.Detect(detect_request(images[-1])))
    assert get(queue, job.job_id).result == job.result


def test_a_detect_jobs_options_and_pictures_survive_the_queue(vision: Server, queue: Server) -> None:
    options = {"annotate": True, "labels": ["star", "square"], "max_detections": 2, "masks": True}
    images = contents(3)
    job = ended(queue, submit(queue, detect_work(images, **options)).job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED
    for item, content in zip(job.result.detect.items, images, strict=True):
        direct = vision.vision.Detect(detect_request(content, **options))
        assert item.detection.annotated_image.startswith(b"\xff\xd8")
        item.detection.annotated_image = direct.annotated_image = b""  # confidences' last digits may be drawn
        assert_same_detection(item.detection, direct)


@pytest.mark.parametrize("question", [THAI, "What colour is the circle?"])
def test_a_generate_jobs_result_is_the_direct_calls(vision: Server, queue: Server, question: str) -> None:
    (content,) = contents(1)
    job = ended(queue, submit(queue, generate_work(content, question)).job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    *_, last = vision.vision.Generate(generate_request(content, question), timeout=60)
    summary = job.result.generate.summary
    last.summary.timings.CopyFrom(summary.timings)
    assert summary == last.summary
    assert summary.text


def test_an_analyze_jobs_result_is_the_direct_calls(vision: Server, queue: Server) -> None:
    images = contents(4)
    work = work_pb2.AnalyzeWork(images=[work_pb2.MediaSource(content=c) for c in images], question=THAI)
    job = ended(queue, submit(queue, work_pb2.Work(analyze=work)).job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    for item, content in zip(job.result.analyze.items, images, strict=True):
        request = pb.AnalyzeRequest(image=image_pb2.Image(content=content), question=THAI)
        direct = vision.vision.Analyze(request, timeout=60)
        assert_same_detection(item.analysis.detection, direct.detection)
        direct.timings.CopyFrom(item.analysis.timings)
        direct.detection.CopyFrom(item.analysis.detection)
        assert item.analysis == direct
        assert item.analysis.text


def test_a_watch_tells_every_change_once_and_in_order(vision: Server, queue: Server) -> None:
    with slowed(vision.process.pid, 4):
        job_id = submit(queue, detect_work(contents(40))).job_id
        jobs = watch(queue, job_id)
    revisions = [job.revision for job in jobs]
    assert revisions == list(range(revisions[0], revisions[0] + len(jobs)))
    states = [job.state for job in jobs]
    order = [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED]
    assert states == sorted(states, key=order.index)
    assert states[-1] == job_pb2.JOB_STATE_SUCCEEDED
    counts = [job.progress.completed_count for job in jobs]
    assert counts == sorted(counts)
    assert any(0 < count < 40 for count in counts)
    assert [job.HasField("result") for job in jobs] == [False] * (len(jobs) - 1) + [True]
    # From the middle on, and after the end.
    later = list(
        queue.queue.WatchJob(queue_pb.WatchJobRequest(job_id=job_id, after_revision=revisions[-2]), timeout=20)
    )
    assert later[-1].job.result == jobs[-1].result


def test_the_same_request_id_gives_the_same_job(queue: Server) -> None:
    request_id = uuid.uuid4().hex
    request = queue_pb.SubmitJobRequest(request_id=request_id, work=detect_work(contents(2)))
    first, second = queue.queue.SubmitJob(request), queue.queue.SubmitJob(request)
    assert (first.created, second.created) == (True, False)
    assert first.job.job_id == second.job.job_id
    ended(queue, first.job.job_id)
    third = queue.queue.SubmitJob(request)
    assert (third.created, third.job.state) == (False, job_pb2.JOB_STATE_SUCCEEDED)
    request.work.detect.options.max_detections = 7
    said = refused(lambda: queue.queue.SubmitJob(request))
    assert (said.code, said.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert said.domain == "queue.ai4thai"


def test_a_waiting_job_is_cancelled_at_once(queue: Server) -> None:
    later = queue_pb.SubmitJobRequest(work=detect_work(contents(1)))
    later.not_before_time.FromSeconds(int(time.time()) + 3600)
    job = queue.queue.SubmitJob(later).job
    assert job.state == job_pb2.JOB_STATE_SCHEDULED
    answer = queue.queue.CancelJob(queue_pb.CancelJobRequest(job_id=job.job_id)).job
    assert answer.state == job_pb2.JOB_STATE_CANCELLED
    assert [job.state for job in watch(queue, job.job_id)][-1] == job_pb2.JOB_STATE_CANCELLED
    queue.queue.DeleteJob(queue_pb.DeleteJobRequest(job_id=job.job_id))
    assert refused(lambda: get(queue, job.job_id)).reason == "JOB_NOT_FOUND"


def test_cancelling_a_running_job_reaches_the_model(vision: Server, queue: Server) -> None:
    with slowed(vision.process.pid, 10):
        job_id = submit(queue, detect_work(contents(400))).job_id
        running(queue, job_id)
        wait_until("the vision server works on it", lambda: vision.vision_calls_in_flight > 0)
        assert queue.queue.CancelJob(queue_pb.CancelJobRequest(job_id=job_id)).job.cancel_requested
        job = ended(queue, job_id)
        assert job.state == job_pb2.JOB_STATE_CANCELLED
        assert job.progress.completed_count < 400
        wait_until("the vision server is left alone", lambda: vision.vision_calls_in_flight == 0)
    assert not job.HasField("result")


def test_cancelling_a_generation_stops_it(vision: Server, queue: Server) -> None:
    with slowed(vision.process.pid, 20):
        job_id = submit(queue, generate_work(contents(1)[0], THAI)).job_id
        running(queue, job_id)
        queue.queue.CancelJob(queue_pb.CancelJobRequest(job_id=job_id))
        assert ended(queue, job_id).state == job_pb2.JOB_STATE_CANCELLED
        wait_until("the vision server is left alone", lambda: vision.vision_calls_in_flight == 0)


def test_a_job_that_cannot_succeed_fails_at_once(queue: Server) -> None:
    job = ended(queue, submit(queue, detect_work(contents(1), model="nobody"), max_attempts=5).job_id)
    assert (job.state, job.attempt_count) == (job_pb2.JOB_STATE_FAILED, 1)
    said = refusal(job.error)
    assert (said.code, said.reason, said.domain) == ("NOT_FOUND", "MODEL_NOT_FOUND", "vision.ai4thai")


def test_jobs_are_listed_and_counted(queue: Server) -> None:
    name = f"counted-{uuid.uuid4().hex[:8]}"
    ids = [submit(queue, detect_work(contents(1)), queue=name).job_id for _ in range(3)]
    for job_id in ids:
        assert ended(queue, job_id).state == job_pb2.JOB_STATE_SUCCEEDED
    listed = queue.queue.ListJobs(queue_pb.ListJobsRequest(queue=name))
    assert [job.job_id for job in listed.jobs] == ids[::-1]
    (stats,) = queue.queue.GetQueueStats(queue_pb.GetQueueStatsRequest(queue=name)).queues
    assert (stats.queue, stats.depth, stats.running, stats.backlog, stats.failed) == (name, 0, 0, 0, 0)
    assert stats.throughput_per_second > 0
    assert stats.latency_p50.ToMilliseconds() > 0


def test_a_job_whose_worker_is_killed_succeeds_once_on_another(
    vision: Server, queue: Server, workers: list[ServerProcess]
) -> None:
    count = 120
    images = contents(count)
    with slowed(vision.process.pid, 6):
        job_id = submit(queue, detect_work(images), labels={"fate": "killed"}).job_id
        first = running(queue, job_id, lambda job: job.progress.completed_count > 0)
        assert first.progress.completed_count < count
        (attempt,) = first.attempts
        (victim,) = [worker for worker in workers if f"-{worker.pid}-" in attempt.worker]
        victim.signal(signal.SIGKILL)
        victim.wait()
    jobs = watch(queue, job_id)
    job = jobs[-1]
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job
    assert [one.state for one in jobs].count(job_pb2.JOB_STATE_SUCCEEDED) == 1
    assert (job.attempt_count, len(job.attempts)) == (2, 2)
    lost, won = job.attempts
    assert (lost.number, won.number) == (1, 2)
    assert lost.worker == attempt.worker != won.worker
    assert refusal(lost.error).reason == "WORKER_LOST"
    assert not won.HasField("error")
    assert lost.start_time.ToMilliseconds() < lost.end_time.ToMilliseconds() <= won.start_time.ToMilliseconds()
    # The whole result, as if nothing had happened.
    direct = {content: vision.vision.Detect(detect_request(content)) for content in set(images)}
    assert len(job.result.detect.items) == count
    for item, content in zip(job.result.detect.items, images, strict=True):
        assert_same_detection(item.detection, direct[content])
    # Whoever was killed is missed by nobody: new jobs are done, and only the living are listed.
    assert ended(queue, submit(queue, detect_work(contents(1))).job_id).state == job_pb2.JOB_STATE_SUCCEEDED
    wait_until(
        "the dead worker is no longer listed",
        lambda: len(queue.queue.ListWorkers(queue_pb.ListWorkersRequest()).workers) == len(workers) - 1,
    )


def test_deleting_needs_an_end_and_watching_needs_a_job(queue: Server) -> None:
    waiting = queue_pb.SubmitJobRequest(work=detect_work(contents(1)))
    waiting.not_before_time.FromSeconds(int(time.time()) + 3600)
    job_id = queue.queue.SubmitJob(waiting).job.job_id
    said = refused(lambda: queue.queue.DeleteJob(queue_pb.DeleteJobRequest(job_id=job_id)))
    assert (said.code, said.reason) == ("FAILED_PRECONDITION", "WRONG_STATE")
    queue.queue.CancelJob(queue_pb.CancelJobRequest(job_id=job_id))
    for unknown in (uuid.uuid4().hex, "no id at all"):
        said = refused(partial(watch, queue, unknown))
        assert (said.code, said.reason) == ("NOT_FOUND", "JOB_NOT_FOUND")
