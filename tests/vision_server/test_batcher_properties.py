"""The batcher against a model of it: whatever comes, leaves, expires or fails, everyone gets one outcome, their own."""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
import types
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.errors import ServiceError
from tests.vision_server.executors import Executor, serving, settle, until
from vision_server import batcher as batcher_module
from vision_server.batcher import Batcher
from vision_server.lanes import Replica
from vision_server.requests import Priority

AGEING_S = 0.5


@dataclass(eq=False)
class Caller:
    """What the model knows of a caller."""

    number: int
    priority: Priority
    entered_s: float
    deadline_s: float | None
    bad: bool
    task: asyncio.Task[Any]
    state: str = "waits"

    @property
    def turn(self) -> tuple[float, int, int]:
        return self.entered_s + self.priority * AGEING_S, self.priority, self.number


class Call:
    """A batch that the executor was given; its thread waits until the test answers."""

    def __init__(self, items: Sequence[int]) -> None:
        self.items = list(items)
        self.answer: queue.SimpleQueue[None] = queue.SimpleQueue()


class BatcherMachine(RuleBasedStateMachine):
    """Time is the test's own, and batches end when the test says so; the order and the contents of every batch are foretold."""

    @initialize(max_batch=st.integers(1, 4), lanes=st.integers(1, 3))
    def begin(self, max_batch: int, lanes: int) -> None:
        self.now_s = 100.0
        clock = types.SimpleNamespace(perf_counter=lambda: self.now_s)
        self.patched = patch.object(batcher_module, "time", clock)
        self.patched.start()
        self.runner = asyncio.Runner()
        self.max_batch, self.lanes = max_batch, lanes
        self.numbers = itertools.count(1)
        self.callers: dict[int, Caller] = {}
        self.arrived: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self.computed: list[Call] = []
        self.runner.run(self._start())

    async def _start(self) -> None:
        replica = Replica("cpu", self._execute, lanes=self.lanes)
        self.batcher: Batcher[int, int] = Batcher(
            "model", [replica], max_batch=self.max_batch, max_delay_ms=0, max_queued=10_000, ageing_ms=AGEING_S * 1000
        )
        self.batcher.start()

    def _execute(self, items: Sequence[int]) -> list[int | Exception]:
        call = Call(items)
        self.arrived.put(call)
        call.answer.get(timeout=20)
        return [ValueError(str(item)) if self.callers[item].bad else item * 2 for item in items]

    @property
    def waiting(self) -> list[Caller]:
        return sorted((one for one in self.callers.values() if one.state == "waits"), key=lambda one: one.turn)

    @property
    def live(self) -> list[Caller]:
        return [one for one in self.waiting if one.deadline_s is None or one.deadline_s > self.now_s]

    @property
    def there(self) -> list[Caller]:
        return self.live + [one for one in self.callers.values() if one.state == "computed"]

    @rule(
        priorities=st.lists(st.sampled_from(Priority), min_size=1, max_size=6),
        in_s=st.none() | st.sampled_from([0.1, 0.7]),
        bad=st.booleans(),
    )
    def submit(self, priorities: list[Priority], in_s: float | None, bad: bool) -> None:
        async def work() -> None:
            for index, priority in enumerate(priorities):
                number = next(self.numbers)
                deadline_s = None if in_s is None else self.now_s + in_s
                task = asyncio.create_task(self.batcher.submit(number, deadline_s=deadline_s, priority=priority))
                caller = Caller(number, priority, self.now_s, deadline_s, bad and index == 0, task)
                self.callers[number] = caller

        self._do(work)

    @precondition(lambda self: self.computed)
    @rule(data=st.data())
    def a_batch_ends(self, data: st.DataObject) -> None:
        call = self.computed.pop(data.draw(st.integers(0, len(self.computed) - 1)))
        call.answer.put(None)
        callers = [self.callers[item] for item in call.items]
        for caller in callers:
            caller.state = "answered" if caller.state == "computed" else caller.state

        async def work() -> None:
            async with asyncio.timeout(20):
                await asyncio.wait([caller.task for caller in callers])

        self._do(work)
        for caller in callers:
            if caller.state == "answered":
                error = caller.task.exception()
                if caller.bad:
                    assert str(error) == str(caller.number)
                else:
                    assert error is None
                    assert caller.task.result().result == caller.number * 2
                    assert caller.task.result().batch_size == len(call.items)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def someone_leaves(self, data: st.DataObject) -> None:
        leaver = data.draw(st.sampled_from(self.there))
        leaver.state = "left"

        async def work() -> None:
            leaver.task.cancel()
            await settle()

        self._do(work)
        assert leaver.task.cancelled()

    @rule(passes_s=st.sampled_from([0.05, 0.3, 1.0]))
    def time_passes(self, passes_s: float) -> None:
        self.now_s += passes_s

    def _do(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does something, then compares the batches that the executor was given with those foretold."""

        async def whole() -> None:
            await work()
            await settle()
            live = self.live
            calls: list[Call] = []
            while len(self.computed) + len(calls) < self.lanes and sum(len(call.items) for call in calls) < len(live):
                calls.append(await asyncio.to_thread(self.arrived.get, timeout=20))
            # Lanes begin in any order; together they were given the beginning of the line, as it stood.
            calls.sort(key=lambda call: self.callers[call.items[0]].turn)
            given = [number for call in calls for number in call.items]
            assert given == [one.number for one in live[: len(given)]]
            assert all(1 <= len(call.items) <= self.max_batch for call in calls)
            for number in given:
                self.callers[number].state = "computed"
            self.computed += calls
            # A lane whose callers have all left is free a little later than anyone can see.
            await until(lambda: self.batcher.computing == len(self.computed))
            for one in self.waiting:
                if one.task.done():
                    self._expired(one)

        self.runner.run(whole())

    def _expired(self, caller: Caller) -> None:
        error = caller.task.exception()
        assert isinstance(error, ServiceError)
        assert error.code == "DEADLINE_EXCEEDED"
        assert caller.deadline_s is not None
        assert caller.deadline_s <= self.now_s
        caller.state = "expired"

    @invariant()
    def no_lane_rests_while_someone_waits(self) -> None:
        if hasattr(self, "batcher"):
            assert len(self.computed) == self.lanes or not self.live
            assert self.arrived.empty()

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return

        async def end() -> None:
            for call in self.computed:
                call.answer.put(None)
            everyone = asyncio.gather(*(one.task for one in self.callers.values()), return_exceptions=True)
            async with asyncio.timeout(20):
                while not everyone.done():
                    while not self.arrived.empty():
                        self.arrived.get().answer.put(None)
                    await asyncio.sleep(0.001)
                await self.batcher.settle()
                await self.batcher.stop()

        try:
            self.runner.run(end())
        finally:
            self.runner.close()
            self.patched.stop()


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


kinds = st.sampled_from(["good", "good", "good", "bad", "poison", "leaves", "late", "breaks"])
steps = st.lists(
    st.tuples(kinds, st.sampled_from(Priority), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps, max_batch=st.integers(1, 5), lanes=st.integers(1, 3), devices=st.integers(1, 2))
def test_everyone_gets_one_outcome_in_any_mix_of_failures(
    steps: list[tuple[str, Priority, int]], max_batch: int, lanes: int, devices: int
) -> None:
    async def run() -> None:
        executors = [Executor() for _ in range(devices)]
        broken: list[str] = []
        async with serving(
            *executors, max_batch=max_batch, lanes=lanes, rebuilds=True, on_broken=broken.append
        ) as batcher:
            tasks = []
            for number, (kind, priority, pause) in enumerate(steps, start=1):
                if kind == "breaks":
                    executors[0].breaks = True
                if kind == "poison":
                    for executor in executors:
                        executor.poison.add(number)
                item = -number if kind == "bad" else number
                deadline_s = time.perf_counter() - 1 if kind == "late" else None
                task = asyncio.create_task(batcher.submit(item, deadline_s=deadline_s, priority=priority))
                tasks.append(task)
                for _ in range(pause):
                    await asyncio.sleep(0)
                if kind == "leaves":
                    task.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
            assert batcher.depth == 0
        for number, ((kind, *_), outcome) in enumerate(zip(steps, outcomes, strict=True), start=1):
            if kind == "late":
                assert outcome.code == "DEADLINE_EXCEEDED" or broken
            elif kind == "poison":
                assert outcome.code in ("INTERNAL", "UNAVAILABLE")
            elif kind == "bad":
                assert isinstance(outcome, ValueError | ServiceError)
            elif kind == "leaves" and isinstance(outcome, asyncio.CancelledError):
                pass
            elif isinstance(outcome, Exception):
                # Only a broken executor takes good items with it.
                assert executors[0].batches
                assert outcome.code == "INTERNAL" or broken
                assert any(kind in ("breaks", "poison") for kind, *_ in steps)
            else:
                assert outcome.result == number * 2
                assert outcome.batch_size <= max_batch
        computed = [batch for executor in executors for batch in executor.batches]
        assert all(len(batch) <= max_batch for batch in computed)
        late = {number for number, (kind, *_) in enumerate(steps, start=1) if kind == "late"}
        assert not late.intersection(itertools.chain(*computed))

    with patch("vision_server.lanes._log"):  # hundreds of tracebacks would take longer than all the rest
        asyncio.run(run())
