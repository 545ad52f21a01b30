"""Gathers items of many callers into batches for its devices; knows nothing of images or models.

submit ─► in line (bounded, by priority and age) ─► a batch, at once when a lane is free ─► lanes ─► each one's own outcome
               └─ who is cancelled, or past the deadline, leaves before the batch forms
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from serving.errors import ServiceError
from vision_server.errors import DeadlinePassed, Draining, ModelBroken, QueueFull, WaitTooLong
from vision_server.lanes import Computed, Lanes, Replica
from vision_server.line import Line
from vision_server.requests import Priority

Item = TypeVar("Item")
Result = TypeVar("Result")

# Guesses before anything was measured.
_FIRST_ITEM_S = 0.05
_SHORTEST_ESTIMATE_S = 0.1

# uvloop's timers count whole milliseconds: what is left below half of one would be waited for in circles.
_TIMER_STEP_S = 0.0005


@dataclass(frozen=True, slots=True)
class Batched(Generic[Result]):
    """A result with how it came about; `queue_ms` is from submit() until the batch began."""

    result: Result
    queue_ms: float
    batch_size: int


class _Waiter(Generic[Item, Result]):
    __slots__ = ("deadline_s", "entered_s", "future", "item")

    def __init__(
        self, item: Item, future: asyncio.Future[Batched[Result]], entered_s: float, deadline_s: float | None
    ) -> None:
        self.item = item
        self.future = future
        self.entered_s = entered_s
        self.deadline_s = deadline_s

    def expired(self, now_s: float) -> bool:
        return self.deadline_s is not None and self.deadline_s <= now_s

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            # A future takes no StopIteration, and the batch mates after it would never be answered.
            self.future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)


class Batcher(Generic[Item, Result]):
    """Replicas behind one bounded line. Lives on one event loop; start() and stop() act.

    A batch goes to the least loaded replica, at once while one is free: what comes in the same turn of the loop shares it, and
    several free lanes share what waits. When all were busy, the next batch gathers until it is full or its oldest item has
    waited for `max_delay_ms`. The order is that of Line, with `ageing_ms`. How replicas break, are rebuilt and are given up
    (`stuck_after_s`, `rebuild_within_s`) is told in lanes.py. `on_failure` is called with what an executor raised as a whole,
    `on_broken` once, with the reason, when no replica is left (from then on everyone gets ModelBroken); both on the loop.
    """

    def __init__(
        self,
        name: str,
        replicas: Sequence[Replica[Item, Result]],
        *,
        max_batch: int,
        max_delay_ms: float,
        max_queued: int,
        ageing_ms: float = 500.0,
        stuck_after_s: float = 60.0,
        rebuild_within_s: float = 300.0,
        max_wait_ms: float = 0.0,
        on_failure: Callable[[Exception], object] = lambda _: None,
        on_broken: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.name = name
        self._max_batch = max_batch
        self._max_delay_s = max_delay_ms / 1000
        self._max_queued = max_queued
        self._max_wait_s = max_wait_ms / 1000
        self._on_broken = on_broken
        self._line: Line[_Waiter[Item, Result]] = Line(ageing_ms / 1000)
        self._replicas = [
            Lanes(
                name,
                replica,
                stuck_after_s=stuck_after_s,
                rebuild_within_s=rebuild_within_s,
                on_free=self._dispatch,
                on_failure=on_failure,
                on_out=self._lost,
            )
            for replica in replicas
        ]
        self._tick_s = min(1.0, stuck_after_s / 10, rebuild_within_s / 10)
        self._watching: asyncio.TimerHandle | None = None
        self._gathering: asyncio.TimerHandle | None = None
        self._dispatching = False  # _dispatch() is called in this turn of the loop
        self._all_busy = False  # what is in line came while no lane was free
        self._quiet = asyncio.Event()  # nothing waits and nothing is computed
        self._quiet.set()
        self._stopped = False
        self._broken = False

    def start(self) -> None:
        """Begins to serve."""
        for lanes in self._replicas:
            lanes.start()
        self._watch()
        self._dispatch()

    async def stop(self) -> None:
        """Ends after the batches that run; who still waits is told that the server leaves."""
        self._stopped = True
        self._fail_all(Draining)
        await self._quiet.wait()
        for lanes in self._replicas:
            lanes.end()
        if self._watching is not None:
            self._watching.cancel()

    async def settle(self) -> None:
        """Waits until nothing waits and nothing is computed (before stop(), where the work is to be done and not refused)."""
        await self._quiet.wait()

    @property
    def depth(self) -> int:
        """Items that wait."""
        return len(self._line)

    @property
    def computing(self) -> int:
        """Batches that are being computed."""
        return sum(lanes.computing for lanes in self._replicas)

    @property
    def capacity(self) -> int:
        """Items that it computes at once when every lane has a full batch."""
        return self._max_batch * sum(lanes.lane_count for lanes in self._replicas)

    @property
    def busy_s(self) -> float:
        """Seconds in which its lanes have computed since the start, averaged over all of them; never falls."""
        weighted_s = sum(lanes.busy_s * lanes.lane_count for lanes in self._replicas)
        return weighted_s / sum(lanes.lane_count for lanes in self._replicas)

    @property
    def busy_s_by_device(self) -> dict[str, float]:
        """The same for each device by its name; of several replicas on one, the mean."""
        by_device: dict[str, list[float]] = {}
        for lanes in self._replicas:
            by_device.setdefault(lanes.device, []).append(lanes.busy_s)
        return {device: sum(each_s) / len(each_s) for device, each_s in by_device.items()}

    def estimate_s(self) -> float:
        """How long what waits now will take, in seconds, by what the last batches took; at least 0.1. Any thread may ask."""
        return max(_SHORTEST_ESTIMATE_S, self._takes_s(len(self._line)))

    def check_room(self, priority: Priority = Priority.STANDARD) -> None:
        """Raises what submit() would, and WaitTooLong when those ahead take longer than `max_wait_ms` (0: any time is right).

        Asked before there is an item (before a picture is decoded), by callers that had rather be told than wait.
        """
        self._check_open()
        if self._max_wait_s:
            wait_s = self._takes_s(self._line.ahead_of(priority, time.perf_counter()))
            if wait_s > self._max_wait_s:
                raise WaitTooLong(self.name, wait_s=wait_s, limit_s=self._max_wait_s)

    async def submit(
        self, item: Item, *, deadline_s: float | None = None, priority: Priority = Priority.STANDARD
    ) -> Batched[Result]:
        """Waits for the item's outcome; `deadline_s` is a moment of time.perf_counter().

        Raises QueueFull, DeadlinePassed, Draining, ExecutorStuck, ModelBroken, Fault, or what the executor answered for this
        item. When the caller is cancelled the item leaves the line at once; one that is being computed is computed to no use.
        """
        self._check_open()
        now_s = time.perf_counter()
        if deadline_s is not None and deadline_s <= now_s:
            raise DeadlinePassed(0)
        loop = asyncio.get_running_loop()
        waiter: _Waiter[Item, Result] = _Waiter(item, loop.create_future(), now_s, deadline_s)
        self._line.add(waiter, priority, now_s)
        self._quiet.clear()
        if not self._dispatching:
            self._dispatching = True
            loop.call_soon(self._dispatch)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._line.remove(waiter)
            self._note_quiet()
            raise

    def _check_open(self) -> None:
        if self._broken:
            raise ModelBroken(self.name)
        if self._stopped:
            raise Draining
        if len(self._line) >= self._max_queued:
            raise QueueFull(
                what=f"items for {self.name}",
                waiting=len(self._line),
                limit=self._max_queued,
                retry_after_s=self.estimate_s(),
            )

    def _takes_s(self, items: int) -> float:
        """How long so many items take, in seconds; 0 when there is nothing left to compute them."""
        items_per_s = sum(
            lanes.lane_count / (lanes.item_s or _FIRST_ITEM_S) for lanes in self._replicas if not lanes.out
        )
        return items / items_per_s if items_per_s else 0.0

    def _dispatch(self) -> None:
        """Gives what waits to the lanes that are free: the one place where batches form."""
        self._dispatching = False
        while self._line:
            free = [lanes for lanes in self._replicas if lanes.free]
            if not free:
                self._all_busy = True
                return
            if self._all_busy and self._gathers():
                return
            # What waits is shared out among the free lanes: one that took all would leave the others nothing to do.
            share = -(-len(self._line) // sum(lanes.free for lanes in free))
            batch = self._take(min(share, self._max_batch))
            if batch:
                least_loaded = min(free, key=_load)
                least_loaded.run([waiter.item for waiter in batch], partial(self._answer, batch))
        self._all_busy = False
        self._note_quiet()

    def _gathers(self) -> bool:
        """Whether the next batch is to fill further, after all lanes were busy; if so, a timer ends that."""
        if len(self._line) >= self._max_batch:
            return False
        left_s = self._line.oldest_s() + self._max_delay_s - time.perf_counter()
        if left_s <= _TIMER_STEP_S:
            return False
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(left_s, self._gathered)
        return True

    def _gathered(self) -> None:
        self._gathering = None
        self._dispatch()

    def _take(self, limit: int) -> list[_Waiter[Item, Result]]:
        """The next batch; who is too late is told so instead."""
        batch: list[_Waiter[Item, Result]] = []
        now_s = time.perf_counter()
        while len(batch) < limit and (waiter := self._line.head()) is not None:
            self._line.remove(waiter)
            if waiter.expired(now_s):
                waiter.fail(DeadlinePassed((now_s - waiter.entered_s) * 1000))
            elif not waiter.future.done():  # else its caller leaves in this very turn of the loop
                batch.append(waiter)
        return batch

    def _answer(self, batch: Sequence[_Waiter[Item, Result]], computed: Computed[Result]) -> None:
        for waiter, outcome in zip(batch, computed.outcomes, strict=True):
            if isinstance(outcome, Exception):
                waiter.fail(outcome)
            elif not waiter.future.done():  # else the caller left while its item was computed
                queue_ms = (computed.began_s - waiter.entered_s) * 1000
                waiter.future.set_result(Batched(outcome, queue_ms, len(batch)))
        self._note_quiet()

    def _watch(self) -> None:
        """Looks again and again for what is stuck, and tells those whose deadline passes in line."""
        self._watching = asyncio.get_running_loop().call_later(self._tick_s, self._watch)
        for lanes in self._replicas:
            lanes.tick(self._tick_s)
        now_s = time.perf_counter()
        for waiter in [waiter for waiter in self._line if waiter.expired(now_s)]:
            self._line.remove(waiter)
            waiter.fail(DeadlinePassed((now_s - waiter.entered_s) * 1000))
        self._note_quiet()

    def _lost(self, why: str) -> None:
        """A replica is out; without one there is nothing to wait for."""
        if self._broken or not all(lanes.out for lanes in self._replicas):
            return
        self._broken = True
        self._fail_all(partial(ModelBroken, self.name))
        self._on_broken(f"The model {self.name!r} does not compute any more: {why}.")

    def _fail_all(self, error: Callable[[], ServiceError]) -> None:
        for waiter in tuple(self._line):
            self._line.remove(waiter)
            waiter.fail(error())
        self._note_quiet()

    def _note_quiet(self) -> None:
        if not self._line and not self.computing:
            self._quiet.set()


def _load(lanes: Lanes[Any, Any]) -> tuple[bool, float, float]:
    """Orders free replicas: one that broke last, else a quick failure would draw all callers; the emptiest, the quickest."""
    return lanes.unproven, -lanes.free / lanes.lane_count, lanes.item_s
