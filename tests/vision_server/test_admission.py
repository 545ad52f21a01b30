"""Admission: memory stays bounded, whoever leaves when."""

from __future__ import annotations

import asyncio

import pytest

from vision_server.admission import Admission, GivenBack
from vision_server.errors import QueueFull


def admission(*, max_images: int = 2, max_bytes: int = 100) -> Admission:
    return Admission(max_images=max_images, max_bytes=max_bytes, estimate_s=lambda: 0.5)


def test_places_are_counted_and_given_back() -> None:
    room = admission()
    with room.enter(10) as place:
        place.grow(30)
        assert (room.image_count, room.size_bytes) == (1, 40)
    assert (room.image_count, room.size_bytes) == (0, 0)


def test_one_image_too_many_is_refused_with_a_time_to_come_back() -> None:
    room = admission(max_images=1)
    with room.enter(1), pytest.raises(QueueFull) as refused:
        room.enter(1)
    assert refused.value.retry_after_s == 0.5
    with room.enter(1):
        pass


def test_pixels_that_do_not_fit_are_refused_and_what_was_held_is_given_back() -> None:
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


async def test_one_that_waits_for_bytes_is_woken_when_they_are_there() -> None:
    room = admission(max_images=10)
    with room.enter(90):
        waiting = asyncio.create_task(room.enter_when_free(50))
        await asyncio.sleep(0)
        assert not waiting.done()
    with await asyncio.wait_for(waiting, 5):
        assert room.size_bytes == 50


async def test_a_large_image_that_leaves_makes_room_for_several() -> None:
    room = admission(max_images=10)
    with room.enter(100):
        waiting = [asyncio.create_task(room.enter_when_free(30)) for _ in range(3)]
        await asyncio.sleep(0)
    places = await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert (room.image_count, room.size_bytes) == (3, 90)
    for place in places:
        with place:
            pass
