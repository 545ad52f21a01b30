"""The kinds of work: how each is read when it is submitted, and how it is done.

A new kind is a message in the contract's Work and one in its JobResult, a file here with `read` and `run`, and a line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ai4thai.queue.v1 import work_pb2

from queue_server.errors import InvalidField
from queue_server.work import analyze, detect, generate, video
from queue_server.work.files import Files
from queue_server.work.task import Task


@dataclass(frozen=True)
class Kind:
    """One kind of work.

    `read` checks what was submitted and answers the same with its files by their ids, and how many items it has (0: that is
    known only when it is done); raises InvalidField. `run` does it: a function from a task and the work to the result.
    """

    read: Callable[[work_pb2.Work, Files], tuple[work_pb2.Work, int]]
    run: Callable[[Task, work_pb2.Work], work_pb2.JobResult]


KINDS: Mapping[str, Kind] = {
    "detect": Kind(detect.read, detect.run),
    "generate": Kind(generate.read, generate.run),
    "analyze": Kind(analyze.read, analyze.run),
    "video": Kind(video.read, video.run),
}
"""Every kind, by its name in Work's oneof."""


def read_kind(work: work_pb2.Work, files: Files) -> tuple[str, work_pb2.Work, int]:
    """The kind of a submission, its work without its files' bytes, and how many items it has.

    Raises:
        InvalidField.
    """
    kind = work.WhichOneof("work")
    if kind is None:
        raise InvalidField(
            "work", "work is not set.", cure=f"Set one of {', '.join(f'work.{name}' for name in KINDS)}."
        )
    return kind, *KINDS[kind].read(work, files)


def run_kind(task: Task, kind: str, work: bytes) -> bytes:
    """Does a job's work; the serialised JobResult.

    Raises:
        VisionFailed, ItemError, Stopped; ServiceError when the job cannot be done at all.
    """
    result = KINDS[kind].run(task, work_pb2.Work.FromString(work)).SerializeToString()
    task.check_size(len(result))
    return result
