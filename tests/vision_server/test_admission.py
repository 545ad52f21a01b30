"""Admission: memory stays bounded, whoever leaves when."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vision_server.executors import settle
from vision_server.admission import Admission, GivenBack, Place
from vision_server.errors import QueueFull
from vision_server.requests import Priority

AN_HOUR_MS = 3_600_000.0


def admission(*, max_images: int = 2, max_bytes: int = 100, ageing_ms: float = AN_HOUR_MS) -> Admission:
    return Admission(max_images=max_images, max_bytes=max_bytes, estimate_s=lambda: 0.5, ageing_ms=ageing_ms)


def test_places_are_counted_and_given_back() -> None:
    room = admission()
    with room.enter(10) as place:
        place.grow(30)
        assert (room.image_count, room.size_bytes) == (1, 40)
    place.give_back()  # a second time is none
    assert (room.image_count, room.size_bytes) == (0, 0)


def test_one_image_too_many_is_refused_with_a_time_to_come_back() -> None:
    room = admission(max_images=1)
    with room.enter(1), pytest.raises(QueueFull) as refused:
        room.enter(1)
    assert refused.value.retry_after_s == 0.5
    with room.enter(1):
        pass


def test_sglang_33035_pixels_that_do_not_fit_are_refused_before_decoding_and_what_was_held_is_given_back() -> None:
    room = admission()
    with room.enter(10):
        with pytest.raises(QueueFull), room.enter(10) as place:
            place.grow(1000)
        assert (room.image_count, room.size_bytes) == (1, 10)


def test_a_single_image_always_fits_into_an_empty_server() -> None:
    room = admission()
    with room.enter(50) as place:
        place.grow(1000)
    assert room.size_bytes == 0


def test_a_place_that_was_given_back_does_not_grow_again() -> None:
    # given: a caller that left while a thread was about to decode for it
    room = admission()
    with room.enter(10) as place:
        pass
    with pytest.raises(GivenBack):
        place.grow(30)
    assert (room.image_count, room.size_bytes) == (0, 0)


async def test_those_who_may_wait_are_let_in_one_after_another() -> None:
    room = admission(max_images=1)
    order: list[int] = []

    async def visit(number: int) -> None:
        with await room.enter_when_free(1):
            order.append(number)
            await asyncio.sleep(0)

    with room.enter(1):
        visits = [asyncio.create_task(visit(number)) for number in range(5)]
        await asyncio.sleep(0)
        visits[1].cancel()
        await asyncio.sleep(0)
        assert order == []
    await asyncio.wait_for(asyncio.gather(*visits, return_exceptions=True), 5)
    assert order == [0, 2, 3, 4]
    assert room.image_count == 0


async def test_one_that_is_cancelled_as_its_turn_comes_passes_it_on() -> None:
    room = admission(max_images=1)
    with room.enter(1):
        gone = asyncio.create_task(room.enter_when_free(1))
        stays = asyncio.create_task(room.enter_when_free(1))
        await asyncio.sleep(0)
    gone.cancel()
    with await asyncio.wait_for(stays, 5):
        assert room.image_count == 1


async def test_one_that_is_cancelled_just_before_a_place_is_freed_does_not_keep_the_others_out() -> None:
    room = admission(max_images=1)
    place = room.enter(1)
    gone = asyncio.create_task(room.enter_when_free(1))
    stays = asyncio.create_task(room.enter_when_free(1))
    await settle()
    gone.cancel()
    place.give_back()
    with await asyncio.wait_for(stays, 5):
        assert room.image_count == 1


async def test_one_that_waits_for_bytes_is_woken_when_they_are_there() -> None:
    room = admission(max_images=10)
    with room.enter(90):
        waiting = asyncio.create_task(room.enter_when_free(50))
        await asyncio.sleep(0)
        assert not waiting.done()
    with await asyncio.wait_for(waiting, 5):
        assert room.size_bytes == 50


async def test_a_large_image_that_leaves_makes_room_for_several() -> None:
    room = admission(max_images=10, max_bytes=120)
    with room.enter(100):
        waiting = [asyncio.create_task(room.enter_when_free(30)) for _ in range(3)]
        await asyncio.sleep(0)
    places = await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert (room.image_count, room.size_bytes) == (3, 90)
    for place in places:
        with place:
            pass


@pytest.mark.parametrize(
    ("priority", "limit", "told"),
    [
        (Priority.INTERACTIVE, 100, "the limit is 100."),
        (Priority.STANDARD, 90, "the limit for callers of this priority is 90 of 100."),
        (Priority.BATCH, 75, "the limit for callers of this priority is 75 of 100."),
    ],
)
@pytest.mark.parametrize("counted", ["images", "bytes"])
def test_the_last_places_are_kept_for_the_more_urgent(priority: Priority, limit: int, told: str, counted: str) -> None:
    # given a server with room for a hundred images, or bytes
    room = admission(max_images=100) if counted == "images" else admission(max_images=1000, max_bytes=100)
    size_bytes = 0 if counted == "images" else 1
    with ExitStack() as places:
        # when callers of one priority take all that they get,
        for _ in range(limit):
            places.enter_context(room.enter(size_bytes, priority))
        with pytest.raises(QueueFull) as refused:
            room.enter(size_bytes, priority)
        # then they are told their own limit, and the more urgent still come in.
        assert told in refused.value.message
        assert counted in refused.value.message
        assert refused.value.retry_after_s == 0.5
        if priority is not Priority.INTERACTIVE:
            places.enter_context(room.enter(size_bytes, Priority(priority - 1)))


def test_small_servers_let_in_one_of_any_priority() -> None:
    for priority in Priority:
        with admission(max_images=1).enter(1, priority):
            pass


def test_pixels_too_leave_room_for_the_more_urgent() -> None:
    room = admission(max_images=10)
    with room.enter(10, Priority.INTERACTIVE) as urgent, room.enter(10, Priority.BATCH) as patient:
        with pytest.raises(QueueFull):
            patient.grow(60)
        urgent.grow(60)


async def test_a_stream_leaves_room_for_callers_of_its_priority_that_cannot_wait() -> None:
    room = admission(max_images=100, max_bytes=10**9)
    waiting = [asyncio.create_task(room.enter_when_free(1)) for _ in range(80)]
    await settle()
    assert room.image_count == 75
    with room.enter(1):
        assert room.image_count == 76
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert room.image_count == 75


async def test_those_who_wait_are_let_in_by_priority() -> None:
    room = admission(max_images=1)
    order: list[str] = []

    async def visit(name: str, priority: Priority) -> None:
        with await room.enter_when_free(1, priority):
            order.append(name)

    with room.enter(1):
        visits = [
            asyncio.create_task(visit(f"{priority.name} {turn}", priority))
            for turn in (1, 2)
            for priority in (Priority.BATCH, Priority.INTERACTIVE, Priority.STANDARD)
        ]
        await settle()
    await asyncio.wait_for(asyncio.gather(*visits), 10)
    assert order == ["INTERACTIVE 1", "INTERACTIVE 2", "STANDARD 1", "STANDARD 2", "BATCH 1", "BATCH 2"]


async def test_one_that_has_waited_long_is_let_in_where_the_others_of_its_priority_are_not() -> None:
    # given a server that others keep nearly full
    room = admission(max_images=100, max_bytes=10**9, ageing_ms=100)
    places = [room.enter(1, Priority.INTERACTIVE) for _ in range(100)]
    waiting = asyncio.create_task(room.enter_when_free(1, Priority.BATCH))
    await settle()
    places.pop().give_back()
    await settle()
    assert not waiting.done()
    # when it has waited long enough to have moved up three times,
    await asyncio.sleep(0.35)
    places.pop().give_back()
    # then it has the place, although the server is as full as it was.
    with await asyncio.wait_for(waiting, 10):
        assert room.image_count == 99


async def test_a_freed_place_goes_from_hand_to_hand() -> None:
    room = admission(max_images=1)
    place = room.enter(1)
    waiting = asyncio.create_task(room.enter_when_free(1))
    await settle()
    place.give_back()
    # One who comes at this very moment does not slip in between.
    with pytest.raises(QueueFull):
        room.enter(1, Priority.INTERACTIVE)
    with await asyncio.wait_for(waiting, 10):
        pass
    assert room.image_count == 0


async def test_a_large_one_is_not_passed_by_for_ever_and_one_that_gives_up_lets_the_next_in() -> None:
    room = admission(max_images=100, max_bytes=100)
    with room.enter(50):
        large = asyncio.create_task(room.enter_when_free(60))
        small = asyncio.create_task(room.enter_when_free(5))
        await settle()
        assert not small.done()
        large.cancel()
        with await asyncio.wait_for(small, 10):
            assert room.size_bytes == 55


moves = st.lists(
    st.tuples(
        st.sampled_from(["enter", "wait", "wait", "grow", "leave", "leave", "cancel"]),
        st.sampled_from(Priority),
        st.integers(1, 60),
        st.integers(0, 50),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(moves=moves, max_images=st.integers(1, 6))
def test_nothing_is_lost_nor_counted_twice_whoever_comes_and_goes(
    moves: list[tuple[str, Priority, int, int]], max_images: int
) -> None:
    async def run() -> None:
        room = admission(max_images=max_images)
        held: dict[Place, int] = {}
        waiting: dict[asyncio.Task[Place], int] = {}

        async def let_in() -> None:
            await settle()
            for task in [task for task in waiting if task.done()]:
                size_bytes = waiting.pop(task)
                if not task.cancelled():
                    held[task.result()] = size_bytes

        for move, priority, size_bytes, which in moves:
            if move == "enter":
                try:
                    held[room.enter(size_bytes, priority)] = size_bytes
                except QueueFull:
                    assert held or waiting
            elif move == "wait":
                waiting[asyncio.create_task(room.enter_when_free(size_bytes, priority))] = size_bytes
                if which % 2:
                    await let_in()
            elif move == "grow" and held:
                place = list(held)[which % len(held)]
                try:
                    place.grow(size_bytes)
                    held[place] += size_bytes
                except QueueFull:
                    assert len(held) > 1 or waiting
            elif move == "leave" and held:
                place = list(held)[which % len(held)]
                place.give_back()
                del held[place]
            elif move == "cancel" and waiting:
                list(waiting)[which % len(waiting)].cancel()  # perhaps at the moment it is let in
            if which % 3:
                await let_in()
                assert (room.image_count, room.size_bytes) == (len(held), sum(held.values()))
                assert len(held) <= max_images
                assert held or not waiting
        while True:
            await let_in()
            if not held:
                break
            held.popitem()[0].give_back()
        assert not waiting
        assert (room.image_count, room.size_bytes) == (0, 0)

    asyncio.run(run())
