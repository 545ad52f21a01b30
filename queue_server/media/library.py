"""Stores files and reads them again, for the queue server.

The bytes go first, where nobody sees them: into a key of their own or an object of a new name. One script then makes them a file,
or finds that they are one already. What breaks off before leaves bytes that die by themselves (a key) or are swept (an object).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from uuid import uuid4

from queue_server import keys
from queue_server.connection import Connection, memory_full, translated
from queue_server.errors import MediaNotFound, QueueFull, StoreUnavailable
from queue_server.media.files import (
    PART_TTL_MS,
    PIECE_BYTES,
    RENEW_S,
    WRITE_MS,
    StoredFile,
    belongs_outside,
    largest_bytes,
    new_object_name,
    read_found,
)
from queue_server.media.incoming import Announced, Content, Incoming, Joined, Limits, Pieces
from queue_server.media.objects import Objects
from queue_server.settings import QueueSettings
from serving.errors import ServiceError
from serving.logs import get_logger

# Pieces are larger than everything else that Redis is asked: they get more time.
PIECE_TIMEOUT_S = 10.0
# What comes within a submission and is at most so large is sent at once, without asking whether it is stored already; so many of
# them in one round trip.
SMALL_BYTES = 64 << 10
SMALL_AT_ONCE = 32
# How long a writer that was told to stop may take to clean up after itself; after that the sweep does.
ABORT_S = 15.0

_log = get_logger("media")


class Library:
    """`is_full` tells whether Redis' memory is too full for more; every method raises StoreUnavailable and QueueFull."""

    def __init__(self, connection: Connection, settings: QueueSettings, is_full: Callable[[], bool]) -> None:
        self._connection = connection
        self._settings = settings
        self._is_full = is_full
        self._first_ms = round(settings.keep_media_s * 1000)
        self._uploads = 0
        self.objects = Objects(settings.media_url)

    async def find(self, media_id: str) -> StoredFile | None:
        """What is known of a file, whose lifetime begins anew; None when it is not, or no longer, stored."""
        (found,) = await self.find_all([media_id])
        return found

    async def find_all(self, media_ids: Sequence[str]) -> list[StoredFile | None]:
        """The same for many, in their order."""
        rows = await self._connection.run("touch_media", {"media": list(media_ids), "first_ms": self._first_ms})
        return [read_found(media_id, row) for media_id, row in zip(media_ids, rows, strict=True)]

    async def store(
        self, source: AsyncIterator[bytes], announced: Announced, begin: Callable[[], Awaitable[None]]
    ) -> StoredFile:
        """Stores a file as it comes in; `begin` is awaited once its bytes are wanted.

        Raises:
            MediaInvalid: it is empty, too large, or not the one announced.
            UploadTooSlow: it does not come.
        """
        if announced.media_id and (found := await self.find(announced.media_id)):
            return found
        size_bytes, cure = largest_bytes(self._settings)
        limits = Limits(size_bytes, cure, self._settings.upload_idle_s, self._settings.upload_s)
        incoming = Incoming(source, announced, limits)
        self._check_room()
        if self._uploads >= self._settings.max_uploads:
            raise QueueFull(
                f"{self._uploads} files are being uploaded; the limit is {self._settings.max_uploads}.",
                cure="Try again when one has ended, or raise QUEUE_MAX_UPLOADS.",
                limit=self._settings.max_uploads,
            )
        self._uploads += 1
        try:
            await begin()
            await self._write(incoming, announced.content_type)
        finally:
            self._uploads -= 1
        stored = await self.find(incoming.media_id)
        if stored is None:
            raise StoreUnavailable(why="the file was gone as soon as it was stored")
        _log.info(
            "file stored", media_id=stored.media_id, size_bytes=stored.size_bytes, place=stored.object_name or "Redis"
        )
        return stored

    async def store_contents(self, contents: Mapping[str, bytes]) -> None:
        """Stores what came within submissions, by its ids."""
        most = min(SMALL_BYTES, self._settings.media_inline_bytes) if self._settings.media_url else SMALL_BYTES
        small = [(media_id, content) for media_id, content in contents.items() if len(content) <= most]
        for begin in range(0, len(small), SMALL_AT_ONCE):
            await self._store_small(small[begin : begin + SMALL_AT_ONCE])
        large = {media_id: content for media_id, content in contents.items() if len(content) > most}
        if not large:
            return
        # Asks with a short answer first: what is stored already is not sent again.
        for (media_id, content), found in zip(large.items(), await self.find_all(list(large)), strict=True):
            if found is not None:
                continue
            if belongs_outside(len(content), self._settings):
                await self._write_object(Content(media_id, content), "")
            elif len(content) > PIECE_BYTES:
                await self._write_part(Content(media_id, content), "")
            else:
                await self._complete(media_id, len(content), "", content=content)

    async def read(self, file: StoredFile, begin: int = 0) -> AsyncGenerator[bytes, None]:
        """The bytes from `begin` on, in pieces of at most PIECE_BYTES; the file lives on while it is read.

        Raises:
            MediaNotFound: its bytes are no longer there.
        """
        used_s = time.monotonic()
        renew_s = min(RENEW_S, self._settings.keep_media_s / 3)
        async with aclosing(
            self._read_object(file, begin) if file.object_name else self._read_blob(file, begin)
        ) as pieces:
            async for piece in pieces:
                yield piece
                if time.monotonic() - used_s > renew_s:
                    used_s = time.monotonic()
                    await self.find(file.media_id)

    # ---- writing

    def _check_room(self) -> None:
        if self._is_full():
            raise memory_full()

    async def _write(self, incoming: Incoming, content_type: str) -> None:
        """To Redis or to the object store, which the size decides: as much of it comes in first as may lie in Redis."""
        outside = bool(self._settings.media_url)
        head: list[bytes] = []
        most = self._settings.media_inline_bytes if outside else PIECE_BYTES
        async for piece in incoming:
            head.append(piece)
            if incoming.size_bytes > most:
                whole = Joined(head, incoming)
                await (self._write_object if outside else self._write_part)(whole, content_type)
                return
        if incoming.size_bytes > PIECE_BYTES:
            await self._write_part(Joined(head, incoming), content_type)
        else:
            await self._complete(incoming.media_id, incoming.size_bytes, content_type, content=b"".join(head))

    async def _write_part(self, pieces: Pieces, content_type: str) -> None:
        """Into a key of its own, which dies by itself, in pieces that hold up nobody."""
        name = uuid4().hex
        try:
            async for piece in pieces:
                self._check_room()
                view = memoryview(piece)
                for begin in range(0, len(view), PIECE_BYTES):
                    pipeline = self._connection.client.pipeline(transaction=False)
                    pipeline.append(keys.part(name), bytes(view[begin : begin + PIECE_BYTES]))
                    pipeline.pexpire(keys.part(name), PART_TTL_MS)
                    await self._connection.ask(pipeline.execute(), timeout_s=PIECE_TIMEOUT_S)
            await self._complete(pieces.media_id, pieces.size_bytes, content_type, part=name)
        except BaseException:
            with suppress(ServiceError):
                await asyncio.shield(self._connection.ask(self._connection.client.delete(keys.part(name))))
            raise

    async def _write_object(self, pieces: Pieces, content_type: str) -> None:
        """Into an object of a new name, which the index knows before it exists."""
        name = new_object_name()
        writing = asyncio.ensure_future(self._write_known(name, pieces))
        try:
            await asyncio.shield(writing)
        except BaseException:
            await asyncio.shield(self._abandon(name, pieces, writing))
            raise
        # From here on only the index knows whether the object belongs to a file: an answer may be lost.
        if await self._complete(pieces.media_id, pieces.size_bytes, content_type, object_name=name) == "same":
            await self._delete_object(name)

    async def _write_known(self, name: str, pieces: Pieces) -> None:
        await self._say_writing(name, again=False)
        await self.objects.write(name, self._saying_so(name, pieces))

    async def _store_small(self, contents: Sequence[tuple[str, bytes]]) -> None:
        """In one round trip, whether they are stored already or not."""
        if len(contents) == 1:
            ((media_id, content),) = contents
            await self._complete(media_id, len(content), "", content=content)
            return
        calls = [(self._describe(media_id, len(content)), content) for media_id, content in contents]
        for answer in await self._connection.run_many("store_media", calls):
            if isinstance(answer, BaseException):
                with translated(self._settings.url):
                    raise answer

    async def _saying_so(self, name: str, pieces: Pieces) -> AsyncIterator[bytes]:
        said_s = time.monotonic()
        async for piece in pieces:
            yield piece
            if time.monotonic() - said_s > RENEW_S:
                said_s = time.monotonic()
                await self._say_writing(name, again=True)

    async def _say_writing(self, name: str, *, again: bool) -> None:
        kept = await self._connection.run("begin_object", {"object": name, "write_ms": WRITE_MS, "again": again})
        if not kept:
            raise StoreUnavailable(why="the file took so long to write that it was given up")

    async def _complete(
        self,
        media_id: str,
        size_bytes: int,
        content_type: str,
        *,
        object_name: str = "",
        part: str = "",
        content: bytes = b"",
    ) -> str:
        """Makes the bytes a file: `stored`, or `same`: others have stored the same ones."""
        parameters = self._describe(media_id, size_bytes, content_type, object_name, part)
        word: str = (await self._connection.run("store_media", parameters, content)).decode()
        if word == "late":
            raise StoreUnavailable(why="the file took so long to write that it was given up")
        return word

    def _describe(
        self, media_id: str, size_bytes: int, content_type: str = "", object_name: str = "", part: str = ""
    ) -> dict[str, object]:
        return {
            "media_id": media_id,
            "size": size_bytes,
            "type": content_type,
            "object": object_name,
            "part": part,
            "first_ms": self._first_ms,
        }

    async def _abandon(self, name: str, pieces: Pieces, writing: asyncio.Future[None]) -> None:
        """The writer cleans up what it has written so far; what it leaves, the sweep finds."""
        pieces.stop()
        with suppress(Exception, asyncio.CancelledError):
            async with asyncio.timeout(ABORT_S):
                await asyncio.gather(writing, return_exceptions=True)
            await self._delete_object(name)

    async def _delete_object(self, name: str) -> None:
        with suppress(ServiceError):
            await self.objects.delete(name)
            await self._connection.ask(self._connection.client.zrem(keys.OBJECTS, name, f"{name} -"))

    # ---- reading

    async def _read_blob(self, file: StoredFile, begin: int) -> AsyncGenerator[bytes, None]:
        while begin < file.size_bytes:
            end = min(begin + PIECE_BYTES, file.size_bytes)
            command = self._connection.client.getrange(keys.blob(file.media_id), begin, end - 1)
            piece: bytes = await self._connection.ask(command, timeout_s=PIECE_TIMEOUT_S)
            if len(piece) != end - begin:
                raise MediaNotFound(media_id=file.media_id)
            yield piece
            begin = end

    async def _read_object(self, file: StoredFile, begin: int) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self.objects.read(file.object_name, begin, file.size_bytes)) as pieces:
                async for piece in pieces:
                    yield piece
        except FileNotFoundError:
            raise MediaNotFound(media_id=file.media_id) from None
