"""Pauses, resumes and purges queues: the operator's hand."""

from __future__ import annotations

from collections.abc import AsyncIterator

from queue_server.connection import Connection
from queue_server.errors import QueueFull, QueueNotFound
from queue_server.settings import QueueSettings

# Jobs moved by one run of a script, so that Redis' other callers are not held up for longer than some milliseconds.
STEP = 200


class Queues:
    """Each of these may be repeated."""

    def __init__(self, connection: Connection, settings: QueueSettings) -> None:
        self._connection = connection
        self._settings = settings

    async def pause(self, queue: str) -> None:
        """Stops handing out a queue's jobs, also before its first; raises QueueFull."""
        if not await self._connection.run("pause", {"queue": queue}):
            limit = self._settings.max_queues
            raise QueueFull(
                f"{limit} queues are paused already, which is the limit.",
                cure="Resume some, or raise QUEUE_MAX_QUEUES.",
                limit=limit,
            )

    async def resume(self, queue: str) -> None:
        """Hands out a queue's jobs again; one that is not paused stays as it is."""
        while await self._connection.run("resume", {"queue": queue, "limit": STEP}) >= STEP:
            pass

    async def purge(self, queue: str) -> AsyncIterator[list[str]]:
        """Cancels the jobs that wait now; yields each one's id, request_id and trace. Raises QueueNotFound."""
        before_ms = 0
        while True:
            time_ms, moved = await self._connection.run(
                "purge", {"queue": queue, "limit": STEP, "before_ms": before_ms}
            )
            before_ms = int(time_ms)
            if before_ms < 0:
                raise QueueNotFound(queue=queue)
            for row in moved:
                yield [part.decode() for part in row]
            if not moved:
                return
