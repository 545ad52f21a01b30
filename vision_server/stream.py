"""A stream of frames: answered in their order, a bounded number at once, a bad one by its error."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from serving.errors import ServiceError
from serving.logs import get_logger
from serving.status import from_exception
from vision_server import metrics
from vision_server.detections import Detections
from vision_server.requests import Frame, StreamOptions
from vision_server.results import Detections as Answer
from vision_server.results import FrameDropped, StreamSummary

_log = get_logger("stream")


@dataclass(frozen=True, slots=True)
class FrameOutcome:
    """What became of one frame."""

    frame_id: int
    outcome: Answer | ServiceError | FrameDropped


async def detect_stream(
    frames: AsyncIterator[Frame], detections: Detections, options: StreamOptions
) -> AsyncGenerator[FrameOutcome | StreamSummary, None]:
    """Outcomes in the frames' order, then the summary once `frames` has ended.

    At most `options.max_in_flight` frames are read ahead of the oldest unanswered one, so that a slow reader holds its own sender
    up and nobody else. Raises what `frames` raises; frames on their way are cancelled then, and when the caller leaves.
    """
    began_s = time.perf_counter()
    running: deque[tuple[int, asyncio.Task[Answer]]] = deque()
    received = detected = failed = 0
    reading: asyncio.Task[Frame] | None = None
    open_ended = True
    metrics.STREAMS.inc()
    try:
        while open_ended or running:
            if open_ended and reading is None and len(running) < options.max_in_flight:
                reading = asyncio.ensure_future(_next(frames))
            waiting: set[asyncio.Task[Frame] | asyncio.Task[Answer]] = set()
            if reading is not None:
                waiting.add(reading)
            if running:
                waiting.add(running[0][1])
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if reading is not None and reading.done():
                try:
                    frame = reading.result()
                except StopAsyncIteration:
                    open_ended = False
                else:
                    received += 1
                    task = asyncio.create_task(_answer(detections, frame, options))
                    running.append((frame.frame_id, task))
                finally:
                    reading = None
            while running and running[0][1].done():
                frame_id, task = running.popleft()
                outcome = _outcome(task)
                if isinstance(outcome, ServiceError):
                    failed += 1
                else:
                    detected += 1
                yield FrameOutcome(frame_id, outcome)
        yield StreamSummary(received, detected, failed, 0, time.perf_counter() - began_s)
    finally:
        metrics.STREAMS.dec()
        if reading is not None:
            reading.cancel()
        for _, task in running:
            task.cancel()


async def _next(frames: AsyncIterator[Frame]) -> Frame:
    return await anext(frames)


async def _answer(detections: Detections, frame: Frame, options: StreamOptions) -> Answer:
    # A frame waits for room instead of being refused: the stream itself is the backpressure.
    seen = await detections.detect(frame.image, options.detect, priority=options.priority, patient=True)
    return seen.answer


def _outcome(task: asyncio.Task[Answer]) -> Answer | ServiceError:
    error = task.exception()
    if error is None:
        return task.result()
    if not isinstance(error, ServiceError):
        _log.error("a frame failed by a fault of our own", exc_info=error)
    return from_exception(error)
