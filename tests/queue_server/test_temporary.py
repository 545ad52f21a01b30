"""A worker's temporary folders: those of killed workers are deleted, and no other."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from queue_server.temporary import PREFIX, delete_abandoned, temporary_folder

pytestmark = pytest.mark.usefixtures("own_temporary_directory")


def test_folders_of_killed_workers_are_deleted_and_those_in_use_are_not() -> None:
    program = (
        "import queue_server.temporary as t, time\n"
        "with t.temporary_folder() as folder: print(folder.parent, flush=True); time.sleep(60)"
    )
    workers = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        dead, alive = (Path(worker.stdout.readline().strip()) for worker in workers)
        workers[0].kill()
        workers[0].wait()
        assert dead.exists() and alive.exists()
        assert delete_abandoned() == 1
        assert alive.exists() and not dead.exists()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert delete_abandoned() == 1


def test_a_folder_that_another_worker_took_for_abandoned_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a worker that begins after this one has made its folder, and before it has locked it
    lock, deleted = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not deleted:
            deleted.append(delete_abandoned())
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    # Then the job has a folder all the same, and nothing is left of either
    with temporary_folder() as folder:
        assert deleted == [1]
        (folder / "frames").write_bytes(b"")
        assert delete_abandoned() == 0 and folder.exists()
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
