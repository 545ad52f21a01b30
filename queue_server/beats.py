"""A worker's word that it lives, in a file: for a health check beside it (`ai4thai health --worker`, clients/ai4thai/probe.py).

In a file, and not asked of Redis or of the queue server, so that the check needs neither their addresses nor a password, costs
next to nothing, and calls no worker broken because something else is away.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from serving import logs

_log = logs.get_logger("worker")


class BeatFile:
    """`ai4thai-worker-PID.json` in the system's temporary directory (TMPDIR); gone after an orderly stop.

    It is locked for as long as the worker lives. The lock goes with the process, however it ends, where the file would outlive
    it, and its process id would be given to another.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._file = Path(tempfile.gettempdir(), f"ai4thai-worker-{os.getpid()}.json")
        self._told = False
        self._held: IO[str] | None = None

    def write(self, redis_error: str) -> None:
        """Tells that the worker has come round; `redis_error`: why Redis does not answer, empty when it does."""
        beat = {
            "worker": self._worker,
            # Of the machine's clock that is never set: both sides read the same one.
            "at_monotonic_s": time.monotonic(),
            "redis_error": redis_error,
        }
        new = self._file.with_suffix(".new")
        try:
            held = new.open("w", encoding="utf-8")
            try:
                # Locked before it takes the place of the one before: whoever finds the file finds it locked.
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                json.dump(beat, held, ensure_ascii=False)
                held.flush()
                new.replace(self._file)
            except OSError:
                held.close()
                raise
            self._let_go()
            self._held = held
        except OSError as error:
            if not self._told:
                _log.warning("cannot tell health checks that this worker lives", file=str(self._file), error=str(error))
            self._told = True

    def delete(self) -> None:
        """Takes the word back."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.close()
        self._held = None


def delete_dead_beats() -> None:
    """Deletes the words that killed workers have left behind: those that nobody holds."""
    for file in Path(tempfile.gettempdir()).glob("ai4thai-worker-*.json"):
        # Held, of another user, or gone meanwhile: not ours to delete.
        with suppress(OSError), file.open("rb") as found:
            fcntl.flock(found, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(found.fileno()), file.stat()):  # else its worker has just told anew
                file.unlink()
