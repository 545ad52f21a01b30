"""Keeps the jobs in Redis, as the queue server asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from queue_server import keys
from queue_server.connection import Connection, memory_full, translated
from queue_server.durability import WANTED, judge
from queue_server.errors import (
    InvalidField,
    JobNotFound,
    MediaNotFound,
    QueueFull,
    RequestIdReused,
    StoreUnavailable,
    WrongState,
)
from queue_server.jobs import Job, JobState, Submission
from queue_server.media.library import Library
from queue_server.records import Fields, Kept, read_change, read_fields, read_job
from queue_server.settings import QueueSettings
from serving.errors import ServiceError
from serving.health import Warned

# Images are larger than everything else that Redis is asked: they get more time, once Redis is known to answer.
BLOB_TIMEOUT_S = 10.0
MIN_VERSION = (6, 2)


# Submissions that go to Redis in one round trip.
BATCH = 50
# Jobs that one run of a sweeper's script moves at most.
SWEPT = 200
# What a limit counts, and the setting that raises it.
LIMITS = {
    "depth": ("jobs that wait", "QUEUE_MAX_DEPTH"),
    "queue_depth": ("jobs that wait in this queue", "QUEUE_MAX_QUEUE_DEPTH"),
    "client_depth": ("jobs of this client that wait", "QUEUE_MAX_CLIENT_DEPTH"),
    "bytes": ("bytes of jobs that have not ended", "QUEUE_MAX_BYTES"),
    "queue_bytes": ("bytes of this queue's jobs that have not ended", "QUEUE_MAX_QUEUE_BYTES"),
    "client_bytes": ("bytes of this client's jobs that have not ended", "QUEUE_MAX_CLIENT_BYTES"),
    "queues": ("queues", "QUEUE_MAX_QUEUES"),
}


class Store:
    """Every change is one script, so that record, indexes, event and message change together or not at all."""

    def __init__(self, connection: Connection, settings: QueueSettings) -> None:
        self._connection = connection
        self._settings = settings
        self._memory_full = False
        self.files = Library(connection, settings, lambda: self._memory_full)

    async def check(self) -> str:
        """Asks Redis how it is; a detail for health, Warned when it keeps less than the promises need.

        Raises:
            StoreUnavailable: it is away, too old, or would delete accepted jobs by itself.
        """
        info = await self._connection.ask(self._connection.client.info())
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
            raise StoreUnavailable(why=f"its version is {version}, 6.2 or newer is needed")
        if info.get("role") == "slave":
            # Connections to one that was demoted are given up, so that the address is looked up again.
            await self._connection.client.connection_pool.disconnect(inuse_connections=False)
            raise StoreUnavailable(why="it is a replica, which takes no jobs; REDIS_URL must name the master")
        limit, used, policy = int(info.get("maxmemory", 0)), int(info["used_memory"]), info.get("maxmemory_policy")
        if limit and policy != "noeviction":
            raise StoreUnavailable(
                why=f"its maxmemory-policy is {policy}, with which it deletes accepted jobs; set it to noeviction"
            )
        self._memory_full = bool(limit) and used > limit * self._settings.max_memory_share
        name = "Valkey " + str(info["valkey_version"]) if "valkey_version" in info else "Redis " + version
        durability = judge(info, await self._connection.config(WANTED))
        detail = f"{name}, {used >> 20} MB" + (f" of {limit >> 20} MB used" if limit else " used, no maxmemory set")
        detail += f"; {durability.promise}"
        full = "New jobs are refused: give Redis more maxmemory" if self._memory_full else ""
        warnings = [warning for warning in (full, durability.warning) if warning]
        return Warned(". ".join([detail, *warnings])) if warnings else detail

    async def submit(self, submission: Submission) -> tuple[Job, bool]:
        """Accepts a job, or finds the one that the same request_id made; True: it was made now.

        Once this has returned, the job is kept until it has ended. Images go first, each with a lifetime, so that those of a
        submission that breaks off here die by themselves; the script then keeps them for as long as the job needs them.

        Raises:
            RequestIdReused, QueueFull, MediaNotFound, InvalidField (the deadline has passed), StoreUnavailable.
        """
        if self._memory_full:
            raise memory_full()
        for _ in range(3):
            await self.files.store_contents(submission.blobs)
            answer = await self._connection.run("submit", self._describe(submission), submission.work)
            if not self._lost_a_blob(answer, submission):
                return self._read_submitted(answer, submission)
        raise StoreUnavailable(why="images vanish while they are stored")

    async def submit_many(self, submissions: Sequence[Submission]) -> list[tuple[Job, bool] | ServiceError]:
        """Accepts many jobs, each by itself and in their order; what `submit` would return or raise for each.

        Raises:
            StoreUnavailable: Redis does not answer; some may have been accepted.
        """
        if self._memory_full:
            return [memory_full() for _ in submissions]
        outcomes: list[tuple[Job, bool] | ServiceError] = []
        for start in range(0, len(submissions), BATCH):
            batch = submissions[start : start + BATCH]
            try:
                await self.files.store_contents(
                    {media_id: content for submission in batch for media_id, content in submission.blobs.items()}
                )
            except QueueFull as error:
                outcomes.extend([error] * len(batch))
                continue
            calls = [(self._describe(submission), submission.work) for submission in batch]
            for submission, answer in zip(batch, await self._connection.run_many("submit", calls), strict=True):
                try:
                    if isinstance(answer, BaseException):
                        with translated(self._settings.url):
                            raise answer
                    if self._lost_a_blob(answer, submission):
                        outcomes.append(await self.submit(submission))
                    else:
                        outcomes.append(self._read_submitted(answer, submission))
                except StoreUnavailable:
                    raise
                except ServiceError as error:
                    outcomes.append(error)
        return outcomes

    async def job(self, job_id: str) -> Job:
        """One job; raises JobNotFound."""
        return read_job(await self._fields(job_id))

    async def job_with_result(self, job_id: str) -> tuple[Job, bytes | None]:
        """One job with its serialised JobResult, None when it has none; raises JobNotFound."""
        pipeline = self._connection.client.pipeline(transaction=True)
        pipeline.hgetall(keys.job(job_id)).get(keys.result(job_id))
        reply, result = await self._connection.ask(pipeline.execute(), timeout_s=BLOB_TIMEOUT_S)
        if not reply:
            raise JobNotFound(job_id=job_id)
        return read_job(read_fields(reply)), result

    async def kept(self, job_id: str) -> Kept:
        """The record with its changes, read at one moment; raises JobNotFound."""
        pipeline = self._connection.client.pipeline(transaction=True)
        pipeline.hgetall(keys.job(job_id)).hgetall(keys.base(job_id)).lrange(keys.changes(job_id), 0, -1)
        reply, base, changes = await self._connection.ask(pipeline.execute())
        if not reply:
            raise JobNotFound(job_id=job_id)
        return Kept(read_fields(reply), read_fields(base), [read_change(line) for line in changes])

    async def cancel(self, job_id: str) -> Job:
        """Cancels a job that waits, asks the worker of one that runs; one that has ended stays as it is. Raises JobNotFound."""
        await self.request_cancel(job_id)
        return await self.job(job_id)

    async def request_cancel(self, job_id: str) -> JobState | None:
        """The same; the state that it was in, None when nothing was to be done any more. Raises JobNotFound."""
        word = await self._connection.run("cancel", {"job_id": job_id})
        if word == b"gone":
            raise JobNotFound(job_id=job_id)
        return None if word == b"same" else JobState(word.decode())

    async def delete(self, job_id: str) -> None:
        """Forgets a job that has ended; raises JobNotFound, WrongState."""
        word = await self._connection.run("delete", {"job_id": job_id})
        if word == b"gone":
            raise JobNotFound(job_id=job_id)
        if word != b"deleted":
            raise WrongState(
                f"Job {job_id} is {word.decode()}; only a job that has ended can be deleted.",
                cure="Cancel it first.",
                job_id=job_id,
                state=word.decode(),
            )

    async def retry(self, job_id: str) -> Job:
        """Queues an ended, unsuccessful job again.

        Raises:
            JobNotFound, MediaNotFound (a file it needs is no longer kept), WrongState, QueueFull.
        """
        if self._memory_full:
            raise memory_full()
        match [part.decode() for part in await self._connection.run("retry", {"job_id": job_id})]:
            case ["retried"]:
                return await self.job(job_id)
            case ["missing", media_id]:
                raise MediaNotFound(media_id=media_id)
            case ["full", name, value]:
                raise self._full(name, value)
            case ["wrong", state]:
                raise WrongState(
                    f"Job {job_id} is {state}; only a job that FAILED, was CANCELLED or EXPIRED can be tried again.",
                    cure="Submit another one."
                    if state == JobState.SUCCEEDED
                    else "Wait for its end, or cancel it first.",
                    job_id=job_id,
                    state=state,
                )
        raise JobNotFound(job_id=job_id)

    async def sweep(self, script: str, **parameters: object) -> list[list[str]]:
        """Runs one of the sweeper's scripts; a list for each job that it moved."""
        moved = await self._connection.run(script, {"limit": SWEPT, **parameters})
        return [[part.decode() for part in row] for row in moved]

    async def release_held(self) -> None:
        """Sends held jobs for which there is room; they are sent as others leave, this is for what was left over."""
        while await self._connection.run("sweep_held", {"limit": SWEPT}) >= SWEPT:
            pass

    def _describe(self, submission: Submission) -> dict[str, object]:
        return {
            "job_id": submission.job_id,
            "request_id": submission.request_id,
            "fingerprint": submission.fingerprint,
            "queue": submission.queue,
            "priority": submission.priority.value,
            "not_before_ms": submission.not_before_ms,
            "deadline_ms": submission.deadline_ms,
            "max_attempts": submission.max_attempts or self._settings.attempts_of(submission.kind),
            "labels": json.dumps(dict(submission.labels), ensure_ascii=False),
            "kind": submission.kind,
            "item_count": submission.item_count,
            "media": submission.media_ids,
            "client": submission.client,
            "trace": submission.trace,
            "hook": submission.webhook_url,
        }

    def _lost_a_blob(self, answer: Sequence[bytes], submission: Submission) -> bool:
        """Whether an image that came along reached the end of its first lifetime meanwhile, so that it is to be sent again."""
        return answer[0] == b"missing" and answer[1].decode() in submission.blobs

    def _read_submitted(self, answer: Sequence[Any], submission: Submission) -> tuple[Job, bool]:
        if answer[0] in (b"created", b"same"):
            return read_job(read_fields(answer[1])), answer[0] == b"created"
        raise self._refusal([part.decode() for part in answer], submission)

    def _refusal(self, answer: Sequence[str], submission: Submission) -> ServiceError:
        match answer:
            case ["reused", job_id]:
                return RequestIdReused(request_id=submission.request_id, job_id=job_id)
            case ["missing", media_id]:
                return MediaNotFound(media_id=media_id)
            case ["full", name, value]:
                return self._full(name, value)
            case ["late", now_ms]:
                return InvalidField(
                    "deadline", "The deadline has passed already.", cure="Send a later one, or none.", now_ms=now_ms
                )
        raise AssertionError(f"submit.lua answered {answer}")

    def _full(self, name: str, value: str) -> QueueFull:
        """What has reached its limit: `name` is one of settings.limits, `value` what there would be with one more."""
        limit = self._settings.limits[name]
        what, setting = LIMITS[name]
        return QueueFull(
            f"With one more there would be {value} {what}; the limit is {limit}.",
            cure=f"Try again later, or raise {setting}."
            if name != "queues"
            else f"Use one of those there are (GetQueueStats lists them), or raise {setting}.",
            limit_name=name,
            value=value,
            limit=limit,
        )

    async def _fields(self, job_id: str) -> Fields:
        reply = await self._connection.ask(self._connection.client.hgetall(keys.job(job_id)))
        if not reply:
            raise JobNotFound(job_id=job_id)
        return read_fields(reply)
