"""Sends a job's images to the vision server, a few at a time, and brings the answers back in the images' order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ai4thai.queue.v1 import work_pb2
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from queue_server.work.pace import Pace
from queue_server.work.task import Answer, ItemError, Task, VisionFailed

ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True)
class _Sent(Generic[ResponseT]):
    """An image on its way; `pending` is a Status when it could not even be sent."""

    index: int
    pending: Answer[ResponseT] | Status
    begun_s: float


def answer_each(
    task: Task, images: Sequence[work_pb2.MediaSource], begin: Callable[[bytes], Answer[ResponseT]]
) -> Iterator[ResponseT | Status]:
    """The response for each image, or the Status of the one that could not be answered.

    When the server is full in the midst of the job, the image waits and is sent again: what is done already is not done twice.

    Raises:
        VisionFailed, Stopped: the attempt is over.
    """
    pace = Pace(task)
    sent: deque[_Sent[ResponseT]] = deque()
    done_count = size_bytes = next_index = 0

    def send(index: int) -> _Sent[ResponseT]:
        # Fetched only now, so that a job of a thousand images holds a few of them in memory.
        try:
            return _Sent(index, begin(task.content(images[index])), time.monotonic())
        except ItemError as error:
            return _Sent(index, error.status, time.monotonic())

    while done_count < len(images):
        while next_index < len(images) and len(sent) < pace.in_flight:
            sent.append(send(next_index))
            next_index += 1
        first = sent.popleft()
        try:
            outcome = _outcome(first.pending)
        except VisionFailed as error:
            # Of a job that has nothing to lose yet: given back, so that the worker holds back others too.
            if not _is_full(error) or (not done_count and not sent):
                raise
            pace.refused(error.failure, first.begun_s)
            sent.appendleft(send(first.index))
            continue
        pace.answered()
        size_bytes += outcome.ByteSize()
        task.check_size(size_bytes)
        done_count += 1
        task.progress(done_count, len(images))
        yield outcome


def _is_full(error: VisionFailed) -> bool:
    """Whether the server itself said when to come again."""
    return error.failure.free and error.failure.retry_after_s > 0


def _outcome(pending: Answer[ResponseT] | Status) -> ResponseT | Status:
    if isinstance(pending, Status):
        return pending
    try:
        return pending.result()
    except ItemError as error:
        return error.status
