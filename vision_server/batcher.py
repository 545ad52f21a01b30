"""Gathers items of many callers into batches for its executors; knows nothing of images or models.

submit ─► waiting (bounded) ─► a batch, at once when an executor is idle ─► executor thread ─► each waiter's own outcome
               └─ a waiter that is cancelled or past its deadline leaves before the batch forms
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from serving.logs import get_logger
from vision_server.errors import DeadlinePassed, Draining, Fault, QueueFull

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = get_logger("batcher")

# How fast the guess at an item's time follows what is measured.
_LEARNING_RATE = 0.2


@dataclass(frozen=True, slots=True)
class Batched(Generic[Result]):
    """A result with how it came about."""

    result: Result
    queue_ms: float
    batch_size: int


class _Waiter(Generic[Item, Result]):
    __slots__ = ("deadline_s", "entered_s", "future", "item")

    def __init__(self, item: Item, future: asyncio.Future[Batched[Result]], deadline_s: float | None) -> None:
        self.item = item
        self.future = future
        self.deadline_s = deadline_s
        self.entered_s = time.perf_counter()


class Batcher(Generic[Item, Result]):
    """Executor threads behind one bounded queue. Lives on one event loop; start() and stop() act.

    `execute` takes items and answers as many outcomes in their order: a result, or the exception that is that item's own. When
    it raises as a whole, its items fail with Fault; those that wait are served after them.
    """

    def __init__(
        self,
        name: str,
        execute: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        max_batch: int,
        max_delay_ms: float,
        max_queued: int,
        executors: int = 1,
        begin_thread: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception], object] = lambda _: None,
    ) -> None:
        self.name = name
        self._execute = execute
        self._max_batch = max_batch
        self._max_delay_s = max_delay_ms / 1000
        self._max_queued = max_queued
        self._waiting: deque[_Waiter[Item, Result]] = deque()
        self._came = asyncio.Event()
        self._executors = executors
        self._on_failure = on_failure
        self._threads = ThreadPoolExecutor(executors, thread_name_prefix=f"executor {name}", initializer=begin_thread)
        self._idle = asyncio.Semaphore(executors)
        self._running: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._seconds_per_item = 0.05  # a first guess, for the retry delay; learned from the batches
        self.busy_s = 0.0

    def start(self) -> None:
        """Begins to serve."""
        self._task = asyncio.create_task(self._serve(), name=f"batcher {self.name}")

    async def stop(self) -> None:
        """Ends after the batch that runs; who still waits is told that the server leaves."""
        self._stopped = True
        self._came.set()
        if self._task is not None:
            await self._task
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(Draining())
        self._threads.shutdown(wait=False)

    @property
    def depth(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    def estimate_s(self) -> float:
        """How long what waits now will take, in seconds, by what the last batches took; at least 0.1."""
        return max(0.1, len(self._waiting) * self._seconds_per_item)

    async def submit(self, item: Item, *, deadline_s: float | None = None) -> Batched[Result]:
        """Waits for the item's outcome; `deadline_s` is a moment of time.perf_counter().

        Raises QueueFull, DeadlinePassed, Draining, Fault, or what the executor answered for this item. When the caller is
        cancelled the item leaves the queue; one that is being executed is executed to no use.
        """
        if self._stopped:
            raise Draining
        if len(self._waiting) >= self._max_queued:
            self._drop_the_gone()
        if len(self._waiting) >= self._max_queued:
            raise QueueFull(
                what=f"items for {self.name}",
                waiting=len(self._waiting),
                limit=self._max_queued,
                retry_after_s=self.estimate_s(),
            )
        waiter: _Waiter[Item, Result] = _Waiter(item, asyncio.get_running_loop().create_future(), deadline_s)
        self._waiting.append(waiter)
        self._came.set()
        return await waiter.future

    async def _serve(self) -> None:
        while not self._stopped:
            if not self._waiting:
                self._came.clear()
                await self._came.wait()
                continue
            if self._idle.locked():
                # Every executor is busy: what comes meanwhile joins the next batch.
                await self._idle.acquire()
                await self._gather()
            else:
                await self._idle.acquire()
            batch = [] if self._stopped else self._take()
            if not batch:
                self._idle.release()
                continue
            task = asyncio.create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        if self._running:
            await asyncio.wait(self._running)

    async def _run(self, batch: list[_Waiter[Item, Result]]) -> None:
        began_s = time.perf_counter()
        outcomes: Sequence[Result | Exception]
        try:
            work = asyncio.get_running_loop().run_in_executor(
                self._threads, self._execute, [waiter.item for waiter in batch]
            )
            outcomes = await work
            if len(outcomes) != len(batch):
                raise RuntimeError(f"the executor answered {len(outcomes)} outcomes for {len(batch)} items")
        except Exception as error:
            _log.exception("a batch failed", model=self.name, batch_size=len(batch))
            self._on_failure(error)
            outcomes = [Fault(self.name) for _ in batch]
        finally:
            self._idle.release()
        took_s = time.perf_counter() - began_s
        self.busy_s += took_s / self._executors
        self._seconds_per_item += _LEARNING_RATE * (took_s / len(batch) / self._executors - self._seconds_per_item)
        self._answer(batch, outcomes, began_s)

    async def _gather(self) -> None:
        """After a batch, lets the next one fill until it is full or its oldest item has waited long enough."""
        while not self._stopped and 0 < len(self._waiting) < self._max_batch:
            left_s = self._waiting[0].entered_s + self._max_delay_s - time.perf_counter()
            if left_s <= 0:
                return
            self._came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._came.wait()

    def _take(self) -> list[_Waiter[Item, Result]]:
        """The next batch, oldest first; who has left is passed over, who is too late is told so."""
        batch: list[_Waiter[Item, Result]] = []
        now_s = time.perf_counter()
        while self._waiting and len(batch) < self._max_batch:
            waiter = self._waiting.popleft()
            if waiter.future.done():
                continue
            if waiter.deadline_s is not None and waiter.deadline_s <= now_s:
                waiter.future.set_exception(DeadlinePassed((now_s - waiter.entered_s) * 1000))
                continue
            batch.append(waiter)
        return batch

    def _answer(
        self,
        batch: Sequence[_Waiter[Item, Result]],
        outcomes: Sequence[Result | Exception],
        began_s: float,
    ) -> None:
        for waiter, outcome in zip(batch, outcomes, strict=True):
            if waiter.future.done():
                continue  # the caller left while its item was executed
            if isinstance(outcome, Exception):
                waiter.future.set_exception(outcome)
            else:
                queue_ms = (began_s - waiter.entered_s) * 1000
                waiter.future.set_result(Batched(outcome, queue_ms, len(batch)))

    def _drop_the_gone(self) -> None:
        """Makes room of those who were cancelled while they waited."""
        self._waiting = deque(waiter for waiter in self._waiting if not waiter.future.done())
