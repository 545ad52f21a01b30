"""Finds out which accepted jobs Redis came back without, and says so to whoever asks for one.

Redis keeps what it has written to disk (appendfsync everysec: all but the last second of a power loss) or has sent to the replica
that takes over. So each queue server remembers the jobs that it has acknowledged last; when another Redis answers than before
(INFO's run_id), it looks for each of them. What is gone is logged, counted, and told as JOB_LOST, by all queue servers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, Counter

from queue_server import keys
from queue_server.connection import Connection
from queue_server.errors import JobLost, JobNotFound, QueueFull
from serving.logs import get_logger

# Redis is at most about 2 s behind with a disk that keeps up, and holds its callers back when the disk does not.
REMEMBERED_S = 15.0
MAX_REMEMBERED = 200_000
"""Jobs of those seconds; about 60 MB."""
# How long a lost job's id is answered with JOB_LOST.
TOLD_MS = 24 * 3600 * 1000
# After a failover a last call may still have been acknowledged by the server that was demoted: those are looked for once more.
AGAIN_S = 5.0
# The other queue servers find out what they have lost within this time.
SETTLED_S = 2.0
CHUNK = 1000
MAX_LOGGED = 100

_log = get_logger("lost")


class LostJobs:
    """`wake` is called with the id of each lost job, for those who watch it."""

    def __init__(self, connection: Connection, wake: Callable[[str], None]) -> None:
        self._connection = connection
        self._wake = wake
        self._accepted: dict[str, tuple[float, str]] = {}
        self._lost: dict[str, str] = {}
        self._life = ""
        self._changed_s = 0.0
        self._again_s = 0.0
        self._looking = asyncio.Lock()
        self._counter = Counter(
            "ai4thai_queue_jobs_lost_total",
            "Jobs that this server had accepted and Redis came back without.",
            registry=None,
        )

    def register(self, registry: CollectorRegistry) -> None:
        """Adds the counter to a registry."""
        registry.register(self._counter)

    def unregister(self, registry: CollectorRegistry) -> None:
        """Takes it out again."""
        registry.unregister(self._counter)

    def accepted(self, job_id: str, request_id: str) -> None:
        """A job is about to be acknowledged."""
        self._accepted.pop(job_id, None)
        self._accepted[job_id] = (time.monotonic(), request_id)
        if len(self._accepted) > MAX_REMEMBERED:
            del self._accepted[next(iter(self._accepted))]

    def deleted(self, job_id: str) -> None:
        """A job is gone because it was to go."""
        self._accepted.pop(job_id, None)

    async def look(self) -> None:
        """To be called every second: looks for the accepted jobs if it is another Redis that answers now.

        Raises:
            StoreUnavailable: it does not answer; nothing is forgotten meanwhile.
        """
        async with self._looking:
            info = await self._connection.ask(self._connection.client.info("server"))
            life, now_s = str(info.get("run_id", "")), time.monotonic()
            if life != self._life:
                if self._life:
                    self._changed_s, self._again_s = now_s, now_s + AGAIN_S
                    _log.warning("Redis was restarted, or another took over", accepted_lately=len(self._accepted))
                await self._compare()
                # Only now: a comparison that broke off is made again.
                self._life = life
            elif self._again_s and now_s >= self._again_s:
                await self._compare()
                self._again_s = 0.0
            elif not self._again_s:
                self._forget_older_than(now_s - REMEMBERED_S)

    @asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        """Around what raises JobNotFound: raises JobLost where that is the truth."""
        try:
            yield
        except JobNotFound as error:
            job_id = error.metadata["job_id"]
            request_id = await self._find(job_id)
            if request_id is None:
                raise
            raise JobLost(job_id=job_id, request_id=request_id) from None

    async def _find(self, job_id: str) -> str | None:
        """The request_id of a lost job; None: it was not lost."""
        if job_id not in self._lost:
            # Redis may have come back since the last look.
            await self.look()
        if job_id in self._lost:
            return self._lost[job_id]
        kept = await self._shared(job_id)
        settled_in_s = self._changed_s + SETTLED_S - time.monotonic() if self._changed_s else 0.0
        if kept is None and settled_in_s > 0:
            await asyncio.sleep(settled_in_s)
            kept = await self._shared(job_id)
        return kept

    async def _shared(self, job_id: str) -> str | None:
        value: bytes | None = await self._connection.ask(self._connection.client.get(keys.lost(job_id)))
        return None if value is None else value.decode()

    def _forget_older_than(self, since_s: float) -> None:
        for job_id, (accepted_s, _) in list(self._accepted.items()):
            if accepted_s >= since_s:
                return
            del self._accepted[job_id]

    async def _compare(self) -> None:
        ids = list(self._accepted)
        gone: list[str] = []
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            pipeline = self._connection.client.pipeline(transaction=False)
            for job_id in chunk:
                pipeline.exists(keys.job(job_id))
            there = await self._connection.ask(pipeline.execute())
            # One that was deleted meanwhile is no longer remembered.
            gone += [
                job_id for job_id, found in zip(chunk, there, strict=True) if not found and job_id in self._accepted
            ]
        for start in range(0, len(gone), CHUNK):
            await self._share(gone[start : start + CHUNK])
        for number, job_id in enumerate(gone):
            _, request_id = self._accepted.pop(job_id, (0.0, ""))
            self._lost[job_id] = request_id
            if len(self._lost) > MAX_REMEMBERED:
                del self._lost[next(iter(self._lost))]
            if number < MAX_LOGGED:
                _log.error(
                    "job lost: it was accepted, and Redis came back without it",
                    job_id=job_id,
                    client_request_id=request_id,
                )
            self._wake(job_id)
        if gone:
            self._counter.inc(len(gone))
            _log.error("jobs lost: their submitters are to submit them again", count=len(gone), looked_for=len(ids))

    async def _share(self, gone: list[str]) -> None:
        """Through Redis, for the other queue servers and for this one after a restart."""
        pipeline = self._connection.client.pipeline(transaction=False)
        for job_id in gone:
            pipeline.set(keys.lost(job_id), self._accepted.get(job_id, (0.0, ""))[1], px=TOLD_MS)
        try:
            await self._connection.ask(pipeline.execute())
        except QueueFull as error:
            _log.warning("only this server can tell which jobs were lost", error=str(error), count=len(gone))
