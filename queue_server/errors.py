"""The errors of the queue server, and of the jobs it keeps.

ServiceError
├── InvalidField             INVALID_ARGUMENT      a field is missing or out of range
├── JobNotFound              NOT_FOUND
├── MediaNotFound            NOT_FOUND
├── RequestIdReused          ALREADY_EXISTS        the same request_id with another body
├── QueueFull                RESOURCE_EXHAUSTED    too many jobs, queues, watchers or bytes
├── StoreUnavailable         UNAVAILABLE           Redis does not answer
├── Draining                 UNAVAILABLE           the server is shutting down
├── WrongState               FAILED_PRECONDITION   the job's state does not allow it
├── RevisionOutOfRange       OUT_OF_RANGE
└── of a job, not of a call: WorkerLost, HandedBack, JobExpired, VisionUnreachable, ResultTooLarge
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

    def __init__(self, *, job_id: str, state: str) -> None:
        super().__init__(
            Code.FAILED_PRECONDITION,
            "WRONG_STATE",
            f"Job {job_id} is {state}; only a job that has ended can be deleted.",
            cure="Cancel it first.",
            metadata={"job_id": job_id, "state": state},
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

    def __init__(self, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            Code.FAILED_PRECONDITION,
            "INVALID_FIELD",
            f"The result has {size_bytes} bytes; the limit is {limit_bytes}.",
            cure="Send fewer images in one job, leave `annotate` out, or raise QUEUE_MAX_RESULT_BYTES.",
            metadata={"size_bytes": size_bytes, "limit_bytes": limit_bytes},
        )
