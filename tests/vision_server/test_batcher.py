"""The batcher: who shares a batch, who comes first, who leaves, who is refused."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Sequence

import pytest

from serving.errors import ServiceError
from tests.vision_server.executors import Executor, busy, serving, settle, until
from vision_server.batcher import Batcher
from vision_server.lanes import Replica
from vision_server.requests import Priority


async def test_litserve_and_bentoml_tick_here_an_idle_executor_is_given_an_item_at_once() -> None:
    executor = Executor()
    async with serving(executor, max_delay_ms=60_000) as batcher:
        done = await asyncio.wait_for(batcher.submit(21), 10)
    assert (done.result, done.batch_size) == (42, 1)


async def test_what_comes_in_one_turn_of_the_loop_shares_the_first_batch() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        await asyncio.gather(*(batcher.submit(number) for number in (1, 2, 3)))
    assert executor.batches == [[1, 2, 3]]


async def test_what_comes_while_the_executor_is_busy_shares_the_next_batch() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        first = await busy(batcher, executor)
        others = [asyncio.create_task(batcher.submit(number)) for number in (2, 3, 4, 5, 6)]
        await settle()
        executor.gate.set()
        answers = await asyncio.gather(*others)
        await asyncio.gather(*first)
    assert executor.batches == [[1], [2, 3, 4, 5], [6]]
    assert [answer.batch_size for answer in answers] == [4, 4, 4, 4, 1]


async def test_gathering_ends_when_the_oldest_has_waited_long_enough() -> None:
    executor = Executor()
    async with serving(executor, max_delay_ms=500) as batcher:
        [first] = await busy(batcher, executor)
        second = asyncio.create_task(batcher.submit(2))
        await settle()
        executor.gate.set()
        await first
        # The executor is idle again, but `2` still gathers; `3` comes in time to join it.
        third = asyncio.create_task(batcher.submit(3))
        done = await asyncio.gather(second, third)
    assert executor.batches == [[1], [2, 3]]
    assert done[0].queue_ms > 400
    assert done[1].queue_ms < done[0].queue_ms


async def test_gathering_ends_when_the_batch_is_full() -> None:
    executor = Executor()
    async with serving(executor, max_delay_ms=60_000, max_batch=3) as batcher:
        [first] = await busy(batcher, executor)
        waiting = [asyncio.create_task(batcher.submit(2))]
        await settle()
        executor.gate.set()
        await first
        waiting += [asyncio.create_task(batcher.submit(number)) for number in (3, 4)]
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert executor.batches == [[1], [2, 3, 4]]


async def test_several_free_lanes_share_what_waits() -> None:
    executor = Executor()
    async with serving(executor, lanes=2, max_batch=8) as batcher:
        executor.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3, 4, 5)]
        await until(lambda: executor.begun == 2)
        assert batcher.depth == 0
        executor.gate.set()
        await asyncio.gather(*tasks)
    assert sorted(map(len, executor.batches)) == [2, 3]


async def test_two_lanes_compute_side_by_side() -> None:
    executor = Executor()
    async with serving(executor, max_batch=1, lanes=2) as batcher:
        executor.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await until(lambda: executor.begun == 2)
        assert batcher.depth == 1  # two are being computed
        executor.gate.set()
        await asyncio.gather(*tasks)
    assert sorted(executor.batches) == [[1], [2], [3]]


async def test_mlserver_1306_a_cancelled_caller_does_not_disturb_its_batch_mates() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        executor.gate.clear()
        leaver, stayer = asyncio.create_task(batcher.submit(2)), asyncio.create_task(batcher.submit(3))
        await until(lambda: executor.begun == 1)
        leaver.cancel()
        await settle()
        executor.gate.set()
        assert (await stayer).result == 6
    assert executor.batches == [[2, 3]]
    assert leaver.cancelled()


async def test_mlserver_1911_a_caller_that_leaves_in_line_never_reaches_the_executor() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        [first] = await busy(batcher, executor)
        leaver, stayer = asyncio.create_task(batcher.submit(2)), asyncio.create_task(batcher.submit(3))
        await settle()
        leaver.cancel()
        await settle()
        assert batcher.depth == 1
        executor.gate.set()
        assert (await stayer).result == 6
        await first
    assert executor.batches == [[1], [3]]
    assert leaver.cancelled()


async def test_a_caller_that_leaves_as_its_batch_forms_is_not_in_it() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        leaver, stayer = asyncio.create_task(batcher.submit(2)), asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0)
        leaver.cancel()
        assert (await stayer).result == 6
    assert executor.batches == [[3]]


async def test_an_expired_waiter_is_told_so_and_not_computed() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        [first] = await busy(batcher, executor)
        late = asyncio.create_task(batcher.submit(2, deadline_s=time.perf_counter() + 0.02))
        await settle()
        time.sleep(0.05)  # noqa: ASYNC251  # the loop is slow: nothing has looked at the deadline yet
        executor.gate.set()
        with pytest.raises(ServiceError) as caught:
            await late
        await first
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert executor.batches == [[1]]


async def test_a_deadline_that_passes_in_line_is_told_while_the_executor_is_still_busy() -> None:
    executor = Executor()
    async with serving(executor, stuck_after_s=5) as batcher:
        [first] = await busy(batcher, executor)
        with pytest.raises(ServiceError) as caught:
            await asyncio.wait_for(batcher.submit(2, deadline_s=time.perf_counter() + 0.02), 10)
        assert not first.done()
        executor.gate.set()
        await first
    assert caught.value.code == "DEADLINE_EXCEEDED"


async def test_one_that_comes_after_its_deadline_is_not_let_in() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        with pytest.raises(ServiceError) as caught:
            await batcher.submit(2, deadline_s=time.perf_counter())
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert executor.batches == []


async def test_mlserver_1042_a_full_line_refuses_instead_of_waiting_for_ever_and_triton_says_not_when_to_come_back() -> (
    None
):
    executor = Executor()
    async with serving(executor, max_queued=2) as batcher:
        [first] = await busy(batcher, executor)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (2, 3)]
        await settle()
        with pytest.raises(ServiceError) as caught:
            await batcher.submit(4)
        # Who leaves makes room at once.
        waiting[0].cancel()
        await settle()
        fifth = asyncio.create_task(batcher.submit(5))
        await settle()
        executor.gate.set()
        assert (await fifth).result == 10
        await asyncio.gather(first, waiting[1])
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 0.1


async def test_the_urgent_come_first_and_who_waits_long_moves_up() -> None:
    executor = Executor()
    async with serving(executor, max_batch=1, ageing_ms=200) as batcher:
        [first] = await busy(batcher, executor)
        waiting = [asyncio.create_task(batcher.submit(30, priority=Priority.BATCH))]
        await settle()
        await asyncio.sleep(0.45)  # longer than it takes to move up twice
        for number, priority in ((20, Priority.STANDARD), (10, Priority.INTERACTIVE), (31, Priority.BATCH)):
            waiting.append(asyncio.create_task(batcher.submit(number, priority=priority)))
        await settle()
        executor.gate.set()
        await asyncio.gather(first, *waiting)
    assert executor.batches == [[1], [30], [10], [20], [31]]


async def test_a_batch_caller_is_served_although_interactive_ones_never_cease() -> None:
    executor = Executor()
    async with serving(executor, max_batch=1, ageing_ms=50) as batcher:
        ended = asyncio.Event()

        async def insist() -> None:
            while not ended.is_set():
                await batcher.submit(1, priority=Priority.INTERACTIVE)

        insistent = [asyncio.create_task(insist()) for _ in range(8)]  # always several of them in line
        await settle()
        patient = await asyncio.wait_for(batcher.submit(2, priority=Priority.BATCH), 10)
        ended.set()
        await asyncio.gather(*insistent)
    assert patient.result == 4
    assert len(executor.batches) > 10


async def test_stopping_tells_those_who_wait() -> None:
    executor = Executor()
    async with serving(executor, max_delay_ms=60_000) as batcher:
        [first] = await busy(batcher, executor)
        waiting = asyncio.create_task(batcher.submit(2))
        await settle()
        stopping = asyncio.create_task(batcher.stop())
        await settle()
        assert not stopping.done()  # one is still computed
        executor.gate.set()
        await stopping
        assert (await first).result == 2
        with pytest.raises(ServiceError, match="shutting down"):
            await waiting
        with pytest.raises(ServiceError, match="shutting down"):
            await batcher.submit(3)


async def test_settling_waits_for_all_that_was_submitted() -> None:
    executor = Executor()
    async with serving(executor, max_batch=1) as batcher:
        first = await busy(batcher, executor)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (2, 3)]
        await settle()
        settling = asyncio.create_task(batcher.settle())
        await settle()
        assert not settling.done()
        executor.gate.set()
        await settling
        assert [task.result().result for task in (*first, *waiting)] == [2, 4, 6]
        await asyncio.wait_for(batcher.settle(), 1)


async def test_what_was_computed_or_left_is_not_kept_by_an_idle_batcher() -> None:
    class Picture:
        pass

    def execute(items: Sequence[Picture]) -> list[str | Exception]:
        return ["seen" for _ in items]

    batcher: Batcher[Picture, str] = Batcher(
        "seer", [Replica("cpu", execute)], max_batch=1, max_delay_ms=0, max_queued=8
    )
    batcher.start()
    computed, left = Picture(), Picture()
    kept = [weakref.ref(computed), weakref.ref(left)]
    leaver = asyncio.create_task(batcher.submit(left))
    await batcher.submit(computed)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    del computed, left, leaver
    async with asyncio.timeout(10):
        while any(picture() is not None for picture in kept):
            gc.collect()
            await asyncio.sleep(0.01)
    await batcher.stop()


async def test_it_tells_how_busy_it_is_and_how_long_the_line_takes() -> None:
    executor = Executor()
    async with serving(executor, max_batch=1, lanes=2) as batcher:
        executor.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(100)]
        await until(lambda: executor.begun == 2)
        assert batcher.estimate_s() == pytest.approx(98 * 0.05 / 2)  # as guessed before anything was measured
        began_s, before_s = time.perf_counter(), batcher.busy_s
        await asyncio.sleep(0.05)
        # Both lanes compute, and what they have not finished counts too.
        assert 0.04 < batcher.busy_s - before_s <= time.perf_counter() - began_s
        executor.gate.set()
        await asyncio.gather(*tasks)
        assert batcher.estimate_s() == 0.1


async def test_callers_learn_beforehand_that_the_wait_is_too_long_for_their_priority() -> None:
    executor = Executor()
    async with serving(executor, max_batch=1, max_wait_ms=200) as batcher:
        first = await busy(batcher, executor)
        # An item takes 0.05 s as long as nothing was measured: four take as long as anyone is to wait, and five longer.
        waiting = []
        for number in range(2, 6):
            batcher.check_room()
            waiting.append(asyncio.create_task(batcher.submit(number)))
            await settle()
        batcher.check_room()
        waiting.append(asyncio.create_task(batcher.submit(6)))
        await settle()
        with pytest.raises(ServiceError) as caught:
            batcher.check_room()
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert "takes about 0.25 s now; the limit is 0.2 s" in caught.value.message
        assert caught.value.retry_after_s == pytest.approx(0.25)
        batcher.check_room(Priority.INTERACTIVE)  # would come before them
        executor.gate.set()
        await asyncio.gather(*first, *waiting)


async def test_it_tells_each_devices_share() -> None:
    busy_one, idle_one = Executor(), Executor()
    async with serving(busy_one, idle_one, lanes=2, max_batch=8) as batcher:
        assert batcher.capacity == 32
        [first] = await busy(batcher, busy_one)
        await asyncio.sleep(0.05)
        by_device = batcher.busy_s_by_device
        assert by_device["device:0"] > 0.02
        assert by_device["device:1"] == 0.0
        busy_one.gate.set()
        await first
        assert batcher.busy_s_by_device["device:0"] >= by_device["device:0"]
        assert batcher.busy_s >= by_device["device:0"] / 2
