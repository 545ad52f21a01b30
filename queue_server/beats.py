"""A worker's word that it lives, in a file: for a health check beside it (`ai4thai health --worker`, clients/ai4thai/probe.py).

In a file, and not asked of Redis or of the queue server, so that the check needs neither their addresses nor a password, costs
next to nothing, and calls no worker broken because something else is away.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from serving import logs

_log = logs.get_logger("worker")


class BeatFile:
    """`ai4thai-worker-PID.json` in the system's temporary directory (TMPDIR); gone after an orderly stop."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._file = Path(tempfile.gettempdir(), f"ai4thai-worker-{os.getpid()}.json")
        self._told = False

    def write(self, redis_error: str) -> None:
        """Tells that the worker has come round; `redis_error`: why Redis does not answer, empty when it does."""
        beat = {
            "worker": self._worker,
            "pid": os.getpid(),
            # Of the machine's clock that is never set: both sides read the same one.
            "at_monotonic_s": time.monotonic(),
            "redis_error": redis_error,
        }
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(beat, ensure_ascii=False))
            new.replace(self._file)
        except OSError as error:
            if not self._told:
                _log.warning("cannot tell health checks that this worker lives", file=str(self._file), error=str(error))
            self._told = True

    def delete(self) -> None:
        """Takes the word back."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
