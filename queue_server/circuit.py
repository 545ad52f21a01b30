"""Holds new attempts back while the vision server is away or full."""

from __future__ import annotations

import threading
import time


class Circuit:
    """Opens after a failure that says "later", for longer each time in a row; closes with the first success.

    One attempt pays for the discovery; the jobs behind it wait unclaimed, so that an outage leaves no trail of attempts.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._open_until_s = 0.0
        self._failures = 0

    def wait(self, stopping: threading.Event) -> None:
        """Waits until attempts may be begun, or the worker stops."""
        while True:
            with self._lock:
                left_s = self._open_until_s - time.monotonic()
            if left_s <= 0 or stopping.wait(min(left_s, 0.2)):
                return

    def failed(self, retry_after_s: float) -> None:
        """The server said "later" (`retry_after_s`, 0: it did not say when) or said nothing."""
        with self._lock:
            if self._open_until_s > time.monotonic():
                return  # attempts that ran together found out together: that is one failure
            self._failures += 1
            hold_s = min(self._limit_s, max(retry_after_s, 0.5 * 2.0 ** min(self._failures - 1, 10)))
            self._open_until_s = time.monotonic() + hold_s

    def succeeded(self) -> None:
        """The server answers."""
        with self._lock:
            self._failures = 0
            self._open_until_s = 0.0
