"""The life of a job: its states, what may follow which, what a failure leads to.

    SCHEDULED → QUEUED → RUNNING → SUCCEEDED | FAILED | CANCELLED
    RUNNING → SCHEDULED (a retry waits) · RUNNING → QUEUED (its worker was lost or stopped)
    SCHEDULED | QUEUED → CANCELLED | EXPIRED
    FAILED | CANCELLED | EXPIRED → QUEUED (RetryJob, by hand)

Pure: nothing here knows Redis, gRPC or the clock. The scripts in scripts/ make these transitions, the tests hold them to NEXT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class JobState(StrEnum):
    """Where a job is in its life; the names are the contract's without their prefix."""

    SCHEDULED = "SCHEDULED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


class Priority(StrEnum):
    """How soon a job is wanted; the values name the broker's queues."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
"""The states that nothing follows by itself."""

FIRST = frozenset({JobState.SCHEDULED, JobState.QUEUED})
"""The states that a job may be born in."""

NEXT: Mapping[JobState, frozenset[JobState]] = {
    JobState.SCHEDULED: frozenset({JobState.QUEUED, JobState.CANCELLED, JobState.EXPIRED}),
    # To itself: a message that was lost is sent again.
    JobState.QUEUED: frozenset({JobState.QUEUED, JobState.RUNNING, JobState.CANCELLED, JobState.EXPIRED}),
    # To itself: progress, and the request to cancel.
    JobState.RUNNING: frozenset(
        {
            *(JobState.RUNNING, JobState.SCHEDULED, JobState.QUEUED),
            *(JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED),
        }
    ),
    **{state: frozenset() for state in ENDED},
}
"""Which state may follow which by itself."""

RETRIED = frozenset({JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
"""The ends that RetryJob leads back to QUEUED from: another life of the same job, begun by hand."""

MAX_ATTEMPTS_KEPT = 20
"""Attempts listed in a record; older ones are dropped. No job may be given more that count."""


@dataclass(frozen=True)
class Progress:
    """How far a job has come."""

    completed_count: int = 0
    total_count: int = 0
    message: str = ""


NO_PROGRESS = Progress()


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job; `end_ms` 0: it runs; `error`: a serialised google.rpc.Status, empty when it did not fail."""

    number: int
    start_ms: int
    end_ms: int
    worker: str
    error: bytes = b""


@dataclass(frozen=True)
class Webhook:
    """Where a job's end is told; `deliver_ms` 0: not taken yet; `error`: the last try's google.rpc.Status, or empty."""

    url: str
    attempt_count: int = 0
    deliver_ms: int = 0
    error: bytes = b""


@dataclass(frozen=True)
class Job:
    """A job's record. Times are milliseconds since 1970, 0: not yet, or none.

    `attempt` numbers every attempt begun and is the fencing token; `spent` counts those of them that count against
    `max_attempts`: one that the vision server turned away, or that a stopping worker gave back, does not.
    """

    job_id: str
    kind: str
    state: JobState
    queue: str
    priority: Priority
    max_attempts: int
    create_ms: int
    labels: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    not_before_ms: int = 0
    deadline_ms: int = 0
    start_ms: int = 0
    end_ms: int = 0
    expire_ms: int = 0
    revision: int = 1
    attempt: int = 0
    spent: int = 0
    cancel_requested: bool = False
    progress: Progress = NO_PROGRESS
    attempts: tuple[Attempt, ...] = ()
    error: bytes = b""
    client: str = ""
    held: bool = False
    trace: str = ""
    """The submitter's W3C `traceparent`; empty without one."""
    webhook: Webhook | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list has; everything that is set must hold."""

    states: frozenset[JobState] = frozenset()
    queue: str = ""
    kind: str = ""
    label: str = ""
    """`key` or `key=value`."""
    client: str | None = None

    def takes(self, job: Job) -> bool:
        """Whether the job belongs into the list."""
        if self.states and job.state not in self.states:
            return False
        if (self.queue and job.queue != self.queue) or (self.kind and job.kind != self.kind):
            return False
        if self.client is not None and job.client != self.client:
            return False
        name, has_value, value = self.label.partition("=")
        return not self.label or (name in job.labels and (not has_value or job.labels[name] == value))


@dataclass(frozen=True)
class Submission:
    """A job as it is asked for, checked. `work`: the contract's Work with every image replaced by its id."""

    job_id: str
    request_id: str
    fingerprint: str
    queue: str
    priority: Priority
    not_before_ms: int
    deadline_ms: int
    max_attempts: int
    labels: Mapping[str, str]
    kind: str
    item_count: int
    work: bytes
    blobs: Mapping[str, bytes]
    """The images that came along, by id."""
    media_ids: tuple[str, ...]
    """Every image the work needs, those that came along included, each once."""
    client: str = ""
    trace: str = ""
    webhook_url: str = ""


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed.

    `status` is a serialised google.rpc.Status. `retriable`: another attempt may do better. `free`: the attempt does not count,
    because the work was not begun in earnest (vision away, loading, full). `retry_after_s`: not sooner than this.
    """

    reason: str
    message: str
    status: bytes
    retriable: bool
    free: bool = False
    retry_after_s: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job after a failed attempt; `delay_s` is for SCHEDULED."""

    state: JobState
    delay_s: float = 0.0
    exhausted: bool = False


def after_failure(
    failure: Failure, *, attempt: int, spent: int, max_attempts: int, backoff: Backoff, jitter: float
) -> Verdict:
    """Decides between another attempt and the end.

    `attempt` and `spent` include the one that failed; `jitter` is a random number from 0 to 1.
    """
    if not failure.retriable:
        return Verdict(JobState.FAILED)
    if not failure.free and spent >= max_attempts:
        return Verdict(JobState.FAILED, exhausted=True)
    return Verdict(JobState.SCHEDULED, max(failure.retry_after_s, backoff.delay_s(attempt, jitter)))


@dataclass(frozen=True)
class Backoff:
    """How long a retry waits: doubling from `first_s`, at most `limit_s`, half of it random so that a crowd spreads out."""

    first_s: float
    limit_s: float

    def delay_s(self, attempt: int, jitter: float) -> float:
        """The wait after attempt number `attempt` (from 1); `jitter` from 0 to 1."""
        whole_s = min(self.limit_s, self.first_s * float(2 ** min(attempt - 1, 30)))
        return max(self.first_s, whole_s * (0.5 + 0.5 * jitter))
