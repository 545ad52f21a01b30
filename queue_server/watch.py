"""Tells every change of a job once and in order, to everyone who watches it.

A job's list of changes is the log; the one stream `door` only says that there is something new in some job's list. One reader
a process waits at the door, however many watchers there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress

from queue_server import keys
from queue_server.connection import Connection
from queue_server.errors import Draining, QueueFull, RevisionOutOfRange, StoreUnavailable
from queue_server.jobs import Job
from queue_server.records import history, read_job
from queue_server.redis_address import close
from queue_server.store import Store
from serving.logs import get_logger

# How long the reader blocks in Redis, and how often a watcher looks by itself in case a word got lost at the door.
DOOR_BLOCK_S = 2.0
LOOK_AGAIN_S = 5.0
GATHER_S = 0.005

_log = get_logger("watch")


class Watches:
    """The watchers of one process; start() begins to listen at the door."""

    def __init__(self, store: Store, connection: Connection, max_watchers: int) -> None:
        self._store = store
        self._connection = connection
        self._max_watchers = max_watchers
        self._count = 0
        self._draining = False
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to listen."""
        self._reader = asyncio.create_task(self._read_door(), name="watch door")

    @property
    def count(self) -> int:
        """Callers that watch now."""
        return self._count

    def drain(self) -> None:
        """Sends every watcher away; each can go on, at another server or later, from the revision it has."""
        self._draining = True
        self._ring_all()

    async def stop(self) -> None:
        """Stops listening."""
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader

    async def watch(self, job_id: str, after_revision: int) -> AsyncGenerator[Job]:
        """Yields the job after each change later than `after_revision`, until its end.

        Each is the whole job as it was then (its result apart). Changes that are no longer kept are passed over. The job at its
        end is always the last, also when `after_revision` is that very revision.

        Raises:
            JobNotFound (also when the job is deleted meanwhile), RevisionOutOfRange, QueueFull, StoreUnavailable, Draining.
        """
        with self._place(job_id) as changed:
            first = True
            while True:
                # Cleared before the look: what changes during it rings again.
                changed.clear()
                kept = await self._store.kept(job_id)
                now = read_job(kept.fields)
                if first and after_revision > now.revision:
                    raise RevisionOutOfRange(job_id=job_id, after_revision=after_revision, revision=now.revision)
                if now.revision > after_revision:
                    for job in history(kept):
                        if job.revision > after_revision:
                            yield job
                elif now.ended or now.revision < after_revision:
                    # Asked for again after its end; or Redis has come back without the last changes, and it goes on from there.
                    yield now
                after_revision = now.revision
                if now.ended:
                    return
                if self._draining:
                    raise Draining
                first = False
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await changed.wait()

    @contextmanager
    def _place(self, job_id: str) -> Iterator[asyncio.Event]:
        if self._count >= self._max_watchers:
            raise QueueFull(
                f"{self._count} callers watch jobs; the limit is {self._max_watchers}.",
                cure="Ask with GetJob, try again later, or raise QUEUE_MAX_WATCHERS.",
                limit=self._max_watchers,
            )
        changed = asyncio.Event()
        self._count += 1
        self._waiting.setdefault(job_id, set()).add(changed)
        try:
            yield changed
        finally:
            self._count -= 1
            self._waiting[job_id].discard(changed)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def ring(self, job_id: str) -> None:
        """Has the job's watchers look at it."""
        for changed in self._waiting.get(job_id, ()):
            changed.set()

    def _ring_all(self) -> None:
        for job_id in list(self._waiting):
            self.ring(job_id)

    async def _read_door(self) -> None:
        client = self._connection.open_blocking_client()
        position: bytes | str = "$"
        try:
            while True:
                try:
                    if position == "$":
                        last = await self._connection.ask(client.xrevrange(keys.DOOR, count=1))
                        position = last[0][0] if last else "0-0"
                        # Whatever happened before this position, the watchers look for themselves.
                        self._ring_all()
                    reply = await self._connection.ask(
                        client.xread({keys.DOOR: position}, count=1000, block=round(DOOR_BLOCK_S * 1000)),
                        timeout_s=2 * DOOR_BLOCK_S,
                    )
                    for _, entries in reply or ():
                        for entry_id, fields in entries:
                            position = entry_id
                            self.ring(fields[b"j"].decode())
                    # What changes meanwhile comes together: under load one read in place of many.
                    await asyncio.sleep(GATHER_S)
                except StoreUnavailable as error:
                    _log.debug("the door does not answer", error=str(error))
                    # A Redis that was emptied meanwhile begins its stream anew: start from its end, not from our position.
                    position = "$"
                    self._ring_all()
                    await asyncio.sleep(0.5)
        finally:
            await close(client)
