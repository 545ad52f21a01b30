"""How many of a job's images may be at the vision server at once: fewer when it is full, more again while it answers."""

from __future__ import annotations

import random
import time

from queue_server.jobs import Failure
from queue_server.work.task import Task, VisionFailed

# So many answers in a row let one more image go at once.
ANSWERS_FOR_ONE_MORE = 8


class Pace:
    """For one job; begins with the most that the worker allows."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._most = self.in_flight = task.settings.images_in_flight
        self._answers = 0
        self._answered_s = self._slowed_s = time.monotonic()

    def answered(self) -> None:
        """An image was."""
        self._answered_s = time.monotonic()
        self._answers += 1
        if self._answers >= ANSWERS_FOR_ONE_MORE and self.in_flight < self._most:
            self.in_flight += 1
            self._answers = 0

    def refused(self, failure: Failure, begun_s: float) -> None:
        """An image that was sent at `begun_s` was turned away: waits for as long as the server said, a little more at random.

        Raises:
            VisionFailed: none was answered for too long, or none will be.
            Stopped.
        """
        waited_s, patience_s = time.monotonic() - self._answered_s, self._task.settings.image_patience_s
        if max(waited_s, failure.retry_after_s) > patience_s:
            raise VisionFailed(failure)
        # Those that were sent together are turned away together: that is one refusal.
        if begun_s >= self._slowed_s:
            self.in_flight = max(1, self.in_flight // 2)
            self._answers = 0
            self._task.pause(failure.retry_after_s * (1 + 0.5 * random.random()))
            self._slowed_s = time.monotonic()
