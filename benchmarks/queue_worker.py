"""A worker whose jobs do nothing, `python -m benchmarks.queue_worker`; all else is the real one.

What is left is what a job costs besides its work: message, claim, finish. The job is an answer to a conversation, because such a
job has no files.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from ai4thai.queue.v1 import work_pb2

from queue_server import work, worker
from queue_server.work import Kind
from queue_server.work.task import Task


def do_nothing(task: Task, asked: work_pb2.Work) -> work_pb2.JobResult:
    """An empty answer."""
    return work_pb2.JobResult(generate=work_pb2.GenerateResult())


def main() -> int:
    """Works until it is told to stop; returns the exit code."""
    kinds = cast("dict[str, Any]", work.KINDS)
    kinds["generate"] = Kind(kinds["generate"].read, do_nothing)
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
