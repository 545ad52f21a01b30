"""The gate before a model: never more frames at work than there is room for, and the same to every stream that wants it."""

from __future__ import annotations

from collections import Counter
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from vision_server.fair import FairGate, Share


class Streams:
    """Streams that always want more, up to their own number at once; frames end in the order they began."""

    def __init__(self, room: int, in_flight: list[int]) -> None:
        self.room = room
        self.gate = FairGate(room)
        self.begun: list[int] = []
        self.at_work: list[int] = []
        self.in_flight = in_flight
        self.shares: list[Share] = [
            self.gate.join(partial(self.begin_in_turn, stream)) for stream in range(len(in_flight))
        ]

    def begin(self, stream: int) -> None:
        self.begun.append(stream)
        self.at_work.append(stream)
        assert len(self.at_work) <= self.room

    def begin_in_turn(self, stream: int) -> None:
        self.begin(stream)
        self.want(stream)

    def want(self, stream: int) -> None:
        while self.at_work.count(stream) < self.in_flight[stream] and self.shares[stream].take():
            self.begin(stream)

    def end(self, position: int = 0) -> None:
        stream = self.at_work.pop(position)
        self.shares[stream].give()
        self.want(stream)


@settings(max_examples=60, deadline=None)
@given(
    room=st.integers(1, 12),
    in_flight=st.lists(st.integers(2, 16), min_size=1, max_size=12),
    ends=st.lists(st.integers(0, 11), max_size=40),
)
def test_streams_get_the_same_however_much_they_send_at_once(room: int, in_flight: list[int], ends: list[int]) -> None:
    streams = Streams(room, in_flight)
    for stream in range(len(in_flight)):
        streams.want(stream)
    for position in ends:
        streams.end(position % len(streams.at_work))
        assert len(streams.at_work) == min(room, sum(in_flight)), "no place is empty while someone wants it"
    if room > len(in_flight):
        return
    for _ in range(4 * room):
        streams.end()
    streams.begun.clear()
    for _ in range(10 * len(in_flight)):
        streams.end()
    served = Counter(streams.begun)
    assert all(abs(served[stream] - 10) <= 1 for stream in range(len(in_flight))), served


def test_a_greedy_stream_has_all_the_room_only_while_nobody_else_wants_it() -> None:
    streams = Streams(4, [16, 2, 2])
    streams.want(0)
    assert streams.at_work == [0, 0, 0, 0]
    streams.want(1)
    streams.want(2)
    for _ in range(4):
        streams.end()
    assert Counter(streams.at_work) in (
        Counter({0: 2, 1: 1, 2: 1}),
        Counter({0: 1, 1: 2, 2: 1}),
        Counter({0: 1, 1: 1, 2: 2}),
    )


def test_who_leaves_is_passed_over() -> None:
    streams = Streams(1, [1, 1, 1])
    for stream in range(3):
        streams.want(stream)
    streams.shares[1].leave()
    streams.end()
    assert streams.at_work == [2]
