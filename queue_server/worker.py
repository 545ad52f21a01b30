"""Starts a worker, which does the jobs: `python -m queue_server.worker`.

One process, QUEUE_WORKER_THREADS jobs at once; for more, start more of them, here or on other machines.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dramatiq.worker import Worker as DramatiqWorker

from queue_server import __version__
from queue_server.actors import build_broker, declare_actor
from queue_server.attempts import RunningAttempts
from queue_server.beats import BeatFile, delete_dead_beats
from queue_server.errors import StoreUnavailable
from queue_server.runner import Runner
from queue_server.settings import WorkerSettings
from queue_server.temporary import delete_abandoned
from queue_server.vision import Vision
from queue_server.worker_store import WorkerStore
from serving import logs
from serving.settings import describe, read

# An idle worker asks for messages at least this often. With Dramatiq's default, 1000 ms, a job waits 286 ms (median) to begin;
# with this, 20 ms.
POLL_MS = 50
BEAT_S = 2.0

_log = logs.get_logger("worker")


class Worker:
    """The parts of a worker process; start() and stop() in opposite orders."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._settings = settings
        self._stopping = threading.Event()
        self._store = WorkerStore(settings)
        self._vision = Vision(
            settings.vision_address, call_s=settings.vision_call_s, connect_s=settings.vision_connect_s
        )
        self._attempts = RunningAttempts(self._store, settings)
        self._runner = Runner(self.name, self._store, self._vision, self._attempts, self._stopping, settings)
        self._dramatiq: DramatiqWorker | None = None
        self._start_ms = 0
        self._silent = False
        self._beat_file = BeatFile(self.name)

    def start(self) -> None:
        """Begins to take jobs; Redis and the vision server may be away."""
        self._start_ms = int(time.time() * 1000)
        delete_abandoned()
        delete_dead_beats()
        self._store.start()
        self._vision.start()
        self._attempts.start()
        broker = build_broker(self._store.client)
        declare_actor(broker, self._runner.run)
        self._dramatiq = DramatiqWorker(broker, worker_timeout=POLL_MS, worker_threads=self._settings.worker_threads)
        # No more messages in hand than jobs that can be run: the rest stay in the list, for workers that are free.
        self._dramatiq.queue_prefetch = self._settings.worker_threads
        self._dramatiq.start()
        self.beat()

    def beat(self) -> None:
        """Tells that this worker lives; to be called every BEAT_S."""
        try:
            self._store.beat(
                self.name,
                concurrency=self._settings.worker_threads,
                start_ms=self._start_ms,
                job_ids=self._attempts.job_ids,
                ended_count=self._attempts.ended_count,
                alive_s=max(self._settings.lease_s, 3 * BEAT_S),
            )
            self._silent = False
            self._beat_file.write("")
        except StoreUnavailable as error:
            if not self._silent:
                _log.warning("Redis does not answer", error=str(error))
            self._silent = True
            self._beat_file.write(str(error))

    def stop(self) -> None:
        """Gives the running jobs back at once; messages not begun go back to the list."""
        self._stopping.set()
        self._attempts.stop_all()
        if self._dramatiq is not None:
            self._dramatiq.stop(timeout=round(self._settings.stop_s * 1000))
        self._attempts.stop()
        self._vision.stop()
        try:
            self._store.leave(self.name)
        except StoreUnavailable as error:
            _log.warning("cannot say goodbye", error=str(error))
        self._store.stop()
        self._beat_file.delete()


def main() -> int:
    """Works until SIGTERM or SIGINT; 0 after an orderly stop."""
    settings = read(WorkerSettings)
    logs.configure(settings.log_level, settings.log_format)
    worker = Worker(settings)
    with _signals() as wait_for_signal:
        _log.info("starting", worker=worker.name, version=__version__, settings=describe(settings))
        worker.start()
        _log.info("working", worker=worker.name, threads=settings.worker_threads, vision=settings.vision_address)
        while not wait_for_signal.wait(BEAT_S):
            worker.beat()
        _log.info("stopping: running jobs are given back", worker=worker.name)
        worker.stop()
    _log.info("stopped", worker=worker.name)
    return 0


class _SignalWait:
    """The end of a pipe that Python writes to when a signal arrives."""

    def __init__(self, reader: socket.socket) -> None:
        self._reader = reader

    def wait(self, timeout_s: float) -> bool:
        """Whether a signal has arrived within the time."""
        readable, _, _ = select.select([self._reader], [], [], timeout_s)
        return bool(readable)


@contextmanager
def _signals() -> Iterator[_SignalWait]:
    """SIGTERM and SIGINT wake the waiter; the second one leaves at once."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    seen = 0

    def on_signal(number: int, _frame: object) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            os._exit(128 + number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    # A handler must not take locks (threading.Event would), so the waiter waits on a socket that the interpreter writes to.
    before_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield _SignalWait(reader)
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


if __name__ == "__main__":
    sys.exit(main())
