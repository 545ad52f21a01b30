"""Answers UploadMedia and GetMedia: the contract's messages on one side, the library on the other."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress

from ai4thai.queue.v1 import queue_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from queue_server.errors import InvalidField, MediaNotFound, OffsetOutOfRange, UploadTooSlow
from queue_server.media.files import DEFAULT_TYPE, StoredFile
from queue_server.media.incoming import Announced
from queue_server.media.library import Library
from serving.errors import ServiceError

MAX_CHUNK_BYTES = 1 << 20
"""The contract's bound for one message, in both directions."""
WANTED = "x-chunks-wanted"
"""In the initial metadata of UploadMedia: the file is not stored yet, and the config is fine."""
DRAIN_S, DRAIN_IDLE_S, DRAIN_BYTES = 5.0, 0.3, 64 << 20
"""What is taken of an upload that has been answered already, and thrown away: as long as it comes, within these bounds."""

Metadata = tuple[tuple[str, str], ...]

_MEDIA_ID = re.compile(r"sha256:[0-9a-f]{64}")
# RFC 9110, 8.3.1, parameters included.
_TOKEN = r"[\w!#$&^.+*'`|~%-]{1,64}"
_CONTENT_TYPE = re.compile(rf'{_TOKEN}/{_TOKEN}(?: *; *{_TOKEN}=(?:{_TOKEN}|"[\w !#$&^.+*,:/()-]*"))*', re.ASCII)
MAX_CONTENT_TYPE = 200


class MediaCalls:
    """What the two methods do."""

    def __init__(self, library: Library, idle_s: float) -> None:
        self._library = library
        self._idle_s = idle_s

    async def upload(
        self, requests: AsyncIterator[pb.UploadMediaRequest], send_metadata: Callable[[Metadata], Awaitable[None]]
    ) -> pb.UploadMediaResponse:
        """Stores a file. The sender leaves, or errs: nothing is stored.

        The initial metadata tells whether the chunks are wanted, once the config has been read.

        Raises:
            InvalidField, MediaInvalid, UploadTooSlow, QueueFull, StoreUnavailable.
        """
        told = False

        async def begin() -> None:
            nonlocal told
            told = True
            await send_metadata(((WANTED, "1"),))

        try:
            response = await self._upload(requests, begin)
        except UploadTooSlow:
            raise
        except ServiceError:
            if not told:
                await send_metadata(())
            await _drain(requests)
            raise
        if not told:
            await send_metadata(())
            await _drain(requests)
        return response

    async def _upload(
        self, requests: AsyncIterator[pb.UploadMediaRequest], begin: Callable[[], Awaitable[None]]
    ) -> pb.UploadMediaResponse:
        try:
            async with asyncio.timeout(self._idle_s):
                first = await anext(requests, None)
        except TimeoutError:
            raise UploadTooSlow(size_bytes=0, limit_s=self._idle_s) from None
        if first is None or first.WhichOneof("message") != "config":
            raise InvalidField(
                "config", "The first message is not the config.", cure="Send `config` first, then `chunk`s."
            )
        stored = await self._library.store(_chunks(requests), _read_config(first.config), begin)
        return pb.UploadMediaResponse(media=_write_file(stored))

    async def get(self, request: pb.GetMediaRequest) -> AsyncGenerator[pb.GetMediaResponse, None]:
        """What is known of the file, then its bytes.

        Raises:
            InvalidField, MediaNotFound, OffsetOutOfRange, StoreUnavailable.
        """
        if not request.media_id:
            raise InvalidField("media_id", "media_id is empty.", cure="Send the id that UploadMedia answered.")
        if request.offset_bytes < 0:
            raise InvalidField("offset_bytes", f"offset_bytes is {request.offset_bytes}; it begins at 0.")
        # What could not be an id must not become part of a key.
        file = await self._library.find(request.media_id) if _MEDIA_ID.fullmatch(request.media_id) else None
        if file is None:
            raise MediaNotFound(media_id=request.media_id)
        if request.offset_bytes > file.size_bytes:
            raise OffsetOutOfRange(offset_bytes=request.offset_bytes, size_bytes=file.size_bytes)
        yield pb.GetMediaResponse(media=_write_file(file))
        async with aclosing(self._library.read(file, request.offset_bytes)) as pieces:
            async for piece in pieces:
                yield pb.GetMediaResponse(chunk=piece)


async def _drain(requests: AsyncIterator[pb.UploadMediaRequest]) -> None:
    """Lets the sender finish: a client that finds the call closed while it writes may not tell why it was (grpc.aio does not)."""
    until_s, size_bytes = time.monotonic() + DRAIN_S, 0
    with suppress(Exception):
        while size_bytes < DRAIN_BYTES and time.monotonic() < until_s:
            async with asyncio.timeout(DRAIN_IDLE_S):
                request = await anext(requests, None)
            if request is None:
                return
            size_bytes += len(request.chunk)


async def _chunks(requests: AsyncIterator[pb.UploadMediaRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("message") != "chunk":
            raise InvalidField(
                "chunk", "A message after the first is not a chunk.", cure="Send `config` once, then `chunk`s."
            )
        if len(request.chunk) > MAX_CHUNK_BYTES:
            raise InvalidField(
                "chunk",
                f"The chunk has {len(request.chunk)} bytes; the limit is {MAX_CHUNK_BYTES}.",
                cure="Send more and smaller ones.",
            )
        yield request.chunk


def _read_config(config: pb.UploadMediaConfig) -> Announced:
    if config.content_type and (
        len(config.content_type) > MAX_CONTENT_TYPE or not _CONTENT_TYPE.fullmatch(config.content_type)
    ):
        raise InvalidField(
            "config.content_type",
            f"{config.content_type[:80]!r} is no media type.",
            cure="Send `image/jpeg`, `video/mp4`, or nothing.",
        )
    if config.media_id and not _MEDIA_ID.fullmatch(config.media_id):
        raise InvalidField(
            "config.media_id",
            f"{config.media_id[:80]!r} is no media id.",
            cure="It is `sha256:` and 64 hex digits of the file's SHA-256; or send none.",
        )
    if config.size_bytes < 0:
        raise InvalidField("config.size_bytes", f"size_bytes is {config.size_bytes}.", cure="Send the size, or 0.")
    return Announced(config.content_type or DEFAULT_TYPE, config.media_id, config.size_bytes)


def _write_file(file: StoredFile) -> pb.Media:
    media = pb.Media(media_id=file.media_id, size_bytes=file.size_bytes, content_type=file.content_type)
    if file.expire_ms:
        stamp = Timestamp()
        stamp.FromMilliseconds(file.expire_ms)
        media.expire_time.CopyFrom(stamp)
    return media
