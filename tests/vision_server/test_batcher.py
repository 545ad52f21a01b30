"""The batcher: who shares a batch, who leaves, who is refused, and that one's fate is nobody else's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ServiceError
from vision_server.batcher import Batcher


class Executor:
    """Doubles numbers; odd ones can be told to fail, the gate holds batches back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.breaks = False

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.gate.wait(5)
        self.batches.append(list(items))
        if self.breaks:
            raise RuntimeError("the executor is broken")
        return [ValueError(f"{item} is bad") if item < 0 else item * 2 for item in items]


@asynccontextmanager
async def serving(
    executor: Executor, max_batch: int = 4, max_delay_ms: float = 0, max_queued: int = 100, executors: int = 1
) -> AsyncIterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher(
        "doubler", executor, max_batch=max_batch, max_delay_ms=max_delay_ms, max_queued=max_queued, executors=executors
    )
    batcher.start()
    try:
        yield batcher
    finally:
        executor.gate.set()
        await batcher.stop()


async def busy(batcher: Batcher[int, int], executor: Executor) -> asyncio.Task[object]:
    """Occupies the executor with one item until the gate opens."""
    executor.gate.clear()
    task: asyncio.Task[object] = asyncio.create_task(batcher.submit(1))
    await asyncio.sleep(0.05)
    return task


async def test_an_idle_executor_is_given_an_item_at_once() -> None:
    executor = Executor()
    async with serving(executor, max_delay_ms=10_000) as batcher:
        done = await asyncio.wait_for(batcher.submit(21), 2)
    assert (done.result, done.batch_size) == (42, 1)


async def test_what_comes_while_the_executor_is_busy_shares_the_next_batch() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        first = await busy(batcher, executor)
        others = [asyncio.create_task(batcher.submit(number)) for number in (2, 3, 4, 5, 6)]
        await asyncio.sleep(0.05)
        executor.gate.set()
        answers = await asyncio.gather(*others)
        await first
    assert executor.batches == [[1], [2, 3, 4, 5], [6]]
    assert [answer.batch_size for answer in answers] == [4, 4, 4, 4, 1]


async def test_gathering_ends_when_the_oldest_has_waited_long_enough() -> None:
    executor = Executor()
    async with serving(executor, max_delay_ms=150) as batcher:
        first = await busy(batcher, executor)
        second = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.02)
        executor.gate.set()
        await first
        # The executor is idle again, but `2` still gathers; `3` comes in time to join it.
        third = asyncio.create_task(batcher.submit(3))
        await asyncio.gather(second, third)
    assert executor.batches == [[1], [2, 3]]


async def test_a_waiter_that_leaves_never_reaches_the_executor_nor_disturbs_the_others() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        first = await busy(batcher, executor)
        leaver, stayer = asyncio.create_task(batcher.submit(2)), asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.sleep(0)
        executor.gate.set()
        assert (await stayer).result == 6
        await first
    assert executor.batches == [[1], [3]]
    assert leaver.cancelled()


async def test_an_expired_waiter_is_told_so_and_not_computed() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        first = await busy(batcher, executor)
        late = asyncio.create_task(batcher.submit(2, deadline_s=time.perf_counter() + 0.01))
        await asyncio.sleep(0.05)
        executor.gate.set()
        with pytest.raises(ServiceError) as caught:
            await late
        await first
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert executor.batches == [[1]]


async def test_a_bad_item_fails_alone() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        first = await busy(batcher, executor)
        bad, good = asyncio.create_task(batcher.submit(-2)), asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0)
        executor.gate.set()
        assert (await good).result == 6
        with pytest.raises(ValueError, match="-2 is bad"):
            await bad
        await first


async def test_an_executor_that_raises_fails_its_items_and_serves_the_next() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        executor.breaks = True
        with pytest.raises(ServiceError) as caught:
            await batcher.submit(1)
        executor.breaks = False
        assert (await batcher.submit(2)).result == 4
    assert caught.value.code == "INTERNAL"
    assert "broken" not in str(caught.value)


async def test_full_is_refused_with_a_delay_and_those_who_left_make_room() -> None:
    executor = Executor()
    async with serving(executor, max_queued=2) as batcher:
        first = await busy(batcher, executor)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(ServiceError) as caught:
            await batcher.submit(4)
        waiting[0].cancel()
        await asyncio.sleep(0)
        fifth = asyncio.create_task(batcher.submit(5))
        await asyncio.sleep(0)
        executor.gate.set()
        assert (await fifth).result == 10
        await asyncio.gather(first, waiting[1])
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 0.1


async def test_stopping_tells_those_who_wait() -> None:
    executor = Executor()
    async with serving(executor, max_delay_ms=10_000) as batcher:
        first = await busy(batcher, executor)
        waiting = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.02)
        executor.gate.set()
        await stopping
        assert (await first).result == 2  # type: ignore[attr-defined]
        with pytest.raises(ServiceError, match="shutting down"):
            await waiting


async def test_two_executors_run_side_by_side() -> None:
    executor = Executor()
    async with serving(executor, max_batch=1, executors=2) as batcher:
        executor.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0.05)
        assert batcher.depth == 1  # two are being executed
        executor.gate.set()
        await asyncio.gather(*tasks)
    assert sorted(executor.batches) == [[1], [2], [3]]


steps = st.lists(
    st.tuples(st.sampled_from(["good", "bad", "leaves", "late"]), st.integers(0, 3)), min_size=1, max_size=40
)


@settings(max_examples=40, deadline=None)
@given(steps=steps, max_batch=st.integers(1, 5), executors=st.integers(1, 3))
def test_everyone_gets_their_own_outcome_in_any_mix(
    steps: list[tuple[str, int]], max_batch: int, executors: int
) -> None:
    async def run() -> None:
        executor = Executor()
        async with serving(executor, max_batch=max_batch, executors=executors) as batcher:
            tasks = []
            for number, (kind, pause) in enumerate(steps, start=1):
                item = -number if kind == "bad" else number
                deadline_s = time.perf_counter() - 1 if kind == "late" else None
                task = asyncio.create_task(batcher.submit(item, deadline_s=deadline_s))
                tasks.append(task)
                for _ in range(pause):
                    await asyncio.sleep(0)
                if kind == "leaves":
                    task.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        for number, ((kind, _), outcome) in enumerate(zip(steps, outcomes, strict=True), start=1):
            if kind == "good":
                assert outcome.result == number * 2  # type: ignore[union-attr]
                assert outcome.batch_size <= max_batch  # type: ignore[union-attr]
            elif kind == "bad":
                assert isinstance(outcome, ValueError)
            elif kind == "late":
                assert isinstance(outcome, ServiceError)
            else:
                # Who leaves early enough is gone; the answer may have been quicker.
                assert isinstance(outcome, asyncio.CancelledError) or outcome.result == number * 2  # type: ignore[union-attr]
        assert all(len(batch) <= max_batch for batch in executor.batches)
        computed = [item for batch in executor.batches for item in batch]
        assert len(computed) == len(set(computed))

    asyncio.run(run())
