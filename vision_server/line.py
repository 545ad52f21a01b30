"""A line of those who wait: by priority, and who waits long moves up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from operator import gt
from typing import Generic, TypeVar

from vision_server.requests import Priority

Member = TypeVar("Member")


class Line(Generic[Member]):
    """Who comes next: the one with the least `entered_s + priority × ageing_s`, INTERACTIVE counting 0, BATCH 2.

    That is the same as moving up one priority for each `ageing_s` waited, without sorting anew. It bounds the wait: a BATCH
    member lets those INTERACTIVE ones pass that enter within 2 × ageing_s after it, and none that enters later. Among equals,
    first come, first served. Every operation takes the same time however long the line is.
    """

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s
        # Who leaves early must be gone at once, from the middle too: a list would keep its item, a heap would have to search.
        self._ranks: tuple[OrderedDict[Member, float], ...] = tuple(OrderedDict() for _ in Priority)

    def __len__(self) -> int:
        return sum(map(len, self._ranks))

    def __iter__(self) -> Iterator[Member]:
        for rank in self._ranks:
            yield from rank

    def add(self, member: Member, priority: Priority, entered_s: float) -> None:
        """Puts someone in line; `entered_s` never goes back from one call to the next."""
        self._ranks[priority][member] = entered_s

    def remove(self, member: Member) -> None:
        """Takes someone out, wherever in the line; one that is not in it is no error."""
        for rank in self._ranks:
            rank.pop(member, None)

    def head(self) -> Member | None:
        """Who comes next; None: nobody waits."""
        first: Member | None = None
        first_turn_s = 0.0
        for priority, rank in enumerate(self._ranks):
            if rank:
                member = next(iter(rank))
                turn_s = rank[member] + priority * self._ageing_s
                if first is None or turn_s < first_turn_s:
                    first, first_turn_s = member, turn_s
        return first

    def ahead_of(self, priority: Priority, entered_s: float) -> int:
        """How many would come before one that entered then."""
        count = 0
        for rank_priority, rank in enumerate(self._ranks):
            if rank_priority <= priority:
                count += len(rank)
                continue
            # Of the less urgent, those who have waited long enough: they stand in front.
            by_s = entered_s - (rank_priority - priority) * self._ageing_s
            count += sum(1 for _ in takewhile(partial(gt, by_s), rank.values()))
        return count

    def oldest_s(self) -> float:
        """When the one that has waited longest entered. Raises ValueError when nobody waits."""
        return min(rank[next(iter(rank))] for rank in self._ranks if rank)
