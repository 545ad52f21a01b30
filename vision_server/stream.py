"""One stream of frames: answered in their order, a bounded number at work, a bad one by its error, a late one dropped.

frames ─► one that waits, until the fair gate lets it in ─► at work ─► its outcome, in the frames' order
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from functools import partial

from serving.errors import ServiceError
from serving.logs import get_logger
from serving.status import from_exception
from vision_server import metrics
from vision_server.detections import Detections
from vision_server.errors import Draining
from vision_server.fair import FairGate
from vision_server.images import Image, Images
from vision_server.requests import Frame, StreamOptions
from vision_server.results import Detection, FrameDropped, StreamSummary
from vision_server.results import Detections as Answer
from vision_server.tracking import Tracking, sought

_log = get_logger("stream")

# Dropped frames whose turn to be told has not come: half a minute of a camera. A reader slower than that holds its sender up.
MAX_UNTOLD = 1000

_DETECTED, _FAILED, _DROPPED = (metrics.STREAM_FRAMES.labels(outcome) for outcome in ("detected", "error", "dropped"))

Outcome = Answer | ServiceError | FrameDropped


@dataclass(frozen=True, slots=True)
class FrameOutcome:
    """What became of one frame."""

    frame_id: int
    outcome: Outcome


@dataclass(slots=True)
class _Unanswered:
    """A frame until its outcome is written; `task` is there once it is at work."""

    frame: Frame | None
    frame_id: int
    outcome: asyncio.Future[Outcome]
    task: asyncio.Task[Answer] | None = None


class Stream:
    """One caller's frames. Lives on one event loop; outcomes() is read once.

    At most `options.max_in_flight` frames are at work, or answered and not written yet. While one waits to be begun, no more are
    read: a slow reader holds its own sender up and nobody else. With `options.drop_oldest` reading goes on, and the one that
    waits gives way to the next.
    """

    def __init__(
        self,
        frames: AsyncIterator[Frame],
        options: StreamOptions,
        deadline_s: float | None,
        detections: Detections,
        images: Images,
        gate: FairGate,
    ) -> None:
        self._frames = frames
        self._options = options
        self._deadline_s = deadline_s
        self._detections = detections
        self._images = images
        self._share = gate.join(self._begin)
        self._tracking = Tracking(options.tracker, options.detect) if options.tracker else None
        self._unanswered: deque[_Unanswered] = deque()
        self._waiting: _Unanswered | None = None
        self._begun = 0
        self._last: asyncio.Task[Answer] | None = None
        self._came, self._room = asyncio.Event(), asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._received = self._detected = self._failed = self._dropped = 0

    async def outcomes(self) -> AsyncGenerator[FrameOutcome | StreamSummary, None]:
        """Outcomes in the frames' order, then the summary once the frames have ended.

        Raises what the frames raise, or Draining after end_reading(), once all frames that were read are answered. Those at work
        are cancelled when the caller leaves.
        """
        began_s = time.perf_counter()
        reading = self._reading = asyncio.create_task(self._read())
        reading.add_done_callback(self._read_all)
        try:
            while (oldest := await self._oldest(reading)) is not None:
                outcome = await oldest.outcome
                self._count(outcome)
                yield FrameOutcome(oldest.frame_id, outcome)
                self._written(oldest)
            if reading.cancelled():
                raise Draining
            reading.result()
            took_s = time.perf_counter() - began_s
            yield StreamSummary(self._received, self._detected, self._failed, self._dropped, took_s)
        finally:
            self._share.leave()
            for unanswered in self._unanswered:
                if unanswered.task is not None:
                    unanswered.task.cancel()
            reading.cancel()

    def end_reading(self) -> None:
        """Reads no more frames; the stream ends with Draining once those that were read are answered."""
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        while True:
            while not self._may_read():
                self._room.clear()
                await self._room.wait()
            frame = await anext(self._frames, None)
            if frame is None:
                return
            self._received += 1
            if self._waiting is not None:
                self._waiting.frame = None
                self._waiting.outcome.set_result(FrameDropped())
            self._waiting = _Unanswered(frame, frame.frame_id, asyncio.get_running_loop().create_future())
            self._unanswered.append(self._waiting)
            self._begin_if_there_is_room()
            self._came.set()

    def _may_read(self) -> bool:
        if self._options.drop_oldest:
            return len(self._unanswered) < self._options.max_in_flight + MAX_UNTOLD
        return self._waiting is None and len(self._unanswered) < self._options.max_in_flight

    def _read_all(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled():
            reading.exception()  # is told by outcomes(), unless the caller has left: then nobody is to be told
        self._came.set()

    async def _oldest(self, reading: asyncio.Task[None]) -> _Unanswered | None:
        """The frame whose outcome comes next; None: there are no more."""
        while not self._unanswered:
            if reading.done():
                return None
            self._came.clear()
            await self._came.wait()
        return self._unanswered[0]

    def _begin_if_there_is_room(self) -> None:
        if self._waiting is not None and self._begun < self._options.max_in_flight and self._share.take():
            self._begin()

    def _begin(self) -> None:
        """A place has been taken: the frame that waits goes to work, and the next one may be read."""
        assert self._waiting is not None, "a stream stands in line only with a frame that waits"
        begun, self._waiting = self._waiting, None
        frame, begun.frame = begun.frame, None
        assert frame is not None, "a frame is begun once"
        begun.task = self._last = asyncio.create_task(self._answer(frame, self._last))
        begun.task.add_done_callback(partial(self._ended, begun))
        self._begun += 1
        self._room.set()

    async def _answer(self, frame: Frame, before: asyncio.Task[Answer] | None) -> Answer:
        # A frame waits for room instead of being refused: the stream itself is the backpressure.
        detect = partial(
            self._detections.detect,
            frame.image,
            deadline_s=self._deadline_s,
            priority=self._options.priority,
            patient=True,
        )
        tracking = self._tracking
        if tracking is None:
            return (await detect(self._options.detect)).answer

        async def follow(image: Image, found: tuple[Detection, ...]) -> tuple[Detection, ...]:
            await _end_of(before)
            return await self._images.run(lambda: tracking.follow(image, found))

        try:
            return (await detect(sought(self._options.detect), follow=follow)).answer
        finally:
            # One that failed early has not ended before those ahead of it: who waits for it waits for them.
            await _end_of(before)

    def _ended(self, begun: _Unanswered, task: asyncio.Task[Answer]) -> None:
        self._share.give()
        if task.cancelled():
            return
        outcome = _outcome(task)
        if not begun.outcome.done():  # it is cancelled with whoever awaits it
            begun.outcome.set_result(outcome)

    def _written(self, oldest: _Unanswered) -> None:
        self._unanswered.popleft()
        self._room.set()
        if oldest.task is not None:
            self._begun -= 1
            self._begin_if_there_is_room()

    def _count(self, outcome: Outcome) -> None:
        if isinstance(outcome, FrameDropped):
            self._dropped += 1
            _DROPPED.inc()
        elif isinstance(outcome, ServiceError):
            self._failed += 1
            _FAILED.inc()
        else:
            self._detected += 1
            _DETECTED.inc()


async def _end_of(task: asyncio.Task[Answer] | None) -> None:
    if task is not None:
        await asyncio.wait([task])


def _outcome(task: asyncio.Task[Answer]) -> Outcome:
    error = task.exception()
    if error is None:
        return task.result()
    if not isinstance(error, ServiceError):
        _log.error("a frame failed by a fault of our own", exc_info=error)
    return from_exception(error)
