"""Moves on the jobs that time moves on: due, expired, lost with their worker, lost with their message, past their lifetime.

Runs in each queue server; every sweep is a script that does nothing the second time, so several may run at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from queue_server import statuses
from queue_server.errors import JobExpired, StoreUnavailable, WorkerLost
from queue_server.jobs import Priority
from queue_server.lines import of_row
from queue_server.metrics import JobMetrics
from queue_server.records import write_status
from queue_server.settings import QueueSettings
from queue_server.statistics import Statistics
from queue_server.store import SWEPT, Store
from queue_server.work import KINDS
from serving.logs import get_logger

# The gauges and the lost messages can wait for a few ticks.
METRICS_S = 2.0
OVERDUE_EVERY_S = 5.0

_log = get_logger("sweeper")


class Sweeper:
    """start() begins to sweep, each QUEUE_SWEEP_S."""

    def __init__(self, store: Store, statistics: Statistics, metrics: JobMetrics, settings: QueueSettings) -> None:
        self._store = store
        self._statistics = statistics
        self._metrics = metrics
        self._settings = settings
        self._task: asyncio.Task[None] | None = None
        self._ended_s = time.monotonic()
        self._leases_from_s = 0.0
        self._overdue_from_s = 0.0
        self._metrics_from_s = 0.0

    async def start(self) -> None:
        """Begins to sweep in the background."""
        self._task = asyncio.create_task(self._run(), name="sweeper")

    async def stop(self) -> None:
        """Stops after the script that runs."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    @property
    def idle_s(self) -> float:
        """Seconds since the last round ended well; since the start before the first."""
        return time.monotonic() - self._ended_s

    async def _run(self) -> None:
        while True:
            try:
                await self.sweep()
                self._ended_s = time.monotonic()
            except StoreUnavailable as error:
                _log.debug("cannot sweep", error=str(error))
                # While Redis was away no lease could be renewed.
                self._spare_leases()
            except Exception:
                # Sweeping must go on: whatever this was, it is looked for again in the next round.
                _log.exception("a sweep failed")
            slept_from_s = time.time()
            await asyncio.sleep(self._settings.sweep_s)
            # The machine, and whoever else is on it, stood still, or its clock leapt: Redis' clock, by which leases end, with it.
            # Of a lease that is renewed in time, more than half is left at any moment.
            if time.time() - slept_from_s > self._settings.sweep_s + self._settings.lease_s / 2:
                self._spare_leases()

    def _spare_leases(self) -> None:
        """The workers get a whole lease to renew theirs before any counts as lost."""
        self._leases_from_s = time.monotonic() + self._settings.lease_s

    async def sweep(self) -> None:
        """Does one round; raises StoreUnavailable."""
        async for row in self._all("sweep_due"):
            _log.info("job QUEUED: its time has come", **of_row(row))
        expired = write_status(statuses.write_error(JobExpired()))
        async for row in self._all("sweep_expired", expired=expired):
            _log.info("job EXPIRED: its deadline has passed", **of_row(row))
        if time.monotonic() >= self._leases_from_s:
            await self._sweep_lost()
        if time.monotonic() >= self._overdue_from_s:
            self._overdue_from_s = time.monotonic() + min(OVERDUE_EVERY_S, self._settings.overdue_s)
            await self._sweep_overdue()
            await self._store.release_held()
        async for row in self._all("sweep_forgotten"):
            _log.info("job forgotten: its lifetime has passed", **of_row(row))
        if time.monotonic() >= self._metrics_from_s:
            self._metrics_from_s = time.monotonic() + METRICS_S
            self._metrics.update(await self._statistics.totals(tuple(KINDS)), await self._statistics.store_totals())

    async def _all(self, script: str, **parameters: object) -> AsyncIterator[list[str]]:
        """Every job that a script moves, however many there are."""
        while True:
            moved = await self._store.sweep(script, **parameters)
            for row in moved:
                yield row
            if len(moved) < SWEPT:
                return

    async def _sweep_lost(self) -> None:
        errors: dict[str, str] = {}
        # The script knows who was lost, this process how to write a Status: first the names, then with a Status for each.
        while True:
            moved = await self._store.sweep("sweep_lost", errors=errors)
            for row in moved:
                state, worker = row[3:]
                if state == "UNKNOWN":
                    errors[worker] = write_status(statuses.write_error(WorkerLost(worker=worker)))
                else:
                    _log.warning(f"job {state}: its worker stopped answering", **of_row(row), worker=worker)
            if not any(row[3] == "UNKNOWN" for row in moved) and len(moved) < SWEPT:
                return

    async def _sweep_overdue(self) -> None:
        # One run a time: those that were sent again are overdue no more.
        for row in await self._store.sweep(
            "sweep_overdue",
            priorities=[priority.value for priority in Priority],
            overdue_ms=round(self._settings.overdue_s * 1000),
        ):
            _log.warning("job sent again: nobody had its message", **of_row(row))
