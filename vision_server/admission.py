"""Keeps count of the images that the server holds, so that memory stays bounded."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from vision_server.errors import QueueFull


class Place:
    """The room that one image takes; give it back with `with`. May be resized from any thread."""

    def __init__(self, admission: Admission, size_bytes: int) -> None:
        self._admission = admission
        self._size_bytes = size_bytes

    def grow(self, more_bytes: int) -> None:
        """Takes more room (the pixels, once the header tells how many); raises QueueFull when there is none."""
        self._admission._take(0, more_bytes)
        self._size_bytes += more_bytes

    def shrink_to(self, size_bytes: int) -> None:
        """Gives back what is above `size_bytes`."""
        self._admission._give(0, max(0, self._size_bytes - size_bytes))
        self._size_bytes = min(self._size_bytes, size_bytes)

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        while True:
            try:
                return self.enter(size_bytes)
            except QueueFull:
                turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(turn)
                try:
                    await turn
                except asyncio.CancelledError:
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
