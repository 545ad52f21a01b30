"""Keeps count of the images that the server holds, so that memory stays bounded."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from vision_server.errors import QueueFull
from vision_server.line import Line
from vision_server.requests import Priority

SHARES = (1.0, 0.9, 0.75, 0.6)
"""How full the server may become through callers of each level: INTERACTIVE, STANDARD, BATCH, and BATCH that may wait.

So those who can wait longer never take the last places from those who cannot. A caller that may wait (a stream, which has
its next frames wait instead of being refused) counts one level lower than one of its priority that may not. Shares are
rounded up to whole images; an empty server takes any image.
"""


class GivenBack(Exception):
    """The place belongs to nobody any more; ends the work of a thread whose caller has left, and is seen by no one."""


class Place:
    """The room that one image takes; give it back with `with`. May grow from any thread."""

    def __init__(self, admission: Admission, size_bytes: int, level: int) -> None:
        self._admission = admission
        self._size_bytes = size_bytes
        self._level = level
        # A caller may leave while a thread is about to decode for it: what has been given back must not grow again.
        self._lock = threading.Lock()
        self._given_back = False

    def grow(self, more_bytes: int) -> None:
        """Takes more room (the pixels, once the header tells how many).

        Raises QueueFull when there is none, GivenBack when the caller has left: there is nobody to decode for.
        """
        with self._lock:
            if self._given_back:
                raise GivenBack
            self._admission._take(0, more_bytes, self._level)
            self._size_bytes += more_bytes

    def give_back(self) -> None:
        """Makes room for others; on the event loop's thread."""
        with self._lock:
            if self._given_back:
                return
            self._given_back = True
        self._admission._leave(self._size_bytes)

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()


@dataclass(eq=False, slots=True)
class _Turn:
    """Someone who waits to be let in."""

    size_bytes: int
    level: int
    entered_s: float
    future: asyncio.Future[Place]


class Admission:
    """Lets images in while there is room for their number and bytes: SHARES of it, by priority.

    `estimate_s` tells refused callers when to come back. Callers that may wait (streams) are let in by priority and age, as in
    Line, and move up a level for each `ageing_ms` waited: those who keep the server nearly full cannot keep them out for
    ever. enter() and enter_when_free() belong to the event loop's thread.
    """

    def __init__(
        self, *, max_images: int, max_bytes: int, estimate_s: Callable[[], float], ageing_ms: float = 500.0
    ) -> None:
        self._max_images = tuple(math.ceil(max_images * share) for share in SHARES)
        self._max_bytes = tuple(math.ceil(max_bytes * share) for share in SHARES)
        self._estimate_s = estimate_s
        self._ageing_s = ageing_ms / 1000
        self._images = 0
        self._bytes = 0
        self._lock = threading.Lock()
        self._line: Line[_Turn] = Line(self._ageing_s)

    @property
    def image_count(self) -> int:
        """Images held now."""
        return self._images

    @property
    def size_bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def enter(self, size_bytes: int, priority: Priority = Priority.STANDARD) -> Place:
        """A place for an image of that many bytes; raises QueueFull when there is none."""
        self._take(1, size_bytes, priority)
        return Place(self, size_bytes, priority)

    async def enter_when_free(self, size_bytes: int, priority: Priority = Priority.STANDARD) -> Place:
        """A place for an image, waiting for one if need be."""
        loop = asyncio.get_running_loop()
        turn = _Turn(size_bytes, priority + 1, time.perf_counter(), loop.create_future())
        self._line.add(turn, priority, turn.entered_s)
        self._let_in()
        try:
            return await turn.future
        except asyncio.CancelledError:
            if turn.future.done() and not turn.future.cancelled():
                turn.future.result().give_back()  # let in and cancelled at once
            else:
                self._line.remove(turn)
                self._let_in()  # the next one may be smaller
            raise

    def _let_in(self) -> None:
        """Gives free places to those who wait, in their order; a large image that does not fit yet is not passed by."""
        now_s = time.perf_counter()
        while (turn := self._line.head()) is not None:
            if turn.future.cancelled():  # in this very turn of the loop
                self._line.remove(turn)
                continue
            level = max(0, turn.level - int((now_s - turn.entered_s) / self._ageing_s))
            with self._lock:
                if self._missing(1, turn.size_bytes, level):
                    return
                self._images += 1
                self._bytes += turn.size_bytes
            self._line.remove(turn)
            turn.future.set_result(Place(self, turn.size_bytes, level))

    def _take(self, images: int, size_bytes: int, level: int) -> None:
        with self._lock:
            missing = self._missing(images, size_bytes, level)
            if not missing:
                self._images += images
                self._bytes += size_bytes
                return
            held, limits = (self._images, self._max_images) if missing == "images" else (self._bytes, self._max_bytes)
        raise QueueFull(
            what=missing,
            waiting=held,
            limit=limits[level],
            retry_after_s=self._estimate_s(),
            total=limits[0],
        )

    def _missing(self, images: int, size_bytes: int, level: int) -> str:
        """What there is too little of; '': nothing. A single image always fits: its own limits are checked elsewhere."""
        if self._images + images > self._max_images[level]:
            return "images"
        if self._bytes + size_bytes > self._max_bytes[level] and self._images > (0 if images else 1):
            return "bytes of images"
        return ""

    def _leave(self, size_bytes: int) -> None:
        with self._lock:
            self._images -= 1
            self._bytes -= size_bytes
        self._let_in()
