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
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        # The lock goes with the process, however it ends: a folder whose lock is free belongs to nobody.
        descriptor = os.open(Path(name, _LOCK), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            inside = Path(name, "files")
            inside.mkdir()
            yield inside
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
