"""Watches over the attempts that run in this worker: their leases, their progress, the requests to cancel them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from pathlib import Path

from ai4thai.queue.v1 import work_pb2

from queue_server import statuses
from queue_server.errors import MediaNotFound, ResultTooLarge, StoreUnavailable
from queue_server.jobs import Progress
from queue_server.media.worker_files import WorkerFiles
from queue_server.settings import WorkerSettings
from queue_server.temporary import temporary_folder
from queue_server.vision import VisionCalls
from queue_server.work.task import ItemError, Stopped
from queue_server.worker_store import Claim, WorkerStore
from serving.logs import get_logger

# Progress is told at most this often, and no more often than each 2 % of the time the attempt has taken: a job of weeks tells
# it about as many times as a job of an hour does.
PROGRESS_S = 0.25
PROGRESS_SHARE = 0.02

_log = get_logger("attempts")


class Why(Enum):
    """Why an attempt is stopped from outside."""

    CANCELLED = "someone asked to cancel the job"
    LOST = "the lease ran out, another attempt may run"
    STOPPING = "the worker is stopping"


class RunningAttempt:
    """One attempt while it runs; touched by the thread that works and by the one that watches."""

    def __init__(self, claim: Claim, files: WorkerFiles) -> None:
        self.claim = claim
        self.progress = Progress(0, claim.job.progress.total_count)
        self.why: Why | None = None
        self.stopped = threading.Event()
        self.stored: list[str] = []
        self._files = files
        self._lock = threading.Lock()
        self._calls: VisionCalls | None = None
        now_s = time.monotonic()
        self._began_s = self._told_s = self._renewed_s = now_s
        self._told = self.progress

    def is_stopped(self) -> bool:
        """Whether it is to end now."""
        return self.why is not None

    def stop(self, why: Why) -> None:
        """Stops its calls to the vision server; the first reason stays."""
        with self._lock:
            if self.why is not None:
                return
            self.why = why
            calls = self._calls
        self.stopped.set()
        if calls is not None:
            calls.cancel()

    def expire(self) -> None:
        """Stops those of its calls that have not been answered for too long."""
        if self._calls is not None:
            self._calls.expire()

    def task(self, calls: VisionCalls, settings: WorkerSettings) -> AttemptTask:
        """What the work is given."""
        with self._lock:
            self._calls = calls
            stopped = self.why is not None
        if stopped:
            calls.cancel()
        return AttemptTask(self, calls, self._files, settings)

    def renewal_is_due(self, renew_s: float) -> bool:
        """Whether the lease, or progress worth telling, is to be sent now; if so, it counts as sent."""
        now_s, progress = time.monotonic(), self.progress
        pause_s = max(PROGRESS_S, PROGRESS_SHARE * (now_s - self._began_s))
        due = now_s - self._renewed_s >= renew_s or (progress != self._told and now_s - self._told_s >= pause_s)
        if due:
            self._renewed_s = self._told_s = now_s
            self._told = progress
        return due


class AttemptTask:
    """A Task of queue_server.work, made of one attempt."""

    def __init__(
        self, running: RunningAttempt, calls: VisionCalls, files: WorkerFiles, settings: WorkerSettings
    ) -> None:
        self._running = running
        self._files = files
        self.vision = calls
        self.settings = settings

    def content(self, source: work_pb2.MediaSource) -> bytes:
        """The bytes of an image; raises ItemError when they are no longer kept."""
        try:
            return self._files.content(source.media_id)
        except MediaNotFound as error:
            raise ItemError(statuses.write_status(error)) from error

    @contextmanager
    def open(self, source: work_pb2.MediaSource) -> Iterator[Path]:
        """A copy of the file on this machine's disk, deleted afterwards; raises ItemError, Stopped."""
        with self.folder() as folder:
            copy = folder / "file"
            try:
                self._files.copy(source.media_id, copy, self.check)
            except MediaNotFound as error:
                raise ItemError(statuses.write_status(error)) from error
            yield copy

    def store(self, path: Path, content_type: str) -> str:
        """Stores a file of the result, for as long as the job is kept; its media_id. Raises ResultTooLarge, Stopped."""
        media_id = self._files.store(path, content_type, self.check)
        self._running.stored.append(media_id)
        return media_id

    def folder(self) -> AbstractContextManager[Path]:
        """An empty folder, deleted with what is in it afterwards."""
        return temporary_folder()

    def progress(self, completed_count: int, total_count: int, message: str = "") -> None:
        """Remembered here; the watching thread tells it."""
        self._running.progress = Progress(completed_count, total_count, message)

    def stopped(self) -> bool:
        """Whether the attempt is to end now."""
        return self._running.is_stopped()

    def check(self) -> None:
        """Raises Stopped when the attempt is to end now."""
        if self._running.is_stopped():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Waits; raises Stopped as soon as the attempt is to end."""
        if self._running.stopped.wait(seconds):
            raise Stopped

    def check_size(self, size_bytes: int) -> None:
        """Raises ResultTooLarge."""
        if size_bytes > self.settings.max_result_bytes:
            raise ResultTooLarge(size_bytes=size_bytes, limit_bytes=self.settings.max_result_bytes)


class RunningAttempts:
    """All of them, and the thread that watches; start() begins to watch."""

    def __init__(self, store: WorkerStore, settings: WorkerSettings) -> None:
        self._store = store
        self._files = WorkerFiles(store, settings)
        self._settings = settings
        self._lock = threading.Lock()
        self._running: dict[str, RunningAttempt] = {}
        self._stopping = False
        self._ended = threading.Event()
        self._ended_count = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to watch."""
        self._thread = threading.Thread(target=self._watch, name="attempts", daemon=True)
        self._thread.start()

    def stop_all(self) -> None:
        """Stops every attempt, and those that are begun from now on."""
        with self._lock:
            self._stopping = True
            running = list(self._running.values())
        for attempt in running:
            attempt.stop(Why.STOPPING)

    def stop(self) -> None:
        """Ends the watch, once the attempts have ended."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    @contextmanager
    def entered(self, claim: Claim) -> Iterator[RunningAttempt]:
        """Watches over the attempt for as long as the block takes."""
        attempt = RunningAttempt(claim, self._files)
        with self._lock:
            self._running[claim.claim_id] = attempt
            stopping = self._stopping
        if stopping:
            attempt.stop(Why.STOPPING)
        try:
            yield attempt
        finally:
            with self._lock:
                del self._running[claim.claim_id]

    def count_ended(self) -> None:
        """Counts an attempt whose outcome was recorded."""
        with self._lock:
            self._ended_count += 1

    @property
    def job_ids(self) -> list[str]:
        """The jobs that run here."""
        with self._lock:
            return [attempt.claim.job_id for attempt in self._running.values()]

    @property
    def ended_count(self) -> int:
        """Attempts whose outcome was recorded since the start."""
        with self._lock:
            return self._ended_count

    def _watch(self) -> None:
        silent = False
        while not self._ended.wait(self._settings.watch_s):
            try:
                self._look_once()
                silent = False
            except StoreUnavailable as error:
                if not silent:
                    _log.warning("cannot renew leases", error=str(error))
                silent = True
            except Exception:
                _log.exception("watching over the attempts failed once")

    def _look_once(self) -> None:
        with self._lock:
            running = list(self._running.values())
        for attempt in running:
            attempt.expire()
        others = []
        for attempt in running:
            if attempt.renewal_is_due(self._settings.renew_s):
                self._heed(attempt, self._store.renew(attempt.claim, attempt.progress))
            else:
                others.append(attempt)
        if others:
            for attempt, word in zip(others, self._store.look([one.claim for one in others]), strict=True):
                self._heed(attempt, word)

    def _heed(self, attempt: RunningAttempt, word: str) -> None:
        if word == "cancel":
            attempt.stop(Why.CANCELLED)
        elif word == "lost":
            attempt.stop(Why.LOST)
