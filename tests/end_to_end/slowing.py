"""Slows a process down without changing it, so that its work lasts long enough to be interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RUNS_S = 0.01


@contextmanager
def slowed(pid: int, factor: float = 10) -> Iterator[None]:
    """The process gets one moment in `factor`: it is stopped (SIGSTOP) for the others. Runs at full speed afterwards."""
    done = threading.Event()

    def stop_and_go() -> None:
        try:
            while not done.wait(RUNS_S):
                os.kill(pid, signal.SIGSTOP)
                done.wait(RUNS_S * (factor - 1))
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass  # it has ended meanwhile

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
