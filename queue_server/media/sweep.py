"""Deletes the objects that no file needs any more; as many servers as there are may do so at once."""

from __future__ import annotations

import asyncio

from queue_server import keys
from queue_server.connection import Connection
from queue_server.media.objects import Objects
from queue_server.settings import QueueSettings
from serving.errors import ServiceError
from serving.logs import get_logger

# Objects deleted in one round.
LIMIT = 100
# An object that could not be deleted is tried again after this time; no other server takes it before.
AGAIN_MS = 60_000
# An object whose file a job needs is looked at this often at least.
PINNED_S = 600.0

_log = get_logger("media")


class ObjectSweep:
    """start() begins to sweep."""

    def __init__(self, connection: Connection, objects: Objects, settings: QueueSettings) -> None:
        self._connection = connection
        self._objects = objects
        self._interval_s = settings.media_sweep_s
        # No file that a job lets go dies sooner than after keep_media_s.
        self._pinned_ms = round(min(PINNED_S, settings.keep_media_s) * 1000)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to sweep."""
        self._task = asyncio.create_task(self._sweep(), name="objects")

    async def stop(self) -> None:
        """Ends it; what has not been deleted comes again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _sweep(self) -> None:
        silent = False
        while True:
            try:
                while await self.sweep_once() == LIMIT:
                    pass
                silent = False
            except ServiceError as error:
                if not silent:
                    _log.warning("cannot delete files whose lifetime has passed", error=str(error))
                silent = True
            except Exception:
                _log.exception("sweeping the files failed once")
            await asyncio.sleep(self._interval_s)

    async def sweep_once(self) -> int:
        """Deletes what is due; how many objects. Raises MediaStoreUnavailable, StoreUnavailable."""
        parameters = {"limit": LIMIT, "again_ms": AGAIN_MS, "pinned_ms": self._pinned_ms}
        names = [name.decode() for name in await self._connection.run("sweep_objects", parameters)]
        for name in names:
            await self._objects.delete(name)
            await self._connection.ask(self._connection.client.zrem(keys.OBJECTS, f"{name} -"))
            _log.debug("object deleted", object=name)
        return len(names)
