"""Runs one job at a time and thread: claim, work, finish, each fenced by the attempt."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from uuid import uuid4

from queue_server import statuses
from queue_server.attempts import RunningAttempt, RunningAttempts, Why
from queue_server.circuit import Circuit
from queue_server.errors import HandedBack, JobExpired, StoreUnavailable
from queue_server.jobs import Backoff, Failure, JobState, after_failure
from queue_server.lines import of_job, of_row
from queue_server.settings import WorkerSettings
from queue_server.vision import Vision
from queue_server.work import run_kind
from queue_server.work.task import ItemError, Stopped, VisionFailed
from queue_server.worker_store import Claim, Expired, Outcome, WorkerStore
from serving.errors import ServiceError
from serving.logs import get_logger
from serving.status import from_exception

T = TypeVar("T")

_log = get_logger("runner")


class Runner:
    """`run` is what the actors call; it never raises and returns when nothing more is to be done about the message."""

    def __init__(
        self,
        worker: str,
        store: WorkerStore,
        vision: Vision,
        attempts: RunningAttempts,
        stopping: threading.Event,
        settings: WorkerSettings,
    ) -> None:
        self._worker = worker
        self._store = store
        self._vision = vision
        self._attempts = attempts
        self._stopping = stopping
        self._settings = settings
        self._circuit = Circuit(settings.circuit_limit_s)
        self._backoff = Backoff(settings.retry_first_s, settings.retry_limit_s)

    def run(self, job_id: str, dispatch_no: int) -> None:
        """Does what the message hints at, if it still holds."""
        try:
            self._circuit.wait(self._stopping)
            claim = self._claim(job_id, dispatch_no)
            if claim is not None:
                self._attempt(claim)
        except Exception:
            # The lease of what was claimed runs out, the message of what was not is sent again: the sweeper sees to it.
            _log.exception("a job was left to the sweeper", job_id=job_id)

    def _claim(self, job_id: str, dispatch_no: int) -> Claim | None:
        if self._stopping.is_set():
            # Dramatiq forgets the message when we return: another worker gets a new one.
            self._store.redispatch(job_id, dispatch_no)
            return None
        claim_id, expired = uuid4().hex, statuses.write_error(JobExpired())
        # The same claim_id each time: a claim whose answer was lost is answered again.
        claimed = self._insist(lambda: self._store.claim(job_id, dispatch_no, claim_id, self._worker, expired), job_id)
        if isinstance(claimed, Claim):
            return claimed
        if isinstance(claimed, Expired):
            _log.info("job EXPIRED: its deadline has passed", **of_row(claimed.row))
        elif claimed == "gone":
            _log.warning("message dropped: there is no record of the job", job_id=job_id, dispatch_no=dispatch_no)
        elif claimed is not None:
            _log.debug("message passed over", job_id=job_id, dispatch_no=dispatch_no, why=claimed)
        return None

    def _attempt(self, claim: Claim) -> None:
        job = claim.job
        fields = {**of_job(job), "attempt": job.attempt}
        _log.info("job RUNNING", **fields, kind=job.kind, queue=job.queue)
        began_s = time.monotonic()
        with self._attempts.entered(claim) as running:
            outcome = self._work(running)
            if outcome is None:
                _log.warning("attempt abandoned: its lease was lost", **fields)
                return
            recorded = self._insist(lambda: self._store.finish(claim, outcome), job.job_id, running)
        if recorded is None:
            _log.warning("the outcome could not be recorded", **fields, state=outcome.state)
        elif not recorded[0]:
            _log.warning("the outcome was refused", **fields, state=outcome.state, why=recorded[1])
        else:
            self._attempts.count_ended()
            _log.info(
                f"job {recorded[1]}",
                **fields,
                seconds=round(time.monotonic() - began_s, 3),
                **({"retry_in_s": round(outcome.delay_s, 1)} if recorded[1] == JobState.SCHEDULED else {}),
            )

    def _work(self, running: RunningAttempt) -> Outcome | None:
        """The outcome of the attempt; None: it is no longer ours to record one."""
        try:
            job = running.claim.job
            calls = self._vision.begin(
                f"{job.job_id}.{job.attempt}", running.is_stopped, priority=job.priority.value, trace=job.trace
            )
            result = run_kind(running.task(calls, self._settings), running.claim.job.kind, running.claim.work)
            self._circuit.succeeded()
            return Outcome(JobState.SUCCEEDED, running.progress, result=result, files=tuple(running.stored))
        except Stopped:
            return self._stopped(running)
        except VisionFailed as error:
            failure = error.failure
        except ItemError as error:
            failure = Failure("", str(error), error.status.SerializeToString(), retriable=False)
        except StoreUnavailable as error:
            failure = Failure(error.reason, str(error), statuses.write_error(error), retriable=True, free=True)
        except ServiceError as error:
            failure = Failure(error.reason, str(error), statuses.write_error(error), retriable=False)
        except Exception as error:
            if running.is_stopped():
                return self._stopped(running)
            _log.exception("a fault of our own", **of_job(running.claim.job))
            failure = Failure("INTERNAL", str(error), statuses.write_error(from_exception(error)), retriable=True)
        return self._failed(running, failure)

    def _stopped(self, running: RunningAttempt) -> Outcome | None:
        if running.why is Why.LOST:
            return None
        if running.why is Why.CANCELLED:
            return Outcome(JobState.CANCELLED, running.progress)
        error = statuses.write_error(HandedBack(worker=self._worker))
        return Outcome(JobState.QUEUED, running.progress, error=error, free=True)

    def _failed(self, running: RunningAttempt, failure: Failure) -> Outcome:
        job = running.claim.job
        if failure.free:
            self._circuit.failed(failure.retry_after_s)
        verdict = after_failure(
            failure,
            attempt=job.attempt,
            spent=job.spent,
            max_attempts=job.max_attempts,
            backoff=self._backoff,
            jitter=random.random(),
        )
        _log.warning(
            "attempt failed",
            **of_job(job),
            attempt=job.attempt,
            reason=failure.reason,
            message=failure.message,
            counts=not failure.free,
        )
        return Outcome(
            verdict.state,
            running.progress,
            error=failure.status,
            job_error=statuses.write_exhausted(failure.status, spent=job.spent)
            if verdict.exhausted
            else failure.status,
            delay_s=verdict.delay_s,
            free=failure.free,
        )

    def _insist(self, ask: Callable[[], T], job_id: str, running: RunningAttempt | None = None) -> T | None:
        """Asks Redis until it answers. None: the worker stops, or the attempt was lost meanwhile; the sweeper takes over then."""
        wait_s = 0.2
        while True:
            try:
                return ask()
            except StoreUnavailable as error:
                _log.warning("Redis does not answer; trying again", job_id=job_id, error=str(error))
            if self._stopping.wait(wait_s) or (running is not None and running.why is Why.LOST):
                return None
            wait_s = min(1.0, wait_s * 2)
