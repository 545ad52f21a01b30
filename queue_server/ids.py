"""Makes the names of jobs: their order is the order of their creation."""

from __future__ import annotations

import secrets
import time


class JobIds:
    """32 hex digits: milliseconds since 1970 (12), a counter within the millisecond (4), random (16).

    The names of one process grow strictly; those of several servers as far as their clocks agree. Lists rely on the order alone.
    """

    def __init__(self) -> None:
        self._last = 0

    def new(self) -> str:
        """The next name."""
        self._last = max(self._last + 1, int(time.time() * 1000) << 16)
        return f"{self._last:016x}{secrets.token_hex(8)}"
