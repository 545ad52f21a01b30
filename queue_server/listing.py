"""Lists jobs, page by page, the newest first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from queue_server import keys
from queue_server.connection import Connection
from queue_server.jobs import Job, JobFilter
from queue_server.records import Fields, read_fields, read_job

# Records looked at for one page of a list whose filter finds little; the page ends there and its token goes on from there.
MAX_SCANNED = 2000
# Records read in one round trip.
CHUNK = 100


@dataclass(frozen=True)
class Page:
    """A page of a list; `cursor` is where the next one begins, empty after the last."""

    jobs: tuple[Job, ...]
    cursor: str


class Listing:
    """Reads records alone: lists never load images or results."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list_jobs(self, wanted: JobFilter, page_size: int, cursor: str) -> Page:
        """A page of jobs, the newest first; short, or empty, with a cursor where the filter finds little."""
        index = keys.ALL
        if wanted.client is not None:
            index = keys.by_client(wanted.client)
        elif len(wanted.states) == 1:
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
