"""Servers with the real services' shape and scripted answers, on real sockets."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
from ai4thai.queue.v1 import job_pb2, queue_service_pb2, queue_service_pb2_grpc, work_pb2
from ai4thai.vision.v1 import (
    detection_pb2,
    device_service_pb2,
    device_service_pb2_grpc,
    generation_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    vision_service_pb2,
    vision_service_pb2_grpc,
)
from google.protobuf.duration_pb2 import Duration
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from serving.errors import Code, ServiceError
from serving.status import to_status
from tests.clients.fake_media import FakeMedia

BROKEN = b"this is no image"
UNREADABLE = ServiceError(
    Code.INVALID_ARGUMENT, "IMAGE_UNREADABLE", "The 16 bytes are no image.", cure="Send a JPEG.", field="image.content"
)


class Script:
    """What the next calls of a method fail with, before it answers; and what was asked so far."""

    def __init__(self, domain: str) -> None:
        self._domain = domain
        self.failures: dict[str, deque[ServiceError | grpc.StatusCode]] = {}
        self.calls: list[str] = []
        self.requests: dict[str, Any] = {}

    def fail_next(self, method: str, *failures: ServiceError | grpc.StatusCode) -> None:
        self.failures.setdefault(method, deque()).extend(failures)

    def begin(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls.append(method)
        self.requests[method] = request
        waiting = self.failures.get(method)
        if waiting:
            failure = waiting.popleft()
            if isinstance(failure, ServiceError):
                self.refuse(context, failure)
            context.abort(failure, "said plainly")

    def refuse(self, context: Any, error: ServiceError) -> NoReturn:
        status = rpc_status.to_status(to_status(error, self._domain))
        trailers = (*status.trailing_metadata, ("x-request-id", "call-7"))
        context.abort_with_status(status._replace(trailing_metadata=trailers))
        raise AssertionError("abort raises")


def detection(name: str = "star") -> vision_service_pb2.DetectResponse:
    box = detection_pb2.Box(x_min_px=10, y_min_px=20, x_max_px=50, y_max_px=80)
    return vision_service_pb2.DetectResponse(
        model="fake-detector",
        model_version="1",
        width_px=320,
        height_px=240,
        detections=[detection_pb2.Detection(label=name, class_id=3, confidence=0.75, box=box)],
        timings=detection_pb2.Timings(total_ms=12.5, batch_size=1),
    )


def summary(text: str) -> vision_service_pb2.GenerateSummary:
    return vision_service_pb2.GenerateSummary(
        text=text,
        finish_reason=generation_pb2.FINISH_REASON_STOP,
        usage=generation_pb2.Usage(prompt_tokens=9, image_tokens=4, completion_tokens=3),
        model="fake-describer",
    )


class FakeVision(
    vision_service_pb2_grpc.VisionServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
    device_service_pb2_grpc.DeviceServiceServicer,
):
    """Finds a star in everything; answers in Thai, piece by piece, for ever when asked `forever`."""

    pieces = ("มี", "ดาว", "หนึ่ง", "ดวง")

    def __init__(self) -> None:
        self.script = Script("vision.ai4thai")
        self.left = threading.Event()  # a generation noticed that its caller has gone
        self.found: list[detection_pb2.Detection] = []  # what Detect finds instead of its star

    def Detect(self, request: vision_service_pb2.DetectRequest, context: Any) -> vision_service_pb2.DetectResponse:
        self.script.begin("Detect", request, context)
        if request.image.content == BROKEN:
            context.abort_with_status(rpc_status.to_status(to_status(UNREADABLE, "vision.ai4thai")))
        answer = detection()
        if self.found:
            del answer.detections[:]
            answer.detections.extend(self.found)
        if request.options.annotate:
            answer.annotated_image = b"\xff\xd8 drawn"
        return answer

    def DetectStream(self, requests: Any, context: Any) -> Iterator[vision_service_pb2.DetectStreamResponse]:
        config = next(requests).config
        self.script.begin("DetectStream", config, context)
        received = errors = 0
        for message in requests:
            received += 1
            result = vision_service_pb2.FrameResult(frame_id=message.frame.frame_id)
            if message.frame.image.content == BROKEN:
                errors += 1
                result.error.CopyFrom(to_status(UNREADABLE, "vision.ai4thai"))
            else:
                result.detection.CopyFrom(detection())
            yield vision_service_pb2.DetectStreamResponse(result=result)
        yield vision_service_pb2.DetectStreamResponse(
            summary=vision_service_pb2.StreamSummary(
                received_count=received,
                detected_count=received - errors,
                error_count=errors,
                duration=Duration(seconds=1),
            )
        )

    def Generate(
        self, request: vision_service_pb2.GenerateRequest, context: Any
    ) -> Iterator[vision_service_pb2.GenerateResponse]:
        self.script.begin("Generate", request, context)
        context.add_callback(self.left.set)
        question = request.messages[-1].parts[-1].text
        if question == "abrupt":
            yield vision_service_pb2.GenerateResponse(delta=vision_service_pb2.GenerateDelta(text="half"))
            return
        while question == "forever" and context.is_active():
            yield vision_service_pb2.GenerateResponse(delta=vision_service_pb2.GenerateDelta(text="more "))
        for piece in self.pieces:
            yield vision_service_pb2.GenerateResponse(delta=vision_service_pb2.GenerateDelta(text=piece))
        yield vision_service_pb2.GenerateResponse(summary=summary("".join(self.pieces)))

    def Analyze(self, request: vision_service_pb2.AnalyzeRequest, context: Any) -> vision_service_pb2.AnalyzeResponse:
        self.script.begin("Analyze", request, context)
        return vision_service_pb2.AnalyzeResponse(
            detection=detection(), text="One star.", finish_reason=generation_pb2.FINISH_REASON_LENGTH
        )

    def GetServerInfo(self, request: Any, context: Any) -> vision_service_pb2.GetServerInfoResponse:
        self.script.begin("GetServerInfo", request, context)
        return vision_service_pb2.GetServerInfoResponse(
            version="9.9", device="cpu", ready=True, models=[_model()], capabilities=["detect"]
        )

    def ListModels(self, request: Any, context: Any) -> model_service_pb2.ListModelsResponse:
        self.script.begin("ListModels", request, context)
        return model_service_pb2.ListModelsResponse(models=[_model()])

    def ListDevices(self, request: Any, context: Any) -> device_service_pb2.ListDevicesResponse:
        self.script.begin("ListDevices", request, context)
        return device_service_pb2.ListDevicesResponse(
            devices=[device_service_pb2.Device(name="A fake CPU", kind="cpu", memory_total_bytes=2**34)]
        )


def _model() -> model_service_pb2.Model:
    return model_service_pb2.Model(
        name="fake-detector",
        task=model_service_pb2.TASK_DETECT,
        state=model_service_pb2.MODEL_STATE_READY,
        labels=["star"],
        load_progress=1,
        is_default=True,
    )


class FakeQueue(FakeMedia, queue_service_pb2_grpc.QueueServiceServicer):
    """Keeps jobs that run as soon as they are watched: QUEUED, RUNNING, SUCCEEDED; one named `slow…` keeps running."""

    def __init__(self) -> None:
        super().__init__()
        self.script = Script("queue.ai4thai")
        self.jobs: dict[str, job_pb2.Job] = {}
        self.by_request: dict[str, str] = {}
        self.batch_sizes: list[int] = []
        self.paused: set[str] = set()
        self.lose_after_store = 0  # so many submissions are stored, but their answer is lost
        self.break_watch_at: deque[int] = deque()  # a watch breaks off after having sent this revision

    def SubmitJob(self, request: Any, context: Any) -> queue_service_pb2.SubmitJobResponse:
        self.script.begin("SubmitJob", request, context)
        return self._submit(request, context)

    def BatchSubmitJobs(self, request: Any, context: Any) -> queue_service_pb2.BatchSubmitJobsResponse:
        self.script.begin("BatchSubmitJobs", request, context)
        self.batch_sizes.append(len(request.requests))
        items = [
            queue_service_pb2.BatchSubmitJobsItem(error=to_status(UNREADABLE, "queue.ai4thai"))
            if one.labels.get("refuse")
            else queue_service_pb2.BatchSubmitJobsItem(accepted=self._submit(one, context))
            for one in request.requests
        ]
        return queue_service_pb2.BatchSubmitJobsResponse(items=items)

    def _submit(self, request: Any, context: Any) -> queue_service_pb2.SubmitJobResponse:
        known = self.by_request.get(request.request_id)
        if known is None:
            name = "slow" if request.labels.get("pace") == "slow" else "job"
            known = f"{name}-{len(self.jobs) + 1}"
            self.jobs[known] = job_pb2.Job(
                job_id=known,
                kind=request.work.WhichOneof("work"),
                state=job_pb2.JOB_STATE_QUEUED,
                queue=request.queue or "default",
                labels=request.labels,
                client=request.client,
                held=(request.queue or "default") in self.paused,
                revision=1,
                max_attempts=3,
            )
            self.by_request[request.request_id] = known
            if self.lose_after_store:
                self.lose_after_store -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
            return queue_service_pb2.SubmitJobResponse(job=self.jobs[known], created=True)
        return queue_service_pb2.SubmitJobResponse(job=self.jobs[known], created=False)

    def GetJob(self, request: Any, context: Any) -> queue_service_pb2.GetJobResponse:
        self.script.begin("GetJob", request, context)
        return queue_service_pb2.GetJobResponse(job=self._job(request.job_id, context))

    def ListJobs(self, request: Any, context: Any) -> queue_service_pb2.ListJobsResponse:
        self.script.begin("ListJobs", request, context)
        jobs = [
            job
            for job in reversed(self.jobs.values())
            if (not request.states or job.state in request.states) and request.client in ("", job.client)
        ]
        begin, size = int(request.page_token or 0), request.page_size or 50
        more = str(begin + size) if begin + size < len(jobs) else ""
        return queue_service_pb2.ListJobsResponse(jobs=jobs[begin : begin + size], next_page_token=more)

    def WatchJob(self, request: Any, context: Any) -> Iterator[queue_service_pb2.WatchJobResponse]:
        self.script.begin("WatchJob", request, context)
        job = self._job(request.job_id, context)
        for revision in range(max(1, request.after_revision), 5):
            self._advance(job, revision)
            yield queue_service_pb2.WatchJobResponse(job=job, revision=revision)
            if self.break_watch_at and self.break_watch_at[0] == revision:
                self.break_watch_at.popleft()
                context.abort(grpc.StatusCode.UNAVAILABLE, "broke off")
            while job.job_id.startswith("slow") and revision == 2 and job.state == job_pb2.JOB_STATE_RUNNING:
                if not context.is_active():
                    return
                threading.Event().wait(0.01)
            if request.after_revision < revision and job.state == job_pb2.JOB_STATE_CANCELLED:
                yield queue_service_pb2.WatchJobResponse(job=job, revision=job.revision)
                return

    def CancelJob(self, request: Any, context: Any) -> queue_service_pb2.CancelJobResponse:
        self.script.begin("CancelJob", request, context)
        job = self._job(request.job_id, context)
        job.state = job_pb2.JOB_STATE_CANCELLED
        job.revision += 1
        return queue_service_pb2.CancelJobResponse(job=job)

    def RetryJob(self, request: Any, context: Any) -> queue_service_pb2.RetryJobResponse:
        self.script.begin("RetryJob", request, context)
        job = self._job(request.job_id, context)
        if job.state != job_pb2.JOB_STATE_CANCELLED:
            self.script.refuse(context, ServiceError(Code.FAILED_PRECONDITION, "WRONG_STATE", "The job has succeeded."))
        job.state = job_pb2.JOB_STATE_QUEUED
        return queue_service_pb2.RetryJobResponse(job=job)

    def PauseQueue(self, request: Any, context: Any) -> queue_service_pb2.PauseQueueResponse:
        self.script.begin("PauseQueue", request, context)
        self.paused.add(request.queue)
        return queue_service_pb2.PauseQueueResponse()

    def ResumeQueue(self, request: Any, context: Any) -> queue_service_pb2.ResumeQueueResponse:
        self.script.begin("ResumeQueue", request, context)
        self.paused.discard(request.queue)
        return queue_service_pb2.ResumeQueueResponse()

    def PurgeQueue(self, request: Any, context: Any) -> queue_service_pb2.PurgeQueueResponse:
        self.script.begin("PurgeQueue", request, context)
        waiting = [job for job in self.jobs.values() if job.state == job_pb2.JOB_STATE_QUEUED]
        for job in waiting:
            job.state = job_pb2.JOB_STATE_CANCELLED
        return queue_service_pb2.PurgeQueueResponse(cancelled_count=len(waiting))

    def DeleteJob(self, request: Any, context: Any) -> queue_service_pb2.DeleteJobResponse:
        self.script.begin("DeleteJob", request, context)
        del self.jobs[self._job(request.job_id, context).job_id]
        return queue_service_pb2.DeleteJobResponse()

    def GetQueueStats(self, request: Any, context: Any) -> queue_service_pb2.GetQueueStatsResponse:
        self.script.begin("GetQueueStats", request, context)
        return queue_service_pb2.GetQueueStatsResponse(
            queues=[
                queue_service_pb2.QueueStats(
                    queue="default",
                    depth=2,
                    backlog=2,
                    held=1,
                    size_bytes=3_000_000,
                    paused="default" in self.paused,
                    clients=[queue_service_pb2.ClientStats(client="team-a", waiting=2)],
                )
            ],
            worker_count=1,
        )

    def ListWorkers(self, request: Any, context: Any) -> queue_service_pb2.ListWorkersResponse:
        self.script.begin("ListWorkers", request, context)
        return queue_service_pb2.ListWorkersResponse(
            workers=[queue_service_pb2.Worker(worker="here-1", concurrency=8, job_ids=["job-1"])]
        )

    def _job(self, job_id: str, context: Any) -> job_pb2.Job:
        if job_id not in self.jobs:
            error = ServiceError(
                Code.NOT_FOUND, "JOB_NOT_FOUND", f"There is no job {job_id!r}.", metadata={"job_id": job_id}
            )
            context.abort_with_status(rpc_status.to_status(to_status(error, "queue.ai4thai")))
        return self.jobs[job_id]

    def _advance(self, job: job_pb2.Job, revision: int) -> None:
        if job.state not in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING):
            return
        job.revision = revision
        if revision >= 2:
            job.state = job_pb2.JOB_STATE_RUNNING
            job.attempt_count = 1
        if revision == 4:
            job.state = job_pb2.JOB_STATE_SUCCEEDED
            if job.kind == "video":
                job.result.video.CopyFrom(self._video_result())
            else:
                job.result.CopyFrom(_result(job.kind))

    def _video_result(self) -> work_pb2.VideoResult:
        return work_pb2.VideoResult(
            tracks_media_id=self.keep(b'{"frames": []}', "application/json"),
            annotated_media_id=self.keep(b"an MP4" * 100_000, "video/mp4"),
            frame_count=90,
            detected_frame_count=30,
            failed_frame_count=1,
            duration=Duration(seconds=3),
            width_px=640,
            height_px=360,
            tracks=[
                work_pb2.VideoTrack(
                    track_id=1,
                    label="ดาว",
                    first_time=Duration(nanos=500_000_000),
                    last_time=Duration(seconds=2),
                    frame_count=15,
                    max_confidence=0.9,
                )
            ],
        )


def _result(kind: str) -> work_pb2.JobResult:
    bad = to_status(UNREADABLE, "vision.ai4thai")
    if kind == "detect":
        items = [work_pb2.DetectResultItem(detection=detection()), work_pb2.DetectResultItem(error=Status(code=3))]
        items[1].error.CopyFrom(bad)
        return work_pb2.JobResult(detect=work_pb2.DetectResult(items=items))
    if kind == "generate":
        return work_pb2.JobResult(generate=work_pb2.GenerateResult(summary=summary("One star.")))
    analysis = vision_service_pb2.AnalyzeResponse(detection=detection(), text="One star.")
    item = work_pb2.AnalyzeResultItem(analysis=analysis)
    return work_pb2.JobResult(analyze=work_pb2.AnalyzeResult(items=[item]))


class FakeServer:
    """A fake service on a free port, with grpc.health.v1; a context manager."""

    def __init__(self, fake: FakeVision | FakeQueue) -> None:
        self.fake = fake
        # Each watch, stream and health watch takes a thread of a sync server.
        limit = ("grpc.max_receive_message_length", 64 << 20)
        self.server = grpc.server(ThreadPoolExecutor(32), options=[limit])
        self.health = health.HealthServicer(experimental_non_blocking=True)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        if isinstance(fake, FakeVision):
            vision_service_pb2_grpc.add_VisionServiceServicer_to_server(fake, self.server)
            model_service_pb2_grpc.add_ModelServiceServicer_to_server(fake, self.server)
            device_service_pb2_grpc.add_DeviceServiceServicer_to_server(fake, self.server)
            self.report("ai4thai.vision.v1.VisionService", serving=True)
        else:
            queue_service_pb2_grpc.add_QueueServiceServicer_to_server(fake, self.server)
            self.report("ai4thai.queue.v1.QueueService", serving=True)
        self.report("", serving=True)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def report(self, service: str, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self.health.set(service, status)

    def __enter__(self) -> FakeServer:
        self.server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop(0).wait()
