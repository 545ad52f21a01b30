"""What the queue server answers, as plain frozen values; times are in UTC."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

from ai4thai.errors import AI4ThaiError, WrongMoment
from ai4thai.results import Analysis, Answer, DetectResult


class JobState(StrEnum):
    """Where a job is in its life.

    SCHEDULED → QUEUED → RUNNING → SUCCEEDED | FAILED | CANCELLED; EXPIRED when its deadline passed before it ran.
    """

    UNSPECIFIED = "UNSPECIFIED"
    SCHEDULED = "SCHEDULED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"

    @property
    def is_end(self) -> bool:
        """Whether nothing follows."""
        return self in _ENDS


_ENDS = frozenset((JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED))


class Priority(StrEnum):
    """How soon a job is wanted; UNSPECIFIED is STANDARD."""

    UNSPECIFIED = "UNSPECIFIED"
    INTERACTIVE = "INTERACTIVE"
    STANDARD = "STANDARD"
    BATCH = "BATCH"


@dataclass(frozen=True)
class Progress:
    """How many of how many items are done."""

    completed_count: int = 0
    total_count: int = 0
    message: str = ""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job; `end_time` is None while it runs, `error` unless it failed."""

    number: int
    worker: str
    start_time: datetime | None
    end_time: datetime | None
    error: AI4ThaiError | None


@dataclass(frozen=True)
class DetectItem:
    """What became of one image of a detect job: exactly one of both."""

    detection: DetectResult | None = None
    error: AI4ThaiError | None = None


@dataclass(frozen=True)
class AnalyzeItem:
    """What became of one image of an analyze job: exactly one of both."""

    analysis: Analysis | None = None
    error: AI4ThaiError | None = None


@dataclass(frozen=True)
class DetectJobResult:
    """Of a detect job: one item for each image, in their order."""

    items: tuple[DetectItem, ...]


@dataclass(frozen=True)
class AnalyzeJobResult:
    """Of an analyze job: one item for each image, in their order."""

    items: tuple[AnalyzeItem, ...]


JobResult: TypeAlias = DetectJobResult | AnalyzeJobResult | Answer
"""What a job brought; a generate job brings an Answer."""


@dataclass(frozen=True)
class Job:
    """A job as it stood at `revision`, which grows by one with every change."""

    job_id: str
    kind: str
    state: JobState
    queue: str = ""
    priority: Priority = Priority.UNSPECIFIED
    labels: dict[str, str] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    attempt_count: int = 0
    max_attempts: int = 0
    attempts: tuple[Attempt, ...] = ()
    create_time: datetime | None = None
    not_before_time: datetime | None = None
    deadline: datetime | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    expire_time: datetime | None = None
    revision: int = 0
    cancel_requested: bool = False
    result: JobResult | None = None
    error: AI4ThaiError | None = None

    @property
    def has_ended(self) -> bool:
        """Whether its state is an end."""
        return self.state.is_end

    def outcome(self) -> JobResult:
        """The result of a job that SUCCEEDED.

        Raises:
            AI4ThaiError: why it failed, or that it has no result: not ended, cancelled, expired, or no longer kept.
        """
        if self.error is not None:
            raise self.error
        if self.result is None:
            raise WrongMoment(f"Job {self.job_id} is {self.state} and has no result.", code="FAILED_PRECONDITION")
        return self.result


@dataclass(frozen=True)
class JobPage:
    """Some jobs, the newest first; an empty `next_page_token` says that these were the last."""

    jobs: tuple[Job, ...]
    next_page_token: str = ""


@dataclass(frozen=True)
class QueueStats:
    """The counts of one queue: `backlog` is depth + running; an age or latency is None without a job to measure."""

    queue: str
    depth: int
    scheduled: int
    running: int
    failed: int
    backlog: int
    oldest_age_s: float | None
    throughput_per_second: float
    latency_p50_s: float | None
    latency_p95_s: float | None
    paused: bool


@dataclass(frozen=True)
class Stats:
    """The counts of all queues, and how many workers are alive."""

    queues: tuple[QueueStats, ...]
    worker_count: int


@dataclass(frozen=True)
class Worker:
    """A worker process that is alive and the jobs it is at."""

    worker: str
    concurrency: int
    job_ids: tuple[str, ...]
    start_time: datetime | None
    seen_time: datetime | None
    ended_count: int
