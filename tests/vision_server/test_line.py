"""The line: its order is that of members sorted anew at every moment."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vision_server.line import Line
from vision_server.requests import Priority


def emptied(line: Line[int]) -> list[int]:
    order = []
    while (member := line.head()) is not None:
        line.remove(member)
        order.append(member)
    return order


# Whole 64ths of a second are exact in binary, so that a tie is a tie however the sums are written.
@given(
    entries=st.lists(st.tuples(st.sampled_from(Priority), st.integers(0, 64).map(lambda n: n / 64)), max_size=30),
    leave=st.sets(st.integers(0, 29)),
)
def test_whoever_has_waited_an_ageing_longer_counts_as_one_priority_higher(
    entries: list[tuple[Priority, float]], leave: set[int]
) -> None:
    line: Line[int] = Line(0.5)
    now_s = 0.0
    turns = {}
    for number, (priority, later_s) in enumerate(entries):
        now_s += later_s
        line.add(number, priority, now_s)
        turns[number] = (now_s + 0.5 * priority, priority, number)
    for number in leave:
        line.remove(number)  # some were never there
        turns.pop(number, None)
    assert len(line) == len(turns) == len(list(line))
    for priority in Priority:
        mine = (now_s + 0.5 * priority, priority, len(entries))
        assert line.ahead_of(priority, now_s) == sum(turn < mine for turn in turns.values())
    assert emptied(line) == sorted(turns, key=turns.__getitem__)


def test_a_batch_member_waits_for_no_interactive_one_that_comes_two_ageings_later() -> None:
    line: Line[int] = Line(0.5)
    line.add(0, Priority.BATCH, 10.0)
    line.add(1, Priority.INTERACTIVE, 10.99)
    line.add(2, Priority.INTERACTIVE, 11.01)
    assert line.oldest_s() == 10.0
    assert emptied(line) == [1, 0, 2]
