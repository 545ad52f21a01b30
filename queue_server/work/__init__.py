"""The kinds of work, each a function from a task and the contract's Work to the contract's JobResult."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ai4thai.queue.v1 import work_pb2

from queue_server.work import analyze, detect, generate
from queue_server.work.task import Task
from serving.errors import not_served_yet

KINDS: Mapping[str, Callable[[Task, work_pb2.Work], work_pb2.JobResult]] = {
    "detect": detect.run,
    "generate": generate.run,
    "analyze": analyze.run,
}
"""What does a job of each kind; the names are those of Work's oneof and of jobs.KINDS."""


def run_kind(task: Task, kind: str, work: bytes) -> bytes:
    """Does a job's work; the serialised JobResult.

    Raises:
        VisionFailed, ItemError, Stopped; ServiceError when the job cannot be done at all.
    """
    if kind not in KINDS:
        raise not_served_yet(f"The kind {kind!r}")
    result = KINDS[kind](task, work_pb2.Work.FromString(work)).SerializeToString()
    task.check_size(len(result))
    return result
