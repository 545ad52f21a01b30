"""Reads the files that a job needs and stores those that it brings, for a worker's threads."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4

import redis

from queue_server import keys
from queue_server.connection import translated
from queue_server.errors import MediaNotFound, QueueFull, ResultTooLarge, StoreUnavailable
from queue_server.media.files import (
    PART_TTL_MS,
    PIECE_BYTES,
    RENEW_S,
    WRITE_MS,
    belongs_outside,
    largest_bytes,
    new_object_name,
)
from queue_server.media.objects import Objects
from queue_server.settings import WorkerSettings


class Redis(Protocol):
    """What a worker's store lends."""

    @property
    def client(self) -> redis.Redis:
        """The client."""

    def run(self, script: str, parameters: dict[str, object], payload: bytes = b"") -> Any:
        """Runs one of scripts.NAMES."""


class WorkerFiles:
    """Safe to use from many threads.

    Every method raises StoreUnavailable when Redis or the object store does not do as asked. `check` is called between pieces:
    what it raises ends the work.
    """

    def __init__(self, store: Redis, settings: WorkerSettings) -> None:
        self._store = store
        self._settings = settings
        self._first_ms = round(settings.keep_media_s * 1000)
        self._objects = Objects(settings.media_url)

    def content(self, media_id: str) -> bytes:
        """All of a file's bytes; for images. Raises MediaNotFound."""
        return b"".join(self._pieces(media_id))

    def copy(self, media_id: str, path: Path, check: Callable[[], None]) -> None:
        """Writes a copy of the file to this machine's disk. Raises MediaNotFound."""
        with path.open("wb") as copy:
            for piece in self._pieces(media_id):
                check()
                copy.write(piece)

    def store(self, path: Path, content_type: str, check: Callable[[], None]) -> str:
        """Stores a result's file and answers its id; it lives on for a while, until finish.lua gives it to its job.

        Raises:
            ResultTooLarge.
        """
        size_bytes = path.stat().st_size
        if not size_bytes:
            raise ValueError(f"{path} is empty.")
        limit_bytes, _ = largest_bytes(self._settings)
        if size_bytes > limit_bytes:
            raise ResultTooLarge(size_bytes=size_bytes, limit_bytes=limit_bytes)
        with path.open("rb") as file:
            media_id = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        (found,) = self._store.run("touch_media", {"media": [media_id], "first_ms": self._first_ms})
        if found:
            return media_id
        try:
            if belongs_outside(size_bytes, self._settings):
                self._write_object(path, media_id, size_bytes, content_type, check)
            else:
                self._write_part(path, media_id, size_bytes, content_type, check)
        except QueueFull as error:
            # To its submitter a job is not at fault because there is no room just now: it is tried again.
            raise StoreUnavailable(why=error.message, retry_after_s=error.retry_after_s or 0.0) from error
        return media_id

    # ---- reading

    def _pieces(self, media_id: str) -> Iterator[bytes]:
        with translated(self._settings.url):
            pipeline = self._store.client.pipeline(transaction=False)
            pipeline.hmget(keys.media(media_id), ["size", "object"])
            pipeline.getrange(keys.blob(media_id), 0, PIECE_BYTES - 1)
            (size, object_name), piece = pipeline.execute()
        if size is None:
            raise MediaNotFound(media_id=media_id)
        if object_name:
            try:
                yield from self._objects.read_blocking(object_name.decode())
            except FileNotFoundError:
                raise MediaNotFound(media_id=media_id) from None
            return
        yield piece
        read_bytes, size_bytes = len(piece), int(size)
        while piece and read_bytes < size_bytes:
            with translated(self._settings.url):
                end = read_bytes + PIECE_BYTES - 1
                piece = cast("bytes", self._store.client.getrange(keys.blob(media_id), read_bytes, end))
            yield piece
            read_bytes += len(piece)
        if read_bytes != size_bytes:
            raise MediaNotFound(media_id=media_id)

    # ---- writing

    def _write_part(
        self, path: Path, media_id: str, size_bytes: int, content_type: str, check: Callable[[], None]
    ) -> None:
        name = uuid4().hex
        try:
            for piece in _read(path, check):
                with translated(self._settings.url):
                    pipeline = self._store.client.pipeline(transaction=False)
                    pipeline.append(keys.part(name), piece)
                    pipeline.pexpire(keys.part(name), PART_TTL_MS)
                    pipeline.execute()
            self._complete(media_id, size_bytes, content_type, part=name)
        except BaseException:
            with suppress(redis.RedisError):
                self._store.client.delete(keys.part(name))
            raise

    def _write_object(
        self, path: Path, media_id: str, size_bytes: int, content_type: str, check: Callable[[], None]
    ) -> None:
        name = new_object_name()
        self._say_writing(name, again=False)

        def pieces() -> Iterator[bytes]:
            said_s = time.monotonic()
            for piece in _read(path, check):
                yield piece
                if time.monotonic() - said_s > RENEW_S:
                    said_s = time.monotonic()
                    self._say_writing(name, again=True)

        # What breaks off here, and what others have stored meanwhile, is swept by the queue server.
        self._objects.write_blocking(name, pieces())
        self._complete(media_id, size_bytes, content_type, object_name=name)

    def _say_writing(self, name: str, *, again: bool) -> None:
        if not self._store.run("begin_object", {"object": name, "write_ms": WRITE_MS, "again": again}):
            raise StoreUnavailable(why="the file took so long to write that it was given up")

    def _complete(
        self, media_id: str, size_bytes: int, content_type: str, *, object_name: str = "", part: str = ""
    ) -> None:
        word = self._store.run(
            "store_media",
            {
                "media_id": media_id,
                "size": size_bytes,
                "type": content_type,
                "object": object_name,
                "part": part,
                "first_ms": self._first_ms,
            },
        )
        if word == b"late":
            raise StoreUnavailable(why="the file took so long to write that it was given up")


def _read(path: Path, check: Callable[[], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            check()
            yield piece
