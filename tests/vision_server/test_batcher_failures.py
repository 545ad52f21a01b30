"""The batcher when executors break or stop answering, and several devices behind it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

import pytest

from serving.errors import ServiceError
from serving.health import LIVENESS, Health
from tests.vision_server.executors import Executor, busy, serving, settle, until
from vision_server.batcher import Batcher
from vision_server.lanes import Replica

MADE_TO_HANG = """
import asyncio, threading
from vision_server.batcher import Batcher
from vision_server.lanes import Replica

async def main():
    hang = Replica("cpu", lambda items: threading.Event().wait())
    batcher = Batcher("stuck", [hang], max_batch=1, max_delay_ms=0, max_queued=1, stuck_after_s=0.1)
    batcher.start()
    try:
        await batcher.submit(1)
    except Exception as error:
        print(error)
    await batcher.stop()

asyncio.run(main())
"""


async def refused(outcome: object) -> ServiceError:
    """The error that an awaitable ends with."""
    with pytest.raises(ServiceError) as caught:
        await asyncio.wait_for(outcome, 10)  # type: ignore[arg-type]
    return caught.value


async def test_a_bad_item_fails_alone() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        bad, good = await asyncio.gather(batcher.submit(-2), batcher.submit(3), return_exceptions=True)
    assert good.result == 6
    assert isinstance(bad, ValueError)
    assert executor.batches == [[-2, 3]]


async def test_an_item_that_makes_the_whole_batch_raise_fails_alone() -> None:
    executor = Executor()
    executor.poison = {3}
    async with serving(executor) as batcher:
        outcomes = await asyncio.gather(*(batcher.submit(n) for n in (1, 2, 3, 4)), return_exceptions=True)
    # It is found by halves.
    assert executor.batches == [[1, 2, 3, 4], [1, 2], [3, 4], [3], [4]]
    assert [outcome.result for outcome in (*outcomes[:2], outcomes[3])] == [2, 4, 8]
    assert isinstance(outcomes[2], ServiceError)
    assert outcomes[2].code == "INTERNAL"
    assert "poison" not in str(outcomes[2])  # callers learn nothing of the inside


async def test_a_batch_too_large_for_the_memory_is_computed_in_halves_without_what_the_whole_held() -> None:
    class Tensor:
        """A weakly referable stand-in for a device's memory."""

    held: list[weakref.ref[Tensor]] = []
    held_at_begin: list[int] = []

    def execute(items: Sequence[int]) -> list[int | Exception]:
        held_at_begin.append(sum(tensor() is not None for tensor in held))
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        if len(items) > 1:
            try:
                raise RuntimeError("out of memory")
            except RuntimeError as error:
                raise MemoryError from error
        return list(items)

    failures: list[Exception] = []
    batcher: Batcher[int, int] = Batcher(
        "large", [Replica("cuda:0", execute)], max_batch=4, max_delay_ms=0, max_queued=9, on_failure=failures.append
    )
    batcher.start()
    outcomes = await asyncio.gather(*(batcher.submit(n) for n in (1, 2, 3, 4)))
    await batcher.stop()
    assert [outcome.result for outcome in outcomes] == [1, 2, 3, 4]
    assert held_at_begin == [0] * 7
    assert [type(failure) for failure in failures] == [MemoryError]


async def test_an_executor_that_raises_fails_its_items_and_serves_the_next() -> None:
    executor = Executor()
    async with serving(executor) as batcher:
        executor.breaks = True
        error = await refused(batcher.submit(1))
        executor.breaks = False
        assert (await batcher.submit(2)).result == 4
    assert error.code == "INTERNAL"
    assert "broken" not in str(error)


@pytest.mark.parametrize("raised", [StopIteration(), KeyboardInterrupt(), SystemExit(1)])
async def test_odd_exceptions_are_failures_like_others(raised: BaseException) -> None:
    def execute(items: Sequence[int]) -> list[int | Exception]:
        if 0 in items:
            raise raised
        return [StopIteration() if item == 1 else item for item in items]

    batcher: Batcher[int, int] = Batcher("odd", [Replica("cpu", execute)], max_batch=3, max_delay_ms=0, max_queued=9)
    batcher.start()
    alone, mate = await asyncio.gather(batcher.submit(0), batcher.submit(5), return_exceptions=True)
    assert isinstance(alone, ServiceError)
    assert mate.result == 5
    first, second = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)
    assert isinstance(first, Exception)
    assert second.result == 2
    await batcher.stop()


async def test_a_wrong_number_of_outcomes_is_a_failure() -> None:
    batcher: Batcher[int, int] = Batcher(
        "short", [Replica("cpu", lambda items: [])], max_batch=2, max_delay_ms=0, max_queued=9
    )
    batcher.start()
    assert (await refused(batcher.submit(1))).code == "INTERNAL"
    await batcher.stop()


async def test_a_broken_executor_is_rebuilt_while_the_others_wait() -> None:
    executor = Executor()
    async with serving(executor, rebuilds=True, max_batch=1) as batcher:
        [first] = await busy(batcher, executor)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (2, 3)]
        await settle()
        executor.breaks = True
        executor.gate.set()
        assert (await refused(first)).code == "INTERNAL"
        assert [done.result for done in await asyncio.gather(*waiting)] == [4, 6]
        # Batches that work make up for it: the next failure is a first one again.
        executor.breaks = True
        await refused(batcher.submit(4))
        assert (await batcher.submit(5)).result == 10
    assert executor.rebuilt == 2


async def test_an_executor_that_breaks_again_when_rebuilt_fails_health_and_everyone_at_once() -> None:
    executor = Executor()
    health = Health()
    unmended = Replica("cpu", executor, rebuild=lambda: None)
    batcher: Batcher[int, int] = Batcher(
        "doubler", [unmended], max_batch=1, max_delay_ms=0, max_queued=9, on_broken=health.fail_for_good
    )
    batcher.start()
    executor.breaks = True
    assert (await refused(batcher.submit(1))).code == "INTERNAL"
    assert health.serving(LIVENESS)
    second, *waiting = [asyncio.create_task(batcher.submit(number)) for number in (2, 3, 4)]
    assert (await refused(second)).code == "INTERNAL"
    for task in waiting:
        told = await refused(task)
        assert (told.code, told.reason) == ("UNAVAILABLE", "MODEL_FAILED")
        assert "started again" in told.message
    assert (await refused(batcher.submit(5))).reason == "MODEL_FAILED"
    assert not health.serving(LIVENESS)
    assert "doubler" in health.why_not(LIVENESS)[0]
    await asyncio.wait_for(batcher.stop(), 10)


async def test_an_executor_that_cannot_be_rebuilt_is_out() -> None:
    executor = Executor()
    broken: list[str] = []
    failures: list[Exception] = []

    def rebuild() -> None:
        raise OSError("the weights are gone")

    batcher: Batcher[int, int] = Batcher(
        "doubler",
        [Replica("cpu", executor, rebuild=rebuild)],
        max_batch=1,
        max_delay_ms=0,
        max_queued=9,
        on_failure=failures.append,
        on_broken=broken.append,
    )
    batcher.start()
    executor.breaks = True
    await refused(batcher.submit(1))
    assert (await refused(batcher.submit(2))).reason == "MODEL_FAILED"
    assert "the weights are gone" in broken[0]
    assert [type(failure) for failure in failures] == [RuntimeError, OSError]
    await asyncio.wait_for(batcher.stop(), 10)


async def test_a_rebuild_that_never_ends_is_given_up() -> None:
    executor, never = Executor(), threading.Event()
    broken: list[str] = []
    batcher: Batcher[int, int] = Batcher(
        "doubler",
        [Replica("cpu", executor, rebuild=lambda: never.wait(20) and None)],  # type: ignore[func-returns-value]
        max_batch=1,
        max_delay_ms=0,
        max_queued=9,
        rebuild_within_s=0.1,
        on_broken=broken.append,
    )
    batcher.start()
    executor.breaks = True
    await refused(batcher.submit(1))
    assert (await refused(batcher.submit(2))).reason == "MODEL_FAILED"
    assert "rebuilt within 0.1 s" in broken[0]
    never.set()
    await asyncio.wait_for(batcher.stop(), 10)


async def test_a_thread_that_cannot_begin_is_a_failure_and_not_a_silence() -> None:
    def begin() -> None:
        raise OSError("no such core")

    broken: list[str] = []
    batcher: Batcher[int, int] = Batcher(
        "doubler",
        [Replica("cpu", Executor(), begin_thread=begin)],
        max_batch=1,
        max_delay_ms=0,
        max_queued=9,
        on_broken=broken.append,
    )
    batcher.start()
    assert (await refused(batcher.submit(1))).code == "INTERNAL"
    assert (await refused(batcher.submit(2))).code == "INTERNAL"
    assert "no such core" in broken[0]
    await asyncio.wait_for(batcher.stop(), 10)


async def test_batches_begun_before_a_failure_say_nothing_of_the_new_executor() -> None:
    # Given four batches in four lanes of one executor
    executor = Executor()
    async with serving(executor, lanes=4, max_batch=1, rebuilds=True) as batcher:
        executor.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3, 4)]
        await until(lambda: executor.begun == 4)
        # when all fail at once,
        executor.breaks = True
        executor.gate.set()
        for task in tasks:
            assert (await refused(task)).code == "INTERNAL"
        # then it was rebuilt once, after the last of them, and serves.
        assert (await batcher.submit(5)).result == 10
    assert executor.rebuilt == 1


async def test_an_executor_is_rebuilt_only_after_its_other_batches_have_ended() -> None:
    executor = Executor()
    async with serving(executor, lanes=2, max_batch=1, rebuilds=True) as batcher:
        [held] = await busy(batcher, executor)
        executor.impatient = executor.poison = {2}
        assert (await refused(batcher.submit(2))).code == "INTERNAL"
        waiting = asyncio.create_task(batcher.submit(3))
        await asyncio.sleep(0.05)
        assert (executor.rebuilt, executor.begun) == (0, 2)  # the free lane takes nothing either
        executor.gate.set()
        assert ((await held).result, (await waiting).result) == (2, 6)
    assert executor.rebuilt == 1


async def test_a_stuck_batch_is_given_up_once_and_fails_health_the_second_time() -> None:
    executor = Executor()
    broken: list[str] = []
    async with serving(executor, rebuilds=True, stuck_after_s=0.5, on_broken=broken.append) as batcher:
        for round_ in (1, 2):
            executor.gate.clear()
            stuck = asyncio.create_task(batcher.submit(1))
            await until(lambda wanted=2 * round_ - 1: executor.begun == wanted)
            waiting = asyncio.create_task(batcher.submit(2))
            told = await refused(stuck)
            assert (told.code, told.reason) == ("INTERNAL", "INTERNAL")
            assert "did not finish within 0.5 s" in told.message
            if round_ == 1:
                # Who waited is served by a new thread, while the old one is still stuck.
                await until(lambda: executor.begun == 2)
                assert not broken
                executor.gate.set()
                assert (await waiting).result == 4
            else:
                # That a batch has worked meanwhile makes no difference: each stuck thread is lost for good.
                assert (await refused(waiting)).reason == "MODEL_FAILED"
    assert executor.rebuilt == 1
    assert len(broken) == 1
    assert "stuck" in broken[0]


async def test_a_process_that_was_stopped_does_not_take_its_batches_for_stuck() -> None:
    executor = Executor()
    async with serving(executor, stuck_after_s=1) as batcher:
        [running] = await busy(batcher, executor)
        time.sleep(1.2)  # noqa: ASYNC251  # as after SIGSTOP and SIGCONT: much time has passed, and nothing has run
        await asyncio.sleep(0.15)
        executor.gate.set()
        assert (await running).result == 2


def test_a_stuck_thread_does_not_keep_the_process_from_ending() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", MADE_TO_HANG], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "did not finish within 0.1 s" in ended.stdout


async def test_threads_end_with_the_batcher() -> None:
    before = threading.active_count()
    async with serving(Executor(), Executor(), lanes=3) as batcher:
        await batcher.submit(1)
        assert threading.active_count() == before + 6
    await until(lambda: threading.active_count() == before)


async def test_the_least_loaded_device_comes_first() -> None:
    small, large = Executor(), Executor()
    replicas = [Replica("small", small, lanes=2), Replica("large", large, lanes=4)]
    batcher: Batcher[int, int] = Batcher("doubler", replicas, max_batch=1, max_delay_ms=0, max_queued=9)
    batcher.start()
    small.gate.clear()
    large.gate.clear()
    tasks = []
    begun = []
    for _ in range(4):
        tasks.append(asyncio.create_task(batcher.submit(1)))
        await until(lambda: small.begun + large.begun == len(tasks))
        begun.append((small.begun, large.begun))
    # Both are empty: the first; then the one with more than half of its lanes free, until it has no more than the other.
    assert begun == [(1, 0), (1, 1), (1, 2), (2, 2)]
    small.gate.set()
    large.gate.set()
    await asyncio.gather(*tasks)
    await batcher.stop()


async def test_of_two_idle_devices_the_quicker_one_comes_first() -> None:
    class Slow(Executor):
        def __call__(self, items: Sequence[int]) -> list[int | Exception]:
            time.sleep(0.2)
            return super().__call__(items)

    slow, quick = Slow(), Executor()
    async with serving(slow, quick) as batcher:
        await asyncio.gather(*(batcher.submit(number) for number in range(2)))  # each has had one
        for number in range(5):
            await batcher.submit(number)
    assert (len(slow.batches), len(quick.batches)) == (1, 6)


async def test_a_broken_device_leaves_the_others_serving() -> None:
    good, bad = Executor(), Executor()
    bad.breaks = True
    broken: list[str] = []
    async with serving(bad, good, max_batch=1, on_broken=broken.append) as batcher:
        # It was the first in the list; then it is tried only when the other has no lane free,
        assert (await refused(batcher.submit(1))).code == "INTERNAL"
        assert [(await batcher.submit(number)).result for number in (2, 3)] == [4, 6]
        good.gate.clear()
        held = asyncio.create_task(batcher.submit(4))
        await until(lambda: good.begun == 3)
        assert (await refused(batcher.submit(5))).code == "INTERNAL"
        # and after the second failure not at all, even if it were well again.
        bad.breaks = False
        last = asyncio.create_task(batcher.submit(6))
        await settle()
        good.gate.set()
        assert [(await task).result for task in (held, last)] == [8, 12]
    assert len(bad.batches) == 2
    assert broken == []
