"""What a kind of work is given to do its job with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import vision_service_pb2
from google.rpc.status_pb2 import Status

from queue_server.jobs import Failure
from queue_server.settings import WorkerSettings

ResponseT = TypeVar("ResponseT", covariant=True)


class Stopped(Exception):
    """The attempt is to end now: cancelled, lost, or the worker is stopping."""


class VisionFailed(Exception):
    """The vision server could not do this for the whole attempt; says whether another may."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class ItemError(Exception):
    """One image cannot be answered; the others can."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self.status = status


class Answer(Protocol[ResponseT]):
    """A call that has been begun."""

    def result(self) -> ResponseT:
        """Waits for it; raises VisionFailed, ItemError, Stopped."""


class Calls(Protocol):
    """The vision server, as queue_server.vision.VisionCalls gives it."""

    def detect(self, request: vision_service_pb2.DetectRequest) -> Answer[vision_service_pb2.DetectResponse]:
        """Begins a Detect."""

    def analyze(self, request: vision_service_pb2.AnalyzeRequest) -> Answer[vision_service_pb2.AnalyzeResponse]:
        """Begins an Analyze."""

    def generate(
        self, request: vision_service_pb2.GenerateRequest, on_tokens: Callable[[int], None]
    ) -> vision_service_pb2.GenerateSummary:
        """Makes a Generate and waits for its end."""

    def detect_stream(
        self,
        config: vision_service_pb2.StreamConfig,
        frames: Iterator[vision_service_pb2.Frame],
        *,
        max_in_flight: int,
    ) -> Generator[vision_service_pb2.FrameResult]:
        """Makes a DetectStream: each frame's result, in their order. To be closed."""


class Task(Protocol):
    """One attempt at a job, from the inside."""

    @property
    def vision(self) -> Calls:
        """The vision server."""

    @property
    def settings(self) -> WorkerSettings:
        """The worker's settings."""

    def content(self, source: work_pb2.MediaSource) -> bytes:
        """The bytes of an image; raises ItemError when they are no longer kept."""

    def open(self, source: work_pb2.MediaSource) -> AbstractContextManager[Path]:
        """A local file with the bytes, deleted afterwards; raises ItemError when they are no longer kept, and Stopped."""

    def store(self, path: Path, content_type: str) -> str:
        """Stores a file of the result for as long as the job is kept; its media_id. Raises when it is too large, and Stopped."""

    def folder(self) -> AbstractContextManager[Path]:
        """An empty folder, deleted with what is in it afterwards."""

    def progress(self, completed_count: int, total_count: int, message: str = "") -> None:
        """Tells how far the job has come; cheap, may be called often."""

    def stopped(self) -> bool:
        """Whether the attempt is to end now."""

    def check(self) -> None:
        """Raises Stopped when the attempt is to end now."""

    def pause(self, seconds: float) -> None:
        """Waits; raises Stopped as soon as the attempt is to end."""

    def check_size(self, size_bytes: int) -> None:
        """Raises when a result of this size could not be kept."""
