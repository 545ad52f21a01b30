"""Keeps a watch on a job together across broken connections: what was seen, when to try again, when to give up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from ai4thai import queue_wire
from ai4thai.errors import AI4ThaiError, Busy, DeadlineExceeded, Unavailable
from ai4thai.job_results import Job
from ai4thai.queue.v1 import queue_service_pb2

PATIENCE_S: Final = 60.0
"""How long a watch tries to get back to a server that has gone, before it says so."""

_FIRST_DELAY_S: Final = 0.2
_LONGEST_DELAY_S: Final = 5.0


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
        self._revision = after_revision
        self._timeout_s = timeout_s
        self._started_s = clock()
        self._broken_since_s: float | None = None
        self._failures = 0

    def request(self) -> queue_service_pb2.WatchJobRequest:
        """The request that goes on where the last answer was."""
        return queue_service_pb2.WatchJobRequest(job_id=self.job_id, after_revision=self._revision)

    def remaining_s(self) -> float | None:
        """What is left of timeout_s; None without one.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        if self._timeout_s is None:
            return None
        remaining_s = self._started_s + self._timeout_s - self._clock()
        if remaining_s <= 0:
            raise self._too_late()
        return remaining_s

    def take(self, response: queue_service_pb2.WatchJobResponse) -> Job | None:
        """The job after a change; None when this change was seen before the connection broke."""
        self._broken_since_s, self._failures = None, 0
        job = queue_wire.read_job(response.job)
        revision = response.revision or job.revision
        self.has_ended = job.has_ended
        if revision <= self._revision:
            return None
        self._revision = revision
        return job

    def delay_after(self, error: AI4ThaiError | None) -> float:
        """How long to wait before going on after an error, or after a stream that ended before the job (None).

        Raises:
            AI4ThaiError: going on makes no sense; the error itself, or DeadlineExceeded in words of this watch.
        """
        if isinstance(error, DeadlineExceeded) and self._timeout_s is not None:
            raise self._too_late() from None
        if error is not None and not isinstance(error, Unavailable | Busy):
            raise error
        now_s = self._clock()
        if self._broken_since_s is None:
            self._broken_since_s = now_s
        if now_s - self._broken_since_s > PATIENCE_S:
            raise error or Unavailable(f"The watch on job {self.job_id} keeps breaking off.", code="UNAVAILABLE")
        delay_s = min(_FIRST_DELAY_S * 2.0**self._failures, _LONGEST_DELAY_S) * random.uniform(0.8, 1.2)
        self._failures = min(self._failures + 1, 10)
        if error is not None and error.retry_after_s is not None:
            delay_s = max(delay_s, min(error.retry_after_s, _LONGEST_DELAY_S))
        remaining_s = self.remaining_s()
        return delay_s if remaining_s is None else min(delay_s, remaining_s)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"Job {self.job_id} has not ended within {self._timeout_s:g} s; it goes on. Watch it again, or cancel it.",
            code="DEADLINE_EXCEEDED",
        )
