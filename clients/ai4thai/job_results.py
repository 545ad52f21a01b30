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


@dataclass(frozen=True)
class VideoTrack:
    """One object that was followed through a video: its commonest label, and when it was seen, from the video's beginning."""

    track_id: int
    label: str
    first_s: float
    last_s: float
    frame_count: int
    max_confidence: float


@dataclass(frozen=True)
class VideoJobResult:
    """Of a video job; what the ids name is fetched with `download`: JSON with all frames, and an MP4 if it was asked for.

    `tracks` are in the order of their first frame, at most 1000 (the JSON has all); `annotated_media_id` may be empty.
    """

    tracks_media_id: str
    annotated_media_id: str
    frame_count: int
    detected_frame_count: int
    failed_frame_count: int
    duration_s: float
    width_px: int
    height_px: int
    tracks: tuple[VideoTrack, ...]


JobResult: TypeAlias = DetectJobResult | AnalyzeJobResult | VideoJobResult | Answer
"""What a job brought; a generate job brings an Answer."""


@dataclass(frozen=True)
class WebhookDelivery:
    """Where a job's end is told: `deliver_time` is None until a receiver took it, `error` unless the last try failed."""

    url: str
    attempt_count: int
    deliver_time: datetime | None
    error: AI4ThaiError | None


@dataclass(frozen=True)
class Job:
    """A job as it stood at `revision`, which grows by one with every change.

    `held`: it waits although a worker is free, because its queue is paused or its client has its share of the workers.
    """

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
    client: str = ""
    held: bool = False
    webhook: WebhookDelivery | None = None
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
class SubmitOutcome:
    """What became of one of many submissions: a job (`created`: by this call, not an earlier one), or why not."""

    job: Job | None = None
    created: bool = False
    error: AI4ThaiError | None = None


@dataclass(frozen=True)
class Media:
    """A stored file: `media_id` is `sha256:` and the digest of its bytes; `expire_time` is None while a job needs it."""

    media_id: str
    size_bytes: int
    content_type: str = ""
    expire_time: datetime | None = None


@dataclass(frozen=True)
class ClientStats:
    """How many jobs of one client wait in a queue; `client` is empty for those who did not say."""

    client: str
    waiting: int


@dataclass(frozen=True)
class QueueStats:
    """The counts of one queue: `backlog` is depth + running; an age or latency is None without a job to measure.

    `held` are those of depth that no worker may take now; `size_bytes` the work and files of jobs that have not ended;
    `clients` those with jobs waiting, the most first, at most 20.
    """

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
    held: int = 0
    size_bytes: int = 0
    clients: tuple[ClientStats, ...] = ()


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
