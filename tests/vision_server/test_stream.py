"""One stream's life in any mix of arrivals, ends and slow readers: one outcome a frame, in order, a bounded number at work."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ServiceError
from vision_server import stream as stream_module
from vision_server.detections import Follow, Seen
from vision_server.errors import ImageUnreadable
from vision_server.fair import FairGate
from vision_server.images import Image
from vision_server.requests import DetectOptions, EncodedImage, Frame, ImageSource, Priority, StreamOptions, Tracker
from vision_server.results import Detections as Answer
from vision_server.results import FrameDropped, StreamSummary, Timings
from vision_server.stream import MAX_UNTOLD, FrameOutcome, Stream

ROOM = 6


class Detections:
    """Answers when it is told to; a frame's number is its image's width."""

    def __init__(self) -> None:
        self.at_work: dict[int, asyncio.Future[None]] = {}
        self.most_at_work = 0
        self.begun: list[int] = []
        self.deadlines: set[float | None] = set()
        self.last_priority: Priority | None = None

    async def detect(
        self,
        source: ImageSource,
        options: DetectOptions,
        deadline_s: float | None = None,
        *,
        priority: Priority = Priority.STANDARD,
        patient: bool = False,
        follow: Follow | None = None,
    ) -> Seen:
        assert isinstance(source, EncodedImage)
        assert patient, "a frame waits for room"
        number = int(source.content)
        self.deadlines.add(deadline_s)
        self.last_priority = priority
        self.begun.append(number)
        self.at_work[number] = asyncio.get_running_loop().create_future()
        self.most_at_work = max(self.most_at_work, len(self.at_work))
        try:
            await self.at_work[number]
        finally:
            del self.at_work[number]
        image = Image(np.zeros((1, 1, 3), np.uint8), number, 1)
        if follow is not None:
            await follow(image, ())
        return Seen(Answer("m", "1", number, 1, (), (), Timings(0, 0, 0, 0, 0, 1)), image)

    def end(self, number: int, error: Exception | None = None) -> None:
        if error is None:
            self.at_work[number].set_result(None)
        else:
            self.at_work[number].set_exception(error)


class Images:
    """Works a moment later, as a pool does."""

    async def run(self, work: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        return work()


class Recorder:
    """In a tracker's place: notes which frames come, by their numbers."""

    def __init__(self) -> None:
        self.followed: list[int] = []

    def follow(self, image: Image, found: tuple[object, ...]) -> tuple[object, ...]:
        self.followed.append(image.width_px)
        return found


class Caller:
    """A stream with its caller: sends frames, reads outcomes when told to."""

    def __init__(self, detections: Detections, options: StreamOptions, gate: FairGate | None = None) -> None:
        self.detections = detections
        self.sent: asyncio.Queue[Frame | Exception | None] = asyncio.Queue()
        self.taken = 0  # frames that the stream has read
        self.gate = gate or FairGate(ROOM)
        self.stream: Any = Stream(self._frames(), options, 12.5, detections, Images(), self.gate)  # type: ignore[arg-type]
        self.reader: AsyncGenerator[FrameOutcome | StreamSummary, None] = self.stream.outcomes()
        self.reading: asyncio.Task[FrameOutcome | StreamSummary] | None = None
        self.read: list[FrameOutcome | StreamSummary] = []
        self.next_number = 0

    async def _frames(self) -> AsyncIterator[Frame]:
        while (frame := await self.sent.get()) is not None:
            if isinstance(frame, Exception):
                raise frame
            self.taken += 1
            yield frame

    def send(self) -> None:
        self.next_number += 1
        self.sent.put_nowait(Frame(self.next_number, EncodedImage(str(self.next_number).encode())))

    async def settle(self) -> None:
        """Lets everything happen that can happen; takes what has been asked for by ask()."""
        for _ in range(20):
            await asyncio.sleep(0)
        if self.reading is not None and self.reading.done():
            self.read.append(self.reading.result())
            self.reading = None

    def ask(self) -> None:
        """Asks for one outcome."""
        if self.reading is None:
            self.reading = asyncio.ensure_future(anext(self.reader))

    async def rest(self) -> None:
        """Reads to the end."""
        if self.reading is not None:
            self.read.append(await self.reading)
            self.reading = None
        async for outcome in self.reader:
            self.read.append(outcome)

    async def leave(self) -> None:
        """Goes away at once."""
        if self.reading is not None:
            self.reading.cancel()
            self.reading = None
            await asyncio.sleep(0)
        await self.reader.aclose()
        await self.settle()

    @property
    def held(self) -> list[int]:
        """Frames that the stream holds and has not begun."""
        return [one.frame_id for one in self.stream._unanswered if one.frame is not None]

    @property
    def outcomes(self) -> list[FrameOutcome]:
        return [outcome for outcome in self.read if isinstance(outcome, FrameOutcome)]


def kinds(caller: Caller) -> list[tuple[int, str]]:
    names = {FrameDropped: "dropped", Answer: "detected"}
    return [(one.frame_id, names.get(type(one.outcome), "failed")) for one in caller.outcomes]


async def ending_all(detections: Detections) -> None:
    while True:
        for number in list(detections.at_work):
            if not detections.at_work[number].done():
                detections.end(number)
        await asyncio.sleep(0)


actions = st.lists(st.tuples(st.sampled_from(["send", "end", "fail", "ask"]), st.integers(0, 9)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(actions=actions, in_flight=st.integers(1, 4), drop_oldest=st.booleans(), tracked=st.booleans())
def test_any_interleaving_gives_one_outcome_a_frame_in_order(
    actions: list[tuple[str, int]], in_flight: int, drop_oldest: bool, tracked: bool
) -> None:
    recorder = Recorder()

    async def run() -> None:
        detections = Detections()
        options = StreamOptions(DetectOptions(), in_flight, Tracker.BYTETRACK if tracked else None, drop_oldest)
        caller = Caller(detections, options)
        failed = set()
        for action, which in actions:
            working = [number for number, future in detections.at_work.items() if not future.done()]
            if action == "send":
                caller.send()
            elif action == "ask":
                caller.ask()
            elif working:
                number = working[which % len(working)]
                failed |= {number} if action == "fail" else set()
                detections.end(number, ImageUnreadable("broken") if action == "fail" else None)
            await caller.settle()
            begun_and_unread = len(set(detections.begun) - {one.frame_id for one in caller.outcomes})
            assert begun_and_unread <= in_flight + 1, "the one that is being read counts until the next is asked for"
            assert len(caller.held) <= 1, "of the frames that are not at work, one at most"
            if not drop_oldest:
                assert caller.taken - len(caller.outcomes) <= in_flight + 1
        caller.sent.put_nowait(None)
        ending = asyncio.create_task(ending_all(detections))
        await asyncio.wait_for(caller.rest(), 10)
        ending.cancel()

        assert [one.frame_id for one in caller.outcomes] == list(range(1, caller.next_number + 1))
        assert detections.most_at_work <= in_flight
        assert detections.begun == sorted(detections.begun)
        by_kind: dict[str, set[int]] = {"detected": set(), "failed": set(), "dropped": set()}
        for number, kind in kinds(caller):
            by_kind[kind].add(number)
        assert by_kind["failed"] == failed
        assert by_kind["dropped"] == set(range(1, caller.next_number + 1)) - set(detections.begun)
        assert caller.next_number not in by_kind["dropped"], "the latest frame is never dropped"
        if not drop_oldest:
            assert not by_kind["dropped"]
        if tracked:
            assert recorder.followed == sorted(by_kind["detected"]), "the tracker sees the frames in their order"
        summary = caller.read[-1]
        assert isinstance(summary, StreamSummary)
        assert (summary.received_count, summary.detected_count) == (caller.next_number, len(by_kind["detected"]))
        assert (summary.error_count, summary.dropped_count) == (len(failed), len(by_kind["dropped"]))
        assert caller.gate.free == ROOM

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream_module, "Tracking", lambda *_: recorder)
        asyncio.run(run())


@settings(max_examples=50, deadline=None)
@given(actions=actions, in_flight=st.integers(1, 4), drop_oldest=st.booleans())
def test_who_leaves_at_any_moment_leaves_nothing_behind(
    actions: list[tuple[str, int]], in_flight: int, drop_oldest: bool
) -> None:
    faults: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        detections = Detections()
        caller = Caller(detections, StreamOptions(DetectOptions(), in_flight, None, drop_oldest))
        caller.ask()
        for action, which in actions:
            if action == "send":
                caller.send()
            elif action == "ask":
                caller.ask()
            elif detections.at_work:
                number = list(detections.at_work)[which % len(detections.at_work)]
                if not detections.at_work[number].done():
                    detections.end(number, ImageUnreadable("broken") if action == "fail" else None)
            for _ in range(which % 4):
                await asyncio.sleep(0)
        await caller.leave()
        assert not detections.at_work
        assert caller.gate.free == ROOM
        assert len(asyncio.all_tasks()) == 1, "only this test's own"

    asyncio.run(run())
    assert not faults


@pytest.mark.parametrize("moments", range(6))
async def test_a_caller_who_leaves_as_a_frame_ends_is_no_fault(moments: int) -> None:
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 1))
    caller.ask()
    caller.send()
    await caller.settle()
    detections.end(1)
    for _ in range(moments):
        await asyncio.sleep(0)
    await caller.leave()
    assert not faults


async def test_behind_a_frame_that_fails_early_the_tracker_still_waits_for_those_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(stream_module, "Tracking", lambda *_: recorder)
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 3, Tracker.BYTETRACK))
    caller.ask()
    for _ in range(3):
        caller.send()
    await caller.settle()
    detections.end(2, ImageUnreadable("broken"))
    await caller.settle()
    for number in (3, 1):
        detections.end(number)
        await caller.settle()
    assert recorder.followed == [1, 3]
    await caller.leave()


async def test_the_latest_frame_wins_and_the_dropped_ones_are_told_in_order() -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 1, drop_oldest=True))
    caller.ask()
    for _ in range(5):
        caller.send()
    await caller.settle()
    assert list(detections.at_work) == [1]
    detections.end(1)
    await caller.settle()
    caller.ask()
    await caller.settle()
    assert list(detections.at_work) == [5], "2, 3 and 4 gave way"
    caller.send()
    caller.sent.put_nowait(None)
    ending = asyncio.create_task(ending_all(detections))
    await caller.rest()
    ending.cancel()
    assert kinds(caller) == [
        (1, "detected"),
        (2, "dropped"),
        (3, "dropped"),
        (4, "dropped"),
        (5, "detected"),
        (6, "detected"),
    ]
    assert isinstance(caller.read[-1], StreamSummary)
    assert caller.read[-1].dropped_count == 3


@pytest.mark.parametrize("drop_oldest", [False, True])
async def test_a_reader_that_stalls_is_read_from_no_more_than_so_far(drop_oldest: bool) -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 3, drop_oldest=drop_oldest))
    caller.ask()
    ending = asyncio.create_task(ending_all(detections))
    for _ in range(3 * MAX_UNTOLD):
        caller.send()
        await asyncio.sleep(0)
    await caller.settle()
    ending.cancel()
    assert len(caller.read) == 1
    # Begun: three at most beside the one being written; the rest waits at the caller's, or is known by its number alone.
    assert len(detections.begun) <= 4
    assert caller.taken <= (3 + MAX_UNTOLD if drop_oldest else 3) + 1
    assert len(caller.held) <= 1
    await caller.leave()


async def test_draining_answers_what_was_read_and_says_so() -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 2))
    caller.ask()
    for _ in range(5):
        caller.send()
    await caller.settle()
    caller.stream.end_reading()
    ending = asyncio.create_task(ending_all(detections))
    with pytest.raises(ServiceError) as caught:
        await caller.rest()
    ending.cancel()
    assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "DRAINING")
    assert caught.value.retry_after_s is not None
    assert kinds(caller) == [(1, "detected"), (2, "detected")]


async def test_a_stream_whose_caller_is_done_ends_well_while_draining() -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 2))
    caller.ask()
    caller.send()
    caller.sent.put_nowait(None)
    await caller.settle()
    caller.stream.end_reading()
    detections.end(1)
    await caller.rest()
    assert isinstance(caller.read[-1], StreamSummary)


async def test_what_the_frames_raise_comes_after_the_frames_before_it() -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 4))
    caller.send()
    caller.send()
    caller.sent.put_nowait(ValueError("no frame"))
    ending = asyncio.create_task(ending_all(detections))
    with pytest.raises(ValueError, match="no frame"):
        await caller.rest()
    ending.cancel()
    assert kinds(caller) == [(1, "detected"), (2, "detected")]


async def test_the_calls_deadline_and_priority_go_with_every_frame() -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 4, priority=Priority.BATCH))
    caller.send()
    caller.sent.put_nowait(None)
    ending = asyncio.create_task(ending_all(detections))
    await caller.rest()
    ending.cancel()
    assert detections.deadlines == {12.5}
    assert detections.last_priority is Priority.BATCH


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_trackers_state_goes_with_its_stream(data_dir: Path, leaves: bool) -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 2, Tracker.BYTETRACK))
    tracking = weakref.ref(caller.stream._tracking)
    ending = asyncio.create_task(ending_all(detections))
    for _ in range(4):
        caller.send()
    if leaves:
        caller.ask()
        await caller.settle()
        await caller.leave()
    else:
        caller.sent.put_nowait(None)
        await caller.rest()
    ending.cancel()
    assert tracking() is not None
    del caller
    await asyncio.sleep(0)
    gc.collect()
    assert tracking() is None


async def test_a_streams_frames_wait_at_the_gate_and_the_latest_gets_the_place() -> None:
    detections, gate = Detections(), FairGate(1)
    greedy = Caller(detections, StreamOptions(DetectOptions(), 4), gate)
    camera = Caller(detections, StreamOptions(DetectOptions(), 4, drop_oldest=True), gate)
    camera.next_number = 100
    for caller in (greedy, camera):
        caller.ask()
    for _ in range(3):
        greedy.send()
        await greedy.settle()
    for _ in range(3):
        camera.send()
        await camera.settle()
    assert detections.begun == [1]
    for number in (1, 2):
        detections.end(number)
        await greedy.settle()
    assert detections.begun == [1, 2, 103], "in its turn, before the third of the other, with its latest frame"
    camera.send()
    await camera.settle()
    for number in (103, 3):
        detections.end(number)
        await greedy.settle()
    assert detections.begun == [1, 2, 103, 3, 104]
    for caller in (greedy, camera):
        await caller.leave()
    assert gate.free == 1


async def test_a_stream_with_more_frames_stands_in_line_again_at_once() -> None:
    detections = Detections()
    caller = Caller(detections, StreamOptions(DetectOptions(), 4), FairGate(2))
    caller.ask()
    for _ in range(4):
        caller.send()
    await caller.settle()
    assert list(detections.at_work) == [1, 2]
    for number in (2, 1):
        detections.end(number)
        await caller.settle()
    assert list(detections.at_work) == [3, 4], (
        "no place stays empty while a frame waits, whether outcomes are read or not"
    )
    await caller.leave()
