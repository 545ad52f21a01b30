"""The errors of the queue server, and of the jobs it keeps.

ServiceError
├── InvalidField             INVALID_ARGUMENT      a field is missing or out of range
├── JobNotFound              NOT_FOUND
├── JobLost                  NOT_FOUND             Redis came back without an accepted job
├── MediaNotFound            NOT_FOUND
├── QueueNotFound            NOT_FOUND
├── MediaInvalid             INVALID_ARGUMENT      the file is empty, too large, or not the one announced
├── RequestIdReused          ALREADY_EXISTS        the same request_id with another body
├── QueueFull                RESOURCE_EXHAUSTED    too many jobs, queues, watchers or bytes
├── OffsetOutOfRange         OUT_OF_RANGE
├── UploadTooSlow            DEADLINE_EXCEEDED     the bytes of a file do not come
├── StoreUnavailable         UNAVAILABLE           Redis does not answer
│   └── MediaStoreUnavailable                      nor does what QUEUE_MEDIA_URL names
├── Draining                 UNAVAILABLE           the server is shutting down
├── WrongState               FAILED_PRECONDITION   the job's state does not allow it
├── RevisionOutOfRange       OUT_OF_RANGE
└── of a job, not of a call: WorkerLost, HandedBack, JobExpired, VisionUnreachable, ResultTooLarge, VideoUnreadable,
    WebhookFailed
"""

from __future__ import annotations

from serving.errors import Code, ServiceError

DOMAIN = "queue.ai4thai"
"""ErrorInfo.domain of everything in this file."""


class InvalidField(ServiceError):
    """A field of the request is missing or has a value that it may not have."""

    def __init__(self, field: str, message: str, *, cure: str = "", **metadata: object) -> None:
        super().__init__(Code.INVALID_ARGUMENT, "INVALID_FIELD", message, cure=cure, field=field, metadata=metadata)


class JobNotFound(ServiceError):
    """There is no such job, or no longer."""

    def __init__(self, *, job_id: str) -> None:
        super().__init__(
            Code.NOT_FOUND,
            "JOB_NOT_FOUND",
            f"No job has the id {job_id[:80]!r}, or its lifetime has passed.",
            cure="ListJobs tells which there are.",
            metadata={"job_id": job_id[:80]},
        )


class JobLost(ServiceError):
    """The job had been accepted, and Redis came back from a restart or a failover without it."""

    def __init__(self, *, job_id: str, request_id: str) -> None:
        again = f"the same request_id, {request_id!r}, is free again" if request_id else "it had no request_id"
        super().__init__(
            Code.NOT_FOUND,
            "JOB_LOST",
            f"Job {job_id} was accepted, but Redis came back without it.",
            cure=f"Submit it again; {again}.",
            metadata={"job_id": job_id, "request_id": request_id},
        )


class MediaNotFound(ServiceError):
    """There is no such file, or no longer."""

    def __init__(self, *, media_id: str) -> None:
        super().__init__(
            Code.NOT_FOUND,
            "MEDIA_NOT_FOUND",
            f"No stored file has the id {media_id[:80]!r}, or its lifetime has passed.",
            cure="Send the file itself as `content`.",
            metadata={"media_id": media_id[:80]},
        )


class MediaInvalid(ServiceError):
    """What was sent is no file that can be stored."""

    def __init__(self, message: str, *, field: str, cure: str = "", **metadata: object) -> None:
        super().__init__(Code.INVALID_ARGUMENT, "MEDIA_INVALID", message, cure=cure, field=field, metadata=metadata)


class OffsetOutOfRange(ServiceError):
    """A file was asked for from behind its end."""

    def __init__(self, *, offset_bytes: int, size_bytes: int) -> None:
        super().__init__(
            Code.OUT_OF_RANGE,
            "INVALID_FIELD",
            f"The file has {size_bytes} bytes; there is nothing from {offset_bytes} on.",
            cure=f"Ask for offset_bytes 0 to {size_bytes}.",
            field="offset_bytes",
            metadata={"offset_bytes": offset_bytes, "size_bytes": size_bytes},
        )


class UploadTooSlow(ServiceError):
    """The bytes of a file have not come in time."""

    def __init__(self, *, size_bytes: int, limit_s: float) -> None:
        super().__init__(
            Code.DEADLINE_EXCEEDED,
            "DEADLINE_EXCEEDED",
            f"The upload was given up after {size_bytes} bytes: nothing came for {limit_s:g} s, or all of it took too long.",
            cure="Send it again; the operator finds the limits in QUEUE_UPLOAD_IDLE_S and QUEUE_UPLOAD_S.",
            metadata={"size_bytes": size_bytes},
        )


class RequestIdReused(ServiceError):
    """The caller's name for a submission belongs to another submission."""

    def __init__(self, *, request_id: str, job_id: str) -> None:
        super().__init__(
            Code.ALREADY_EXISTS,
            "REQUEST_ID_REUSED",
            f"The request_id {request_id!r} was used for another request within the last 24 hours: job {job_id}.",
            cure="Use a new request_id for a new request.",
            metadata={"request_id": request_id, "job_id": job_id},
        )


class QueueFull(ServiceError):
    """Something that is bounded has reached its bound."""

    def __init__(self, message: str, *, cure: str, retry_after_s: float = 5.0, **metadata: object) -> None:
        super().__init__(
            Code.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            message,
            cure=cure,
            metadata=metadata,
            retry_after_s=retry_after_s,
        )


class StoreUnavailable(ServiceError):
    """Redis does not answer; nothing is known to have been changed."""

    def __init__(self, *, why: str, retry_after_s: float = 1.0) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "STORE_UNAVAILABLE",
            f"The job store (Redis) does not answer: {why}.",
            cure="Try again with the same request_id; the operator finds the address in REDIS_URL.",
            retry_after_s=retry_after_s,
        )


class MediaStoreUnavailable(StoreUnavailable):
    """The object store does not do as asked."""

    def __init__(self, *, place: str, why: str) -> None:
        ServiceError.__init__(
            self,
            Code.UNAVAILABLE,
            "STORE_UNAVAILABLE",
            f"The store of large files, {place}, does not answer: {why}",
            cure="Try again; the operator finds the address in QUEUE_MEDIA_URL.",
            retry_after_s=5.0,
        )


class Draining(ServiceError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "DRAINING",
            "The server is shutting down.",
            cure="Watch again, from the revision that came last.",
        )


class WrongState(ServiceError):
    """The job is in a state that does not allow what was asked."""

    def __init__(self, message: str, *, cure: str, job_id: str, state: str) -> None:
        super().__init__(
            Code.FAILED_PRECONDITION,
            "WRONG_STATE",
            message,
            cure=cure,
            metadata={"job_id": job_id, "state": state},
        )


class QueueNotFound(ServiceError):
    """There is no such queue."""

    def __init__(self, *, queue: str) -> None:
        super().__init__(
            Code.NOT_FOUND,
            "QUEUE_NOT_FOUND",
            f"No queue has the name {queue!r}: none of that name has had a job.",
            cure="GetQueueStats tells which there are.",
            metadata={"queue": queue},
        )


class RevisionOutOfRange(ServiceError):
    """A watch was asked to go on from a revision that the job has not reached."""

    def __init__(self, *, job_id: str, after_revision: int, revision: int) -> None:
        super().__init__(
            Code.OUT_OF_RANGE,
            "REVISION_OUT_OF_RANGE",
            f"Job {job_id} is at revision {revision}; there is nothing after {after_revision} to wait for.",
            cure=f"Ask for after_revision 0 to {revision}.",
            field="after_revision",
            metadata={"after_revision": after_revision, "revision": revision},
        )


class WorkerLost(ServiceError):
    """The worker of an attempt has stopped answering."""

    def __init__(self, *, worker: str) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "WORKER_LOST",
            f"The worker {worker} stopped answering while it ran this job.",
            metadata={"worker": worker},
        )


class HandedBack(ServiceError):
    """The worker of an attempt was told to stop; the attempt does not count."""

    def __init__(self, *, worker: str) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "DRAINING",
            f"The worker {worker} was shut down and gave the job back; this attempt does not count.",
            metadata={"worker": worker},
        )


class JobExpired(ServiceError):
    """The deadline of a job passed before it was run."""

    def __init__(self) -> None:
        super().__init__(
            Code.DEADLINE_EXCEEDED,
            "JOB_EXPIRED",
            "The job's deadline passed before a worker could begin it.",
            cure="Submit it again with a later deadline.",
        )


class VisionUnreachable(ServiceError):
    """The vision server of a worker cannot be reached."""

    def __init__(self, *, address: str, why: str) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "VISION_UNAVAILABLE",
            f"The vision server at {address} cannot be reached: {why}.",
            cure="The job is tried again by itself.",
            metadata={"address": address},
        )


class ResultTooLarge(ServiceError):
    """The result of a job is larger than what can be kept and sent."""

    def __init__(self, *, size_bytes: int, limit_bytes: int, cure: str = "") -> None:
        super().__init__(
            Code.FAILED_PRECONDITION,
            "RESULT_TOO_LARGE",
            f"The result has {size_bytes} bytes; the limit is {limit_bytes}.",
            cure=cure or "Send fewer images in one job, leave `annotate` out, or raise QUEUE_MAX_RESULT_BYTES.",
            metadata={"size_bytes": size_bytes, "limit_bytes": limit_bytes},
        )


class VideoUnreadable(ServiceError):
    """The file of a job cannot be read as a video, or not by this worker; another attempt would meet the same."""

    def __init__(self, message: str, *, cure: str = "", at_s: float | None = None) -> None:
        super().__init__(
            Code.INVALID_ARGUMENT,
            "VIDEO_UNREADABLE",
            message,
            cure=cure,
            metadata={} if at_s is None else {"at_s": round(at_s, 3)},
        )


class WebhookFailed(ServiceError):
    """The receiver of a job's webhook did not take it; kept with the job, never answered to a call."""

    def __init__(self, *, why: str) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "WEBHOOK_FAILED",
            f"The webhook was not taken: {why}.",
            cure="See to the receiver; it must answer 2xx in time.",
        )
