"""Sends a job's images to the vision server, a few at a time, and brings the answers back in the images' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ai4thai.queue.v1 import work_pb2
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from queue_server.work.task import Answer, ItemError, Task

ResponseT = TypeVar("ResponseT", bound=Message)


def answer_each(
    task: Task, images: Sequence[work_pb2.MediaSource], begin: Callable[[bytes], Answer[ResponseT]]
) -> Iterator[ResponseT | Status]:
    """The response for each image, or the Status of the one that could not be answered.

    Raises:
        VisionFailed, Stopped: the attempt is over.
    """
    waiting: deque[Answer[ResponseT] | Status] = deque()
    done_count = size_bytes = next_index = 0
    while next_index < len(images) or waiting:
        while next_index < len(images) and len(waiting) < task.images_in_flight:
            # Fetched only now, so that a job of a thousand images holds a few of them in memory.
            try:
                waiting.append(begin(task.content(images[next_index])))
            except ItemError as error:
                waiting.append(error.status)
            next_index += 1
        outcome = _wait(waiting.popleft())
        size_bytes += outcome.ByteSize()
        task.check_size(size_bytes)
        done_count += 1
        task.progress(done_count, len(images))
        yield outcome


def _wait(pending: Answer[ResponseT] | Status) -> ResponseT | Status:
    if isinstance(pending, Status):
        return pending
    try:
        return pending.result()
    except ItemError as error:
        return error.status
