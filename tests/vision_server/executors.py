"""An executor of numbers, whose batches the tests can see, hold back and break."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from vision_server.batcher import Batcher
from vision_server.lanes import Replica


class Executor:
    """Doubles numbers; negative ones fail by themselves, `poison` and `breaks` make the whole call raise.

    While the gate is closed, calls wait but those with `impatient` ones; `begun` counts the calls that have come so far.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = 0
        self.gate = threading.Event()
        self.gate.set()
        self.breaks = False
        self.poison: set[int] = set()
        self.impatient: set[int] = set()
        self.rebuilt = 0

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.begun += 1
        if not self.impatient.intersection(items):
            self.gate.wait(20)
        self.batches.append(list(items))
        if self.breaks:
            raise RuntimeError("the executor is broken")
        if self.poison.intersection(items):
            raise ValueError("one of the items is poison")
        return [ValueError(f"{item} is bad") if item < 0 else item * 2 for item in items]

    def rebuild(self) -> None:
        """Mends it."""
        self.rebuilt += 1
        self.breaks = False


@asynccontextmanager
async def serving(*executors: Executor, lanes: int = 1, rebuilds: bool = False, **how: Any) -> AsyncIterator[Any]:
    """A batcher over a replica for each executor."""
    replicas = [
        Replica(f"device:{number}", executor, lanes=lanes, rebuild=executor.rebuild if rebuilds else None)
        for number, executor in enumerate(executors)
    ]
    batcher: Batcher[int, int] = Batcher(
        "doubler", replicas, **{"max_batch": 4, "max_delay_ms": 0, "max_queued": 1000, **how}
    )
    batcher.start()
    try:
        yield batcher
    finally:
        for executor in executors:
            executor.gate.set()
        async with asyncio.timeout(10):
            await batcher.stop()


async def until(true: Callable[[], object]) -> None:
    """Waits until something has come about."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110  # seen from outside
            await asyncio.sleep(0.001)


async def busy(batcher: Batcher[int, int], *executors: Executor) -> list[asyncio.Task[Any]]:
    """Occupies each executor with an item of its own (1, 1, …) until its gate opens."""
    tasks = []
    for executor in executors:
        executor.gate.clear()
    for wanted in range(1, len(executors) + 1):
        tasks.append(asyncio.create_task(batcher.submit(1)))
        await until(lambda wanted=wanted: sum(executor.begun for executor in executors) == wanted)
    return tasks


async def settle() -> None:
    """Lets everything come about that takes no more than turns of the loop."""
    for _ in range(5):
        await asyncio.sleep(0)
