"""Temporary folders of a worker: deleted after use, and after a worker that was killed by the next one that begins."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "ai4thai-job-"
_LOCK = "in-use"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder in the system's temporary directory (TMPDIR), deleted with what is in it afterwards."""
    while True:
        with tempfile.TemporaryDirectory(prefix=PREFIX) as name, _lock(Path(name, _LOCK)) as ours:
            # Before it was locked, another worker that began may have taken it for abandoned and have deleted it.
            if ours:
                inside = Path(name, "files")
                inside.mkdir()
                yield inside
                return


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Makes the file and locks it; whether it is still there then."""
    # The lock goes with the process, however it ends: a folder whose lock is free belongs to nobody.
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield os.fstat(descriptor).st_nlink > 0
    finally:
        os.close(descriptor)


def delete_abandoned() -> int:
    """Deletes the folders that killed workers have left behind; how many."""
    count = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Of another user, or gone meanwhile, or just being made: not ours to delete.
        with suppress(OSError):
            descriptor = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
            finally:
                os.close(descriptor)
    return count
