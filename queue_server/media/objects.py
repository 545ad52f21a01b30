"""The object store that QUEUE_MEDIA_URL names: a directory, S3 and what speaks like it, Google's or Azure's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from queue_server.errors import MediaStoreUnavailable
from queue_server.media.files import OBJECT_PART_BYTES, OBJECT_PARTS_AT_ONCE, PIECE_BYTES

# A request to the store, its repetitions aside.
# An endpoint without TLS is used only when the operator has named one (AWS_ENDPOINT=http://…).
CLIENT_OPTIONS = {"connect_timeout": "5s", "timeout": "60s", "allow_http": True}
RETRY: dict[str, Any] = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}


class Objects:
    """Every method raises MediaStoreUnavailable when the store does not do as asked; reading raises FileNotFoundError too.

    The store is opened at the first use, so that one that is away keeps nobody from starting.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._store: ObjectStore | None = None

    async def write(self, name: str, pieces: AsyncIterator[bytes]) -> None:
        """All of the pieces or nothing: whatever iterating raises comes out, once what was written is deleted."""
        with self._translated():
            await obstore.put_async(
                await self._opened(),
                name,
                pieces,
                chunk_size=OBJECT_PART_BYTES,
                max_concurrency=OBJECT_PARTS_AT_ONCE,
            )

    def write_blocking(self, name: str, pieces: Iterator[bytes]) -> None:
        """The same for threads."""
        with self._translated():
            obstore.put(self._open(), name, pieces, chunk_size=OBJECT_PART_BYTES, max_concurrency=OBJECT_PARTS_AT_ONCE)

    async def read(self, name: str, begin: int, end: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `begin` up to `end`, in pieces of at most PIECE_BYTES."""
        if begin == end:
            return
        with self._translated():
            answer = await obstore.get_async(await self._opened(), name, options={"range": (begin, end)})
            async for chunk in answer.stream(min_chunk_size=PIECE_BYTES):
                for piece in _cut(chunk):
                    yield piece

    def read_blocking(self, name: str) -> Iterator[bytes]:
        """All of its bytes, in pieces, for threads."""
        with self._translated():
            for chunk in obstore.get(self._open(), name).stream(min_chunk_size=PIECE_BYTES):
                yield from _cut(chunk)

    async def delete(self, name: str) -> None:
        """Deletes the object, and what a broken-off writer has left of it; one that is not there is fine."""
        with self._translated():
            store = await self._opened()
            with suppress(FileNotFoundError):
                await obstore.delete_async(store, name)
            if isinstance(store, LocalStore):
                await asyncio.to_thread(_delete_staged, Path(str(store.prefix)), name)

    async def check(self) -> str:
        """Asks the store how it is; a detail for health."""
        with self._translated(), suppress(FileNotFoundError):
            await obstore.head_async(await self._opened(), "none")
        return f"{self.place} answers"

    @property
    def place(self) -> str:
        """Where the store is, without anything secret."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"

    async def _opened(self) -> ObjectStore:
        return self._store if self._store is not None else await asyncio.to_thread(self._open)

    def _open(self) -> ObjectStore:
        if not self._url:
            raise MediaStoreUnavailable(
                place="QUEUE_MEDIA_URL",
                why="it is empty here, though files lie there; set it as the queue server has it.",
            )
        if self._store is None:
            options: Any = (
                {"mkdir": True}
                if self._url.startswith("file:")
                else {"client_options": CLIENT_OPTIONS, "retry_config": RETRY}
            )
            self._store = from_url(self._url, **options)
        return self._store

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, OSError, ValueError) as error:
            # The rest of the text is for those who debug the library.
            raise MediaStoreUnavailable(place=self.place, why=str(error).partition("\n")[0]) from error


def _cut(chunk: Any) -> Iterator[bytes]:
    view = memoryview(chunk)
    for begin in range(0, len(view), PIECE_BYTES):
        yield bytes(view[begin : begin + PIECE_BYTES])


def _delete_staged(folder: Path, name: str) -> None:
    """A directory keeps the parts of an unfinished object in `<name>#<number>`."""
    for staged in (folder / name).parent.glob(f"{Path(name).name}#*"):
        staged.unlink(missing_ok=True)
