"""Keeps the jobs in Redis, as the queue server asks for it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from queue_server import keys
from queue_server.connection import Connection, memory_full
from queue_server.errors import (
    InvalidField,
    JobNotFound,
    MediaNotFound,
    QueueFull,
    RequestIdReused,
    StoreUnavailable,
    WrongState,
)
from queue_server.jobs import Job, JobFilter, Submission
from queue_server.records import Fields, Kept, read_change, read_fields, read_job
from queue_server.settings import QueueSettings

# Images are larger than everything else that Redis is asked: they get more time, once Redis is known to answer.
BLOB_TIMEOUT_S = 10.0
# Records looked at for one page of a list whose filter finds little; the page ends there and its token goes on from there.
MAX_SCANNED = 2000
MIN_VERSION = (6, 2)
# Records read in one round trip of a list.
CHUNK = 100


@dataclass(frozen=True)
class Page:
    """A page of a list; `cursor` is where the next one begins, empty after the last."""

    jobs: tuple[Job, ...]
    cursor: str


class Store:
    """Every change is one script, so that record, indexes, event and message change together or not at all."""

    def __init__(self, connection: Connection, settings: QueueSettings) -> None:
        self._connection = connection
        self._settings = settings
        self._memory_full = False

    async def check(self) -> str:
        """Asks Redis how it is; a detail for health.

        Raises:
            StoreUnavailable: it is away, too old, or would delete accepted jobs by itself.
        """
        info = await self._connection.ask(self._connection.client.info())
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
            raise StoreUnavailable(why=f"its version is {version}, 6.2 or newer is needed")
        limit, used, policy = int(info.get("maxmemory", 0)), int(info["used_memory"]), info.get("maxmemory_policy")
        if limit and policy != "noeviction":
            raise StoreUnavailable(
                why=f"its maxmemory-policy is {policy}, with which it deletes accepted jobs; set it to noeviction"
            )
        self._memory_full = bool(limit) and used > limit * self._settings.max_memory_share
        name = "Valkey " + str(info["valkey_version"]) if "valkey_version" in info else "Redis " + version
        return f"{name}, {used >> 20} MB" + (f" of {limit >> 20} MB used" if limit else " used, no maxmemory set")

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
            await self._store_blobs(submission)
            word, value = await self._connection.run("submit", self._describe(submission), submission.work)
            if word in (b"created", b"same"):
                return read_job(read_fields(value)), word == b"created"
            # An image that came along may have reached the end of its first lifetime meanwhile: send it again.
            if word != b"missing" or value.decode() not in submission.blobs:
                raise self._refusal(word.decode(), value.decode(), submission)
        raise StoreUnavailable(why="images vanish while they are stored")

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
        if await self._connection.run("cancel", {"job_id": job_id, "keep": self._settings.keep_ms}) == b"gone":
            raise JobNotFound(job_id=job_id)
        return await self.job(job_id)

    async def delete(self, job_id: str) -> None:
        """Forgets a job that has ended; raises JobNotFound, WrongState."""
        word = await self._connection.run("delete", {"job_id": job_id, "keep": self._settings.keep_ms})
        if word == b"gone":
            raise JobNotFound(job_id=job_id)
        if word != b"deleted":
            raise WrongState(job_id=job_id, state=word.decode())

    async def list_jobs(self, wanted: JobFilter, page_size: int, cursor: str) -> Page:
        """A page of jobs, the newest first; lists never load images or results."""
        index = keys.ALL
        if len(wanted.states) == 1:
            index = keys.by_state(next(iter(wanted.states)))
        elif wanted.queue:
            index = keys.by_queue(wanted.queue)
        found: list[Job] = []
        scanned = 0
        chunk = max(page_size, CHUNK)
        while scanned < MAX_SCANNED:
            # All scores are 0 and ids grow with time: the order of names is the order of creation.
            ids: list[bytes] = await self._connection.ask(
                self._connection.client.zrevrangebylex(index, f"({cursor}" if cursor else "+", "-", 0, chunk)
            )
            scanned += len(ids)
            for job_id, fields in zip(
                ids, await self._many([keys.job(job_id.decode()) for job_id in ids]), strict=True
            ):
                cursor = job_id.decode()
                if fields and wanted.takes(job := read_job(fields)):
                    found.append(job)
                    if len(found) == page_size:
                        return Page(tuple(found), cursor)
            if len(ids) < chunk:
                return Page(tuple(found), "")
        return Page(tuple(found), cursor)

    async def sweep(self, script: str, **parameters: object) -> list[list[str]]:
        """Runs one of the sweeper's scripts; a list for each job that it moved."""
        moved = await self._connection.run(script, {"limit": 200, "keep": self._settings.keep_ms, **parameters})
        return [[part.decode() for part in row] for row in moved]

    async def _store_blobs(self, submission: Submission) -> None:
        if not submission.blobs:
            return
        first_ms = self._settings.keep_ms["media_ms"]
        # Asks with a short answer first: a Redis that hangs is found out in time, and what is stored already is not sent again.
        missing = await self._connection.run("extend_blobs", {"media": list(submission.blobs), "first_ms": first_ms})
        for media_id in {name.decode() for name in missing}:
            await self._connection.ask(
                self._connection.client.set(keys.blob(media_id), submission.blobs[media_id], px=first_ms),
                timeout_s=BLOB_TIMEOUT_S,
            )

    def _describe(self, submission: Submission) -> dict[str, object]:
        return {
            "job_id": submission.job_id,
            "request_id": submission.request_id,
            "fingerprint": submission.fingerprint,
            "queue": submission.queue,
            "priority": submission.priority.value,
            "not_before_ms": submission.not_before_ms,
            "deadline_ms": submission.deadline_ms,
            "max_attempts": submission.max_attempts or self._settings.default_max_attempts,
            "labels": json.dumps(dict(submission.labels), ensure_ascii=False),
            "kind": submission.kind,
            "item_count": submission.item_count,
            "media": submission.media_ids,
            "max_depth": self._settings.max_depth,
            "max_queues": self._settings.max_queues,
            "keep": self._settings.keep_ms,
        }

    def _refusal(self, word: str, value: str, submission: Submission) -> Exception:
        match word:
            case "reused":
                return RequestIdReused(request_id=submission.request_id, job_id=value)
            case "missing":
                return MediaNotFound(media_id=value)
            case "late":
                return InvalidField(
                    "deadline", "The deadline has passed already.", cure="Send a later one, or none.", now_ms=value
                )
            case "queues":
                return QueueFull(
                    f"There are {value} queues; the limit is {self._settings.max_queues}.",
                    cure="Use one of them (GetQueueStats lists them), or raise QUEUE_MAX_QUEUES.",
                    limit=self._settings.max_queues,
                )
            case _:
                return QueueFull(
                    f"{value} jobs wait; the limit is {self._settings.max_depth}.",
                    cure="Try again later, or raise QUEUE_MAX_DEPTH.",
                    depth=value,
                    limit=self._settings.max_depth,
                )

    async def _fields(self, job_id: str) -> Fields:
        reply = await self._connection.ask(self._connection.client.hgetall(keys.job(job_id)))
        if not reply:
            raise JobNotFound(job_id=job_id)
        return read_fields(reply)

    async def _many(self, names: list[str]) -> list[Fields]:
        if not names:
            return []
        pipeline: Any = self._connection.client.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(name)
        replies = await self._connection.ask(pipeline.execute())
        # A page of 500 records is parsed in pieces, so that other callers get their turn.
        await asyncio.sleep(0)
        return [read_fields(reply) for reply in replies]
