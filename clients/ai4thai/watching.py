"""Keeps a watch on a job together across broken connections: what was seen, when to try again, when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ai4thai import queue_answers
from ai4thai.errors import AI4ThaiError
from ai4thai.job_results import Job
from ai4thai.patience import Patience
from ai4thai.queue.v1 import queue_service_pb2

CONNECTED_S: Final = 10.0
"""A call that lasted longer had reached a server: one to a server that is away fails, with gRPC's own tries, within about 3 s."""


class Watch:
    """One watch on one job; does no calls itself, so that threads and asyncio share it."""

    def __init__(
        self,
        job_id: str,
        after_revision: int = 0,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job_id = job_id
        self.has_ended = False
        self._clock = clock
        self._asked_s = clock()
        self._revision = after_revision
        self._has_seen = False
        self._patience = Patience(
            timeout_s,
            late=f"Job {job_id} has not ended within {timeout_s or 0:g} s; it goes on. Watch it again, or cancel it.",
            broken=f"The watch on job {job_id} keeps breaking off.",
            clock=clock,
        )

    def request(self) -> queue_service_pb2.WatchJobRequest:
        """The request that goes on where the last answer was; to be sent at once."""
        self._asked_s = self._clock()
        return queue_service_pb2.WatchJobRequest(job_id=self.job_id, after_revision=self._revision)

    def remaining_s(self) -> float | None:
        """What is left of timeout_s; None without one.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        return self._patience.remaining_s()

    def take(self, response: queue_service_pb2.WatchJobResponse) -> Job | None:
        """The job after a change; None when this change was seen before the connection broke.

        A job whose Redis lost its last second (a power loss) goes on from an earlier revision: that is told too.
        """
        self._patience.renew()
        self._has_seen = True
        job = queue_answers.read_job(response.job)
        revision = response.revision or job.revision
        self.has_ended = job.has_ended
        # The end is told also when it is the revision that was asked from: it may have been another before a power loss.
        if revision == self._revision and not job.has_ended:
            return None
        self._revision = revision
        return job

    def delay_after(self, error: AI4ThaiError | None) -> float:
        """How long to wait before going on after an error, or after a stream that ended before the job (None).

        Raises:
            AI4ThaiError: going on makes no sense; the error itself, or DeadlineExceeded in words of this watch.
        """
        if self._clock() - self._asked_s > CONNECTED_S:
            self._patience.renew()  # it broke off after it had been well: a job that stays as it is sends nothing for hours
        if error is not None and error.reason == "REVISION_OUT_OF_RANGE" and self._has_seen:
            self._revision, error = 0, None  # it was set back meanwhile, see take()
        return self._patience.delay_after(error)
