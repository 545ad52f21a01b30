"""Keeps count of the images that the server holds, so that memory stays bounded."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from vision_server.errors import QueueFull


class GivenBack(Exception):
    """The place belongs to nobody any more; ends the work of a thread whose caller has left, and is seen by no one."""


class Place:
    """The room that one image takes; give it back with `with`. May grow from any thread."""

    def __init__(self, admission: Admission, size_bytes: int) -> None:
        self._admission = admission
        self._size_bytes = size_bytes
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
            self._admission._take(0, more_bytes)
            self._size_bytes += more_bytes

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._given_back = True
        self._admission._leave(self._size_bytes)


class Admission:
    """Lets images in while there is room for their number and bytes.

    `estimate_s` tells refused callers when to come back. Callers that may wait (streams) are let in first come, first
    served; enter() and enter_when_free() belong to the event loop's thread.
    """

    def __init__(self, *, max_images: int, max_bytes: int, estimate_s: Callable[[], float]) -> None:
        self._max_images = max_images
        self._max_bytes = max_bytes
        self._estimate_s = estimate_s
        self._images = 0
        self._bytes = 0
        self._lock = threading.Lock()
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def image_count(self) -> int:
        """Images held now."""
        return self._images

    @property
    def size_bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def enter(self, size_bytes: int) -> Place:
        """A place for an image of that many bytes; raises QueueFull when there is none."""
        self._take(1, size_bytes)
        return Place(self, size_bytes)

    async def enter_when_free(self, size_bytes: int) -> Place:
        """A place for an image, waiting for one if need be."""
        turn: asyncio.Future[None] | None = None
        while True:
            try:
                place = self.enter(size_bytes)
            except QueueFull:
                # One that was woken and still does not fit keeps its turn; a new one goes to the end of the line.
                queue = self._waiting.append if turn is None else self._waiting.appendleft
                turn = asyncio.get_running_loop().create_future()
                queue(turn)
                await self._turn(turn)
            else:
                if turn is not None:
                    self._wake()  # a large image may have made room for several
                return place

    async def _turn(self, turn: asyncio.Future[None]) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):
                    self._waiting.remove(turn)
            else:
                # Woken and cancelled at once: the next in line must not sleep through the free place.
                self._wake()
            raise

    def _take(self, images: int, size_bytes: int) -> None:
        with self._lock:
            # A single image always fits into an empty server; its own limits are checked elsewhere.
            if self._images + images > self._max_images:
                raise QueueFull(
                    what="images", waiting=self._images, limit=self._max_images, retry_after_s=self._estimate_s()
                )
            if self._bytes + size_bytes > self._max_bytes and self._images > (0 if images else 1):
                raise QueueFull(
                    what="bytes of images", waiting=self._bytes, limit=self._max_bytes, retry_after_s=self._estimate_s()
                )
            self._images += images
            self._bytes += size_bytes

    def _give(self, images: int, size_bytes: int) -> None:
        with self._lock:
            self._images -= images
            self._bytes -= size_bytes

    def _leave(self, size_bytes: int) -> None:
        self._give(1, size_bytes)
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
