"""Keeps the jobs in Redis, as a worker asks for it: claim, renew, finish, each fenced by the attempt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import redis
from redis.commands.core import Script

from queue_server import keys, scripts
from queue_server.connection import translated
from queue_server.jobs import NO_PROGRESS, Job, JobState, Progress
from queue_server.records import read_fields, read_job, write_status
from queue_server.redis_address import read_address
from queue_server.settings import WorkerSettings


@dataclass(frozen=True)
class Claim:
    """An attempt at a job that this worker, and nobody else, may make; `work` is the contract's Work, serialised."""

    claim_id: str
    job: Job
    work: bytes

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.job.job_id


@dataclass(frozen=True)
class Expired:
    """A job whose deadline had passed when it was to be claimed; `row` is for lines.of_row."""

    row: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a worker says of its attempt.

    `state` is an end, SCHEDULED (try again after `delay_s`) or QUEUED (another worker may have it now). `error`: why the attempt
    failed; `job_error`: why the job did, for FAILED; both serialised Statuses. `free`: the attempt does not count.
    `files`: the ids of the stored files that belong to the result; they live as long as the job.
    """

    state: JobState
    progress: Progress = NO_PROGRESS
    result: bytes = b""
    error: bytes = b""
    job_error: bytes = b""
    delay_s: float = 0.0
    free: bool = False
    files: tuple[str, ...] = ()


class WorkerStore:
    """Safe to use from many threads.

    Every method raises StoreUnavailable when Redis does not answer; each may be called again then.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._client: redis.Redis | None = None
        self._scripts: dict[str, Script] = {}
        self._keep, self._share = settings.keep_ms, settings.share
        self._lease_ms = round(settings.lease_s * 1000)

    def start(self) -> None:
        """Makes the client; the first command connects."""
        address = read_address(self._settings.url)
        self._client = address.client(
            # Long: a Redis that stalls (a fork, a slow disk) must not make a worker give up what it holds. Sentinels replace one
            # that stalls for longer than a few seconds.
            timeout_s=10 if address.sentinels else 30,
            connect_timeout_s=3,
            health_check_s=30,
        )
        self._scripts = {name: self._client.register_script(text) for name, text in scripts.load_all().items()}

    def stop(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            self._client.close()

    @property
    def client(self) -> redis.Redis:
        """The client; the broker shares its pool of connections."""
        if self._client is None:
            raise RuntimeError("The store has not been started.")
        return self._client

    def claim(self, job_id: str, dispatch_no: int, claim_id: str, worker: str, expired: bytes) -> Claim | Expired | str:
        """Takes a job, or says why not: it is Expired, `gone`, `stale` (it has moved on), `paused` (its queue is).

        `expired`: the Status of one that is.
        """
        word, *rest = self.run(
            "claim",
            {
                "job_id": job_id,
                "dispatch_no": dispatch_no,
                "claim_id": claim_id,
                "worker": worker,
                "expired": write_status(expired),
                "lease_ms": self._lease_ms,
            },
        )
        if word == b"expired":
            return Expired((job_id, *(part.decode() for part in rest)))
        if word != b"claimed":
            return cast("bytes", word).decode()
        return Claim(claim_id, read_job(read_fields(rest[0])), rest[1])

    def renew(self, claim: Claim, progress: Progress) -> str:
        """Keeps the lease and records progress: `ok`, `cancel` (someone asked to), `lost` (the attempt is no longer ours)."""
        word: bytes = self.run(
            "renew",
            {
                "job_id": claim.job_id,
                "attempt": claim.job.attempt,
                "claim_id": claim.claim_id,
                "lease_ms": self._lease_ms,
                **_progress(progress),
            },
        )
        return word.decode()

    def look(self, claims: list[Claim]) -> list[str]:
        """The same words for many attempts at once, without renewing anything."""
        with translated(self._settings.url):
            pipeline = self.client.pipeline(transaction=False)
            for claim in claims:
                pipeline.hmget(keys.job(claim.job_id), ["state", "claim", "cancel"])
            replies = pipeline.execute()
        words = []
        for claim, (state, holder, cancel) in zip(claims, replies, strict=True):
            if state != b"RUNNING" or holder != claim.claim_id.encode():
                words.append("lost")
            else:
                words.append("cancel" if cancel == b"1" else "ok")
        return words

    def finish(self, claim: Claim, outcome: Outcome) -> tuple[bool, str]:
        """Records the outcome: (True, the state the job is in now), or (False, why it was refused)."""
        word, value = self.run(
            "finish",
            {
                "job_id": claim.job_id,
                "attempt": claim.job.attempt,
                "claim_id": claim.claim_id,
                "state": outcome.state.value,
                "error": write_status(outcome.error),
                "job_error": write_status(outcome.job_error),
                "delay_ms": round(outcome.delay_s * 1000),
                "free": outcome.free,
                "files": list(outcome.files),
                **_progress(outcome.progress),
            },
            outcome.result,
        )
        return word != b"refused", cast("bytes", value).decode()

    def redispatch(self, job_id: str, dispatch_no: int) -> None:
        """Sends the message of a waiting job again: this worker will not begin it."""
        self.run("redispatch", {"job_id": job_id, "dispatch_no": dispatch_no})

    def beat(
        self, worker: str, *, concurrency: int, start_ms: int, job_ids: list[str], ended_count: int, alive_s: float
    ) -> None:
        """Tells that this worker lives; forgotten after `alive_s`."""
        self.run(
            "beat",
            {
                "worker": worker,
                "concurrency": concurrency,
                "start_ms": start_ms,
                "jobs": json.dumps(job_ids),
                "ended": ended_count,
                "alive_ms": round(alive_s * 1000),
            },
        )

    def leave(self, worker: str) -> None:
        """Takes this worker off the list of those that live."""
        with translated(self._settings.url):
            self.client.zrem(keys.WORKERS, worker)
            self.client.delete(keys.worker(worker))

    def run(self, script: str, parameters: Mapping[str, object], payload: bytes = b"") -> Any:
        """Runs one of scripts.NAMES and answers what it does."""
        terms = {**parameters, "keep": self._keep, "share": self._share}
        text = json.dumps(terms, ensure_ascii=False, separators=(",", ":"))
        with translated(self._settings.url):
            return self._scripts[script](keys=[keys.TAG], args=[text, payload])


def _progress(progress: Progress) -> dict[str, object]:
    return {"done": progress.completed_count, "total": progress.total_count, "msg": progress.message}
