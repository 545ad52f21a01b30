"""How long a call that broke off is tried again, and with which pauses: what watches, uploads and downloads share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from ai4thai.errors import AI4ThaiError, Busy, DeadlineExceeded, Unavailable

PATIENCE_S: Final = 60.0
"""How long it is tried to get back to a server that has gone, before that is said."""

_FIRST_DELAY_S: Final = 0.2
_LONGEST_DELAY_S: Final = 5.0
# RESOURCE_EXHAUSTED that waiting doesn't cure: the file or the message itself is too large.
_INCURABLE: Final = ("MEDIA_INVALID", "MESSAGE_UNREADABLE")


class Patience:
    """Counts the failures of one undertaking; sleeps nothing itself, so that threads and asyncio share it."""

    def __init__(
        self, timeout_s: float | None, *, late: str, broken: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begins to count.

        Args:
            timeout_s: what the whole may take; None: no limit.
            late: what DeadlineExceeded says when it has taken longer.
            broken: what Unavailable says when it keeps breaking off without an error.
            clock: a steadily growing time in seconds.
        """
        self._timeout_s = timeout_s
        self._late, self._broken = late, broken
        self._clock = clock
        self._started_s = clock()
        self._broken_since_s: float | None = None
        self._failures = 0

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

    def renew(self) -> None:
        """Something came: whatever breaks off from here on has the whole patience again."""
        self._broken_since_s, self._failures = None, 0

    def delay_after(self, error: AI4ThaiError | None) -> float:
        """How long to wait before going on after an error, or after a call that ended too early (None).

        Raises:
            AI4ThaiError: going on makes no sense; the error itself, or DeadlineExceeded in words of this undertaking.
        """
        if isinstance(error, DeadlineExceeded) and self._timeout_s is not None:
            raise self._too_late() from None
        if error is not None and (not isinstance(error, Unavailable | Busy) or error.reason in _INCURABLE):
            raise error
        now_s = self._clock()
        if self._broken_since_s is None:
            self._broken_since_s = now_s
        if now_s - self._broken_since_s > PATIENCE_S:
            raise error or Unavailable(self._broken, code="UNAVAILABLE")
        delay_s = min(_FIRST_DELAY_S * 2.0**self._failures, _LONGEST_DELAY_S) * random.uniform(0.8, 1.2)
        self._failures = min(self._failures + 1, 10)
        if error is not None and error.retry_after_s is not None:
            delay_s = max(delay_s, min(error.retry_after_s, _LONGEST_DELAY_S))
        remaining_s = self.remaining_s()
        return delay_s if remaining_s is None else min(delay_s, remaining_s)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(self._late, code="DEADLINE_EXCEEDED")
