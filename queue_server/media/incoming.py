"""The bytes of a file on their way in: hashed, counted and checked while they pass."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from queue_server.errors import MediaInvalid, UploadTooSlow
from queue_server.media.files import DEFAULT_TYPE

# A larger piece is hashed on a thread: 1 MB takes about a millisecond, which the event loop has not.
HASH_ON_LOOP_BYTES = 64 << 10


@dataclass(frozen=True)
class Announced:
    """What the sender says of a file before its bytes; empty and 0: it does not know."""

    content_type: str = DEFAULT_TYPE
    media_id: str = ""
    size_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """What one file may take; `cure` is for whoever sends more bytes."""

    size_bytes: int
    cure: str
    idle_s: float
    whole_s: float


class Incoming:
    """Iterates over the pieces of one file, to the end only when all checks have passed.

    Whoever stores what comes out of it, and gives up when it raises, stores nothing that is not as announced.

    Raises:
        MediaInvalid, UploadTooSlow, and what the source raises.
    """

    def __init__(self, source: AsyncIterator[bytes], announced: Announced, limits: Limits) -> None:
        self._source = source
        self._announced = announced
        self._limits = limits
        self._hash = hashlib.sha256()
        self._until_s = time.monotonic() + limits.whole_s
        self._reader: asyncio.Task[object] | None = None
        self._stopped = False
        self.size_bytes = 0
        if announced.size_bytes > limits.size_bytes:
            raise self._too_large(announced.size_bytes)

    @property
    def media_id(self) -> str:
        """The id of what has come so far."""
        return "sha256:" + self._hash.hexdigest()

    def stop(self) -> None:
        """Ends the iteration with CancelledError, also for one who waits for a piece in another task."""
        self._stopped = True
        if self._reader is not None:
            self._reader.cancel()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._stopped:
            raise asyncio.CancelledError
        self._reader = asyncio.current_task()
        try:
            piece = await self._next()
        finally:
            self._reader = None
        if piece is None:
            self._check_whole()
            raise StopAsyncIteration
        return piece

    async def _next(self) -> bytes | None:
        wait_s = min(self._limits.idle_s, self._until_s - time.monotonic())
        try:
            async with asyncio.timeout(wait_s):
                piece = await anext(self._source, None)
        except TimeoutError:
            raise UploadTooSlow(size_bytes=self.size_bytes, limit_s=self._limits.idle_s) from None
        if piece is None:
            return None
        self.size_bytes += len(piece)
        if self.size_bytes > self._limits.size_bytes:
            raise self._too_large(self.size_bytes)
        if self._announced.size_bytes and self.size_bytes > self._announced.size_bytes:
            raise self._other_size("more")
        if len(piece) > HASH_ON_LOOP_BYTES:
            await asyncio.to_thread(self._hash.update, piece)
        else:
            self._hash.update(piece)
        return piece

    def _check_whole(self) -> None:
        if not self.size_bytes:
            raise MediaInvalid("The file is empty.", field="chunk")
        if self._announced.size_bytes and self.size_bytes != self._announced.size_bytes:
            raise self._other_size(f"{self.size_bytes}")
        if self._announced.media_id and self.media_id != self._announced.media_id:
            raise MediaInvalid(
                f"The bytes are not those of {self._announced.media_id}: theirs is {self.media_id}.",
                field="config.media_id",
                cure="Send the bytes that it names, or no media_id.",
                media_id=self.media_id,
            )

    def _other_size(self, came: str) -> MediaInvalid:
        return MediaInvalid(
            f"The file was announced with {self._announced.size_bytes} bytes; {came} came.",
            field="config.size_bytes",
            cure="Send the whole file again.",
            size_bytes=self._announced.size_bytes,
        )

    def _too_large(self, size_bytes: int) -> MediaInvalid:
        return MediaInvalid(
            f"The file has {size_bytes} bytes or more; the limit is {self._limits.size_bytes}.",
            field="config.size_bytes",
            cure=self._limits.cure,
            size_bytes=size_bytes,
            limit_bytes=self._limits.size_bytes,
        )


class Pieces(Protocol):
    """Pieces of a file whose id and size are known once they have all come."""

    @property
    def media_id(self) -> str:
        """The id."""

    @property
    def size_bytes(self) -> int:
        """The size."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterates over the bytes."""

    def stop(self) -> None:
        """Ends the iteration, also for one who waits for a piece."""


class Joined:
    """What has come already, then the rest."""

    def __init__(self, head: list[bytes], rest: Incoming) -> None:
        self._head = head
        self._rest = rest

    @property
    def media_id(self) -> str:
        """The id of what has come so far."""
        return self._rest.media_id

    @property
    def size_bytes(self) -> int:
        """The size of what has come so far."""
        return self._rest.size_bytes

    def stop(self) -> None:
        """Ends the rest."""
        self._rest.stop()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._head:
            yield self._head.pop(0)
        async for piece in self._rest:
            yield piece


class Content:
    """A file that is there as a whole."""

    def __init__(self, media_id: str, content: bytes) -> None:
        self.media_id = media_id
        self.size_bytes = len(content)
        self._content = content

    def stop(self) -> None:
        """There is nothing to wait for."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content
