"""Shares a model among the streams: one place after another, each stream in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class FairGate:
    """At most `room` frames of all streams are at work at once; what comes later waits here, outside the model's line.

    Each stream stands in line with one frame, however many it has: so all get the same who always have one. Without the gate
    each would get as much of the model as it sends frames at once. Lives on one event loop.
    """

    def __init__(self, room: int) -> None:
        self._free = room
        self._line: deque[Share] = deque()

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._free

    def join(self, on_turn: Callable[[], None]) -> Share:
        """A stream's share; `on_turn` is called when its turn has come and a place has been taken for it."""
        return Share(self, on_turn)

    def _take(self, share: Share) -> bool:
        if not self._free:
            if share not in self._line:
                self._line.append(share)
            return False
        self._free -= 1
        return True

    def _give(self) -> None:
        if self._line:
            self._line.popleft().on_turn()
        else:
            self._free += 1

    def _leave(self, share: Share) -> None:
        if share in self._line:
            self._line.remove(share)


class Share:
    """One stream's access to a gate."""

    def __init__(self, gate: FairGate, on_turn: Callable[[], None]) -> None:
        self._gate = gate
        self.on_turn = on_turn

    def take(self) -> bool:
        """A place for one frame; False: there is none, the stream stands in line and `on_turn` will be called."""
        return self._gate._take(self)

    def give(self) -> None:
        """Gives one place back."""
        self._gate._give()

    def leave(self) -> None:
        """Stands in line no more; places that were taken are still to be given back."""
        self._gate._leave(self)
