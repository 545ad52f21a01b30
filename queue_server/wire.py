"""Reads the contract's requests and writes its messages; protobuf goes no further into the server than here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ai4thai.queue.v1 import job_pb2, queue_service_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from queue_server.addresses import AddressRefused, Guard
from queue_server.errors import InvalidField, JobNotFound
from queue_server.jobs import Attempt, Job, JobFilter, JobState, Priority, Submission, Webhook
from queue_server.settings import QueueSettings
from queue_server.statistics import QueueCounts, WorkerRecord
from queue_server.work import read_kind
from queue_server.work.files import Files
from serving.traces import TRACEPARENT, read_traceparent

MAX_REQUEST_ID = 128
MAX_LABELS = 32
MAX_LABEL = 128
MAX_ATTEMPTS = 20
MAX_BATCH = 1000
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 500
# Ten years: beyond it a time is a slip of units rather than a plan.
MAX_AHEAD_MS = 10 * 366 * 24 * 3600 * 1000

_QUEUE_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_CLIENT_NAME = re.compile(r"[a-zA-Z0-9_.@-]{1,64}")
_JOB_ID = re.compile(r"[0-9a-f]{32}")

_PRIORITIES = {
    job_pb2.PRIORITY_UNSPECIFIED: Priority.STANDARD,
    job_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    job_pb2.PRIORITY_STANDARD: Priority.STANDARD,
    job_pb2.PRIORITY_BATCH: Priority.BATCH,
}


@dataclass(frozen=True)
class Caller:
    """Who calls, by the call's metadata: `client` its `x-client-id`, `trace` its W3C `traceparent`; empty without."""

    client: str = ""
    trace: str = ""


# ---- requests


def read_submission(
    request: queue_service_pb2.SubmitJobRequest, job_id: str, caller: Caller, settings: QueueSettings
) -> Submission:
    """Checks a submission and takes its images out of it. Hashes them: not for the event loop when they are large.

    Raises:
        InvalidField.
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
    files = Files(settings.max_image_bytes)
    kind, work, item_count = read_kind(request.work, files)
    # The same images, sent as bytes or by id, are the same request; so is one whose times, reckoned from now, have moved on.
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
        blobs=files.contents,
        media_ids=files.media_ids,
        client=read_client(request.client, "client") or caller.client,
        trace=caller.trace,
        webhook_url=_read_webhook(request, settings),
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


def read_client(value: str, field: str) -> str:
    """The name of a client, empty when none was sent; raises InvalidField."""
    if value and not _CLIENT_NAME.fullmatch(value):
        raise InvalidField(field, f"The client name {value[:80]!r} is not 1 to 64 characters of a-z A-Z 0-9 - _ . @.")
    return value


def read_caller(metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
    """What a call's metadata says of the caller; raises InvalidField."""
    found = {name: value for name, value in metadata if isinstance(value, str)}
    return Caller(
        client=read_client(found.get("x-client-id", ""), "x-client-id"), trace=read_traceparent(found.get(TRACEPARENT))
    )


def read_batch(request: queue_service_pb2.BatchSubmitJobsRequest) -> Sequence[queue_service_pb2.SubmitJobRequest]:
    """The submissions of a batch; raises InvalidField."""
    if not 1 <= len(request.requests) <= MAX_BATCH:
        raise InvalidField("requests", f"There are {len(request.requests)} submissions; it must be 1 to {MAX_BATCH}.")
    return request.requests


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
    wanted = JobFilter(
        frozenset(states),
        read_queue(request.queue, "queue"),
        request.kind,
        request.label,
        read_client(request.client, "client") or None,
    )
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


def _read_webhook(request: queue_service_pb2.SubmitJobRequest, settings: QueueSettings) -> str:
    """The webhook's URL, empty without one. Where its host's name leads is seen when it is sent."""
    if not request.HasField("webhook"):
        return ""
    if not settings.webhook_secret.get_secret_value():
        raise InvalidField(
            "webhook",
            "This server sends no webhooks: it has no secret to sign them with.",
            cure="Leave `webhook` out and watch the job (WatchJob), or have the operator set QUEUE_WEBHOOK_SECRET.",
        )
    try:
        Guard(settings.webhook_allowed_hosts.split(",")).read_url(request.webhook.url)
    except AddressRefused as error:
        raise InvalidField("webhook.url", f"No webhook is sent to this URL: {error}.") from None
    return request.webhook.url


def _read_labels(request: queue_service_pb2.SubmitJobRequest) -> dict[str, str]:
    if len(request.labels) > MAX_LABELS:
        raise InvalidField("labels", f"There are {len(request.labels)} labels; the limit is 32.")
    for name, value in request.labels.items():
        if not name or "=" in name:
            raise InvalidField("labels", f"The label {name!r} is empty or has a `=` in its name.")
        if len(name) > MAX_LABEL or len(value) > MAX_LABEL:
            raise InvalidField("labels", f"The label {name[:40]!r} is longer than 128 characters.")
    return dict(request.labels)


def _without_work(request: queue_service_pb2.SubmitJobRequest) -> queue_service_pb2.SubmitJobRequest:
    """A copy without the work, whose images stay where they are, and without the times."""
    bare = queue_service_pb2.SubmitJobRequest(
        queue=request.queue, priority=request.priority, max_attempts=request.max_attempts, labels=request.labels
    )
    if request.HasField("webhook"):
        bare.webhook.CopyFrom(request.webhook)
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
        paused=counts.paused,
        held=counts.held,
        size_bytes=counts.size_bytes,
        clients=[queue_service_pb2.ClientStats(client=client, waiting=waiting) for client, waiting in counts.clients],
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
