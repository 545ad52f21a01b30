"""A power loss of Redis' machine, played: after a kill -9, what was written to its file within the last second is cut off."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.02
LOST_S = 1.0
# A job is acknowledged after it is written; the answer may be on its way while Redis is killed.
ANSWER_S = 2.0


@dataclass(frozen=True)
class Cut:
    """Writes after `from_s` (time.monotonic) are gone; `killed_s` is when Redis was killed."""

    from_s: float
    killed_s: float
    size_bytes: int

    def explains(self, acknowledged_s: float) -> bool:
        """Whether what was acknowledged then may be gone."""
        return self.from_s <= acknowledged_s <= self.killed_s + ANSWER_S


class PowerCuts:
    """Knows how long the file was a second ago, by looking at it all the time."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._sizes: deque[tuple[float, dict[Path, int]]] = deque(maxlen=round(4 * LOST_S / SAMPLE_S))
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="file sizes", daemon=True)
        self._killed_s: float | None = None
        self.cuts: list[Cut] = []

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stops looking."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def next_start_is_after_power_loss(self) -> None:
        """Redis is being killed now, and its machine's power is gone."""
        with self._lock:
            self._killed_s = time.monotonic()

    def cut_if_due(self) -> None:
        """To be called while Redis is down, before it starts again."""
        with self._lock:
            if self._killed_s is None:
                return
            killed_s, self._killed_s = self._killed_s, None
            # The last look that is a second old; right after a start the first one: what was there then is on disk.
            old = [sample for sample in self._sizes if sample[0] <= killed_s - LOST_S]
            from_s, sizes = old[-1] if old else self._sizes[0]
            lost_bytes = 0
            for path in self._files():
                size_bytes = path.stat().st_size
                kept_bytes = min(size_bytes, sizes.get(path, 0))
                lost_bytes += size_bytes - kept_bytes
                with path.open("r+b") as file:
                    file.truncate(kept_bytes)
            self.cuts.append(Cut(from_s, killed_s, lost_bytes))
            self._sizes.clear()
            self._look()

    def _files(self) -> list[Path]:
        return list(self._data_dir.glob("appendonlydir/*.incr.aof"))

    def _look(self) -> None:
        sizes = {}
        for path in self._files():
            with suppress(FileNotFoundError):  # Redis has just written it anew
                sizes[path] = path.stat().st_size
        self._sizes.append((time.monotonic(), sizes))

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            with self._lock:
                self._look()
