"""Reads the contract's requests and writes its messages; protobuf goes no further into the server than here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from ai4thai.queue.v1 import job_pb2, queue_service_pb2, work_pb2
from ai4thai.vision.v1 import generation_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from queue_server.errors import InvalidField, JobNotFound
from queue_server.jobs import Attempt, Job, JobFilter, JobState, Priority, Submission, Webhook
from queue_server.settings import QueueSettings
from queue_server.statistics import QueueCounts, WorkerRecord
from serving.errors import not_served_yet

MAX_REQUEST_ID = 128
MAX_LABELS = 32
MAX_LABEL = 128
MAX_IMAGES = 1000
MAX_ATTEMPTS = 20
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 500
# Ten years: beyond it a time is a slip of units rather than a plan.
MAX_AHEAD_MS = 10 * 366 * 24 * 3600 * 1000

_QUEUE_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_JOB_ID = re.compile(r"[0-9a-f]{32}")
_MEDIA_ID = re.compile(r"sha256:[0-9a-f]{64}")

_PRIORITIES = {
    job_pb2.PRIORITY_UNSPECIFIED: Priority.STANDARD,
    job_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    job_pb2.PRIORITY_STANDARD: Priority.STANDARD,
    job_pb2.PRIORITY_BATCH: Priority.BATCH,
}


# ---- requests


def read_submission(request: queue_service_pb2.SubmitJobRequest, job_id: str, settings: QueueSettings) -> Submission:
    """Checks a submission and takes its images out of it. Hashes them: not for the event loop when they are large.

    Raises:
        InvalidField, and NOT_SERVED_YET for video.
    """
    size_bytes = request.ByteSize()
    if size_bytes > settings.max_request_bytes:
        raise InvalidField(
            "work",
            f"The submission has {size_bytes} bytes; the limit is {settings.max_request_bytes}.",
            cure="Send fewer images in one job, or raise QUEUE_MAX_REQUEST_BYTES.",
            size_bytes=size_bytes,
            limit_bytes=settings.max_request_bytes,
        )
    if len(request.request_id) > MAX_REQUEST_ID:
        raise InvalidField("request_id", f"request_id has {len(request.request_id)} characters; the limit is 128.")
    if request.priority not in _PRIORITIES:
        raise InvalidField("priority", f"There is no priority {request.priority}.", cure="Send 0 to 3.")
    if not 0 <= request.max_attempts <= MAX_ATTEMPTS:
        raise InvalidField(
            "max_attempts", f"max_attempts is {request.max_attempts}; it must be 1 to 20, or 0 for the default."
        )
    not_before_ms = _read_time(request, "not_before_time")
    deadline_ms = _read_time(request, "deadline")
    if deadline_ms and deadline_ms <= not_before_ms:
        raise InvalidField("deadline", "The deadline is not after not_before_time: the job could never run.")
    kind, work, blobs, item_count = _read_work(request.work, settings.max_image_bytes)
    # The same images, sent as bytes or by id, are the same request.
    bare = queue_service_pb2.SubmitJobRequest()
    bare.CopyFrom(_without_work(request))
    bare.work.CopyFrom(work)
    bare.request_id = ""
    return Submission(
        job_id=job_id,
        request_id=request.request_id,
        fingerprint=hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest(),
        queue=read_queue(request.queue, "queue") or "default",
        priority=_PRIORITIES[request.priority],
        not_before_ms=not_before_ms,
        deadline_ms=deadline_ms,
        max_attempts=request.max_attempts,
        labels=_read_labels(request),
        kind=kind,
        item_count=item_count,
        work=work.SerializeToString(),
        blobs=blobs,
        media_ids=tuple(dict.fromkeys(source.media_id for source in _sources(work))),
    )


def read_job_id(value: str) -> str:
    """A job's id as it was sent.

    Raises:
        InvalidField: it is empty.
        JobNotFound: it could not be one.
    """
    if not value:
        raise InvalidField("job_id", "job_id is empty.", cure="Send the id that SubmitJob answered.")
    if not _JOB_ID.fullmatch(value):
        raise JobNotFound(job_id=value)  # it could not be one, and must not become part of a key
    return value


def read_queue(value: str, field: str) -> str:
    """The name of a queue, empty when none was sent; raises InvalidField."""
    if value and not _QUEUE_NAME.fullmatch(value):
        raise InvalidField(field, f"The queue name {value[:80]!r} is not 1 to 64 characters of a-z 0-9 - _.")
    return value


def read_list(request: queue_service_pb2.ListJobsRequest) -> tuple[JobFilter, int, str]:
    """The filter, the page size and the cursor of a list; raises InvalidField."""
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        raise InvalidField("page_size", f"page_size is {request.page_size}; it must be 1 to 500, or 0 for 50.")
    if request.page_token and not _JOB_ID.fullmatch(request.page_token):
        raise InvalidField("page_token", "The page_token is none of ours.", cure="Send next_page_token as it came.")
    states = []
    for number in request.states:
        if number == job_pb2.JOB_STATE_UNSPECIFIED:
            continue
        if number not in job_pb2.JobState.values():
            raise InvalidField("states", f"There is no state {number}.")
        states.append(JobState(job_pb2.JobState.Name(number).removeprefix("JOB_STATE_")))
    wanted = JobFilter(frozenset(states), read_queue(request.queue, "queue"), request.kind, request.label)
    return wanted, request.page_size or DEFAULT_PAGE_SIZE, request.page_token


def _read_time(request: queue_service_pb2.SubmitJobRequest, field: str) -> int:
    """Milliseconds since 1970, 0 when the field is absent."""
    if not request.HasField(field):  # type: ignore[arg-type]  # the stub wants literals
        return 0
    stamp: Timestamp = getattr(request, field)
    now = Timestamp()
    now.GetCurrentTime()
    if stamp.seconds <= 0 or stamp.seconds * 1000 > now.ToMilliseconds() + MAX_AHEAD_MS:
        raise InvalidField(field, f"{field} is {stamp.seconds} s since 1970, which is no time within ten years.")
    return stamp.ToMilliseconds()


def _read_labels(request: queue_service_pb2.SubmitJobRequest) -> dict[str, str]:
    if len(request.labels) > MAX_LABELS:
        raise InvalidField("labels", f"There are {len(request.labels)} labels; the limit is 32.")
    for name, value in request.labels.items():
        if not name or "=" in name:
            raise InvalidField("labels", f"The label {name!r} is empty or has a `=` in its name.")
        if len(name) > MAX_LABEL or len(value) > MAX_LABEL:
            raise InvalidField("labels", f"The label {name[:40]!r} is longer than 128 characters.")
    return dict(request.labels)


def _read_work(work: work_pb2.Work, max_image_bytes: int) -> tuple[str, work_pb2.Work, dict[str, bytes], int]:
    """The kind, the work with ids in place of bytes, the images that came along, and how many items it has."""
    kind = work.WhichOneof("work")
    if kind is None:
        raise InvalidField("work", "work is not set.", cure="Set one of work.detect, work.generate, work.analyze.")
    if kind == "video":
        raise not_served_yet("VideoWork")
    blobs: dict[str, bytes] = {}
    light = work_pb2.Work()
    item_count = 1
    if kind == "generate":
        _read_conversation(work.generate, light.generate, blobs, max_image_bytes)
    else:
        asked = work.detect if kind == "detect" else work.analyze
        item_count = len(asked.images)
        if not 1 <= item_count <= MAX_IMAGES:
            raise InvalidField(f"work.{kind}.images", f"There are {item_count} images; it must be 1 to {MAX_IMAGES}.")
        if kind == "analyze" and not work.analyze.question.strip():
            raise InvalidField("work.analyze.question", "The question is empty.")
        target = light.detect.images if kind == "detect" else light.analyze.images
        for index, source in enumerate(asked.images):
            target.append(_read_source(source, f"work.{kind}.images[{index}]", blobs, max_image_bytes))
        if kind == "detect":
            if work.detect.HasField("options"):
                light.detect.options.CopyFrom(work.detect.options)
        else:
            light.analyze.question, light.analyze.model = work.analyze.question, work.analyze.model
            if work.analyze.HasField("detect_options"):
                light.analyze.detect_options.CopyFrom(work.analyze.detect_options)
            if work.analyze.HasField("generate_options"):
                light.analyze.generate_options.CopyFrom(work.analyze.generate_options)
    return kind, light, blobs, item_count


def _read_conversation(
    asked: work_pb2.GenerateWork, light: work_pb2.GenerateWork, blobs: dict[str, bytes], max_image_bytes: int
) -> None:
    if not asked.messages:
        raise InvalidField("work.generate.messages", "There are no messages.")
    if asked.messages[-1].role != generation_pb2.ROLE_USER:
        raise InvalidField("work.generate.messages", "The last message is not the user's.")
    light.model = asked.model
    if asked.HasField("options"):
        light.options.CopyFrom(asked.options)
    for number, message in enumerate(asked.messages):
        path = f"work.generate.messages[{number}]"
        if message.role == generation_pb2.ROLE_UNSPECIFIED:
            raise InvalidField(f"{path}.role", "The role is not set.", cure="Send ROLE_USER for the person who asks.")
        if not message.parts:
            raise InvalidField(f"{path}.parts", "The message has no parts.")
        turn = light.messages.add(role=message.role)
        for index, part in enumerate(message.parts):
            match part.WhichOneof("part"):
                case "text":
                    turn.parts.add(text=part.text)
                case "image":
                    source = _read_source(part.image, f"{path}.parts[{index}].image", blobs, max_image_bytes)
                    turn.parts.add(image=source)
                case _:
                    raise InvalidField(f"{path}.parts[{index}]", "Neither text nor image is set.")


def _read_source(
    source: work_pb2.MediaSource, path: str, blobs: dict[str, bytes], max_image_bytes: int
) -> work_pb2.MediaSource:
    """The same image by its id; its bytes, if they came along, go into `blobs`."""
    if source.WhichOneof("source") == "media_id":
        if not _MEDIA_ID.fullmatch(source.media_id):
            raise InvalidField(
                f"{path}.media_id",
                f"{source.media_id[:80]!r} is no media id.",
                cure="It is `sha256:` and 64 hex digits.",
            )
        return work_pb2.MediaSource(media_id=source.media_id)
    if not source.content:
        raise InvalidField(path, "The image is empty: neither content nor media_id is set.")
    if len(source.content) > max_image_bytes:
        raise InvalidField(
            f"{path}.content",
            f"The image has {len(source.content)} bytes; the limit is {max_image_bytes}.",
            cure="Send a smaller one, or raise QUEUE_MAX_IMAGE_BYTES.",
            size_bytes=len(source.content),
            limit_bytes=max_image_bytes,
        )
    media_id = "sha256:" + hashlib.sha256(source.content).hexdigest()
    blobs[media_id] = source.content
    return work_pb2.MediaSource(media_id=media_id)


def _sources(work: work_pb2.Work) -> Iterable[work_pb2.MediaSource]:
    yield from work.detect.images
    yield from work.analyze.images
    for message in work.generate.messages:
        for part in message.parts:
            if part.WhichOneof("part") == "image":
                yield part.image


def _without_work(request: queue_service_pb2.SubmitJobRequest) -> queue_service_pb2.SubmitJobRequest:
    """A copy that leaves the images where they are."""
    bare = queue_service_pb2.SubmitJobRequest(
        queue=request.queue, priority=request.priority, max_attempts=request.max_attempts, labels=request.labels
    )
    if request.HasField("not_before_time"):
        bare.not_before_time.CopyFrom(request.not_before_time)
    if request.HasField("deadline"):
        bare.deadline.CopyFrom(request.deadline)
    return bare


# ---- responses


def write_job(job: Job, result: bytes | None = None) -> job_pb2.Job:
    """A job; `result` is its serialised JobResult."""
    message = job_pb2.Job(
        job_id=job.job_id,
        kind=job.kind,
        state=job_pb2.JobState.Value(f"JOB_STATE_{job.state.value}"),
        queue=job.queue,
        priority=job_pb2.Priority.Value(f"PRIORITY_{job.priority.name}"),
        labels=job.labels,
        progress=job_pb2.Progress(
            completed_count=job.progress.completed_count,
            total_count=job.progress.total_count,
            message=job.progress.message,
        ),
        attempt_count=job.attempt,
        max_attempts=job.max_attempts,
        attempts=[_write_attempt(attempt) for attempt in job.attempts],
        create_time=_time(job.create_ms),
        not_before_time=_time(job.not_before_ms),
        start_time=_time(job.start_ms),
        end_time=_time(job.end_ms),
        expire_time=_time(job.expire_ms),
        revision=job.revision,
        cancel_requested=job.cancel_requested,
        deadline=_time(job.deadline_ms),
        client=job.client,
        held=job.held,
        webhook=_write_webhook(job.webhook),
    )
    if job.error:
        message.error.ParseFromString(job.error)
    elif result is not None:
        message.result.ParseFromString(result)
    return message


def write_queue(counts: QueueCounts) -> queue_service_pb2.QueueStats:
    """The counts of one queue."""
    return queue_service_pb2.QueueStats(
        queue=counts.queue,
        depth=counts.depth,
        scheduled=counts.scheduled,
        running=counts.running,
        failed=counts.failed,
        backlog=counts.depth + counts.running,
        oldest_age=_duration(counts.oldest_age_s),
        throughput_per_second=counts.throughput_per_s,
        latency_p50=_duration(counts.latency_p50_s),
        latency_p95=_duration(counts.latency_p95_s),
    )


def write_worker(worker: WorkerRecord) -> queue_service_pb2.Worker:
    """A worker process."""
    return queue_service_pb2.Worker(
        worker=worker.name,
        concurrency=worker.concurrency,
        job_ids=worker.job_ids,
        start_time=_time(worker.start_ms),
        seen_time=_time(worker.seen_ms),
        ended_count=worker.ended_count,
    )


def _write_webhook(webhook: Webhook | None) -> job_pb2.WebhookDelivery | None:
    if webhook is None:
        return None
    message = job_pb2.WebhookDelivery(
        url=webhook.url, attempt_count=webhook.attempt_count, deliver_time=_time(webhook.deliver_ms)
    )
    if webhook.error:
        message.error.ParseFromString(webhook.error)
    return message


def _write_attempt(attempt: Attempt) -> job_pb2.JobAttempt:
    message = job_pb2.JobAttempt(
        number=attempt.number,
        start_time=_time(attempt.start_ms),
        end_time=_time(attempt.end_ms),
        worker=attempt.worker,
    )
    if attempt.error:
        message.error.ParseFromString(attempt.error)
    return message


def _time(unix_ms: int) -> Timestamp | None:
    if not unix_ms:
        return None
    stamp = Timestamp()
    stamp.FromMilliseconds(unix_ms)
    return stamp


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration
