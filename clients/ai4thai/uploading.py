"""Takes a file up to the queue server in pieces, again and again until it is there."""

from __future__ import annotations

import asyncio
import hashlib
import io
import mimetypes
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, TypeAlias

import grpc
import grpc.aio

from ai4thai import queue_answers
from ai4thai.errors import AI4ThaiError, InvalidInput, Unavailable, translated
from ai4thai.job_results import Media
from ai4thai.patience import Patience
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb2
from ai4thai.queue.v1 import queue_service_pb2_grpc

CHUNK_BYTES: Final = 1 << 20
"""The contract's largest piece."""
ASK_S: Final = 2.0
"""How long the first piece waits to be wanted or not: a server that has the file, or no room, says so at once."""
WANTED: Final = "x-chunks-wanted"
"""The server's initial metadata has it when the pieces are to come."""

UploadSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
"""A path, a whole file's bytes, or a file opened for reading bytes, from where it stands to its end."""

OnProgress: TypeAlias = Callable[[int, int], object]
"""Told the bytes so far and the bytes in all, perhaps from another thread."""


class Upload:
    """One file on its way up; a context manager. Its media_id is announced, so that what the server has is not sent again.

    It makes no calls itself, so that threads and asyncio share it.
    """

    def __init__(
        self,
        source: UploadSource,
        content_type: str = "",
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._source = source
        self._content_type = content_type
        self._on_progress = on_progress
        self._patience = Patience(
            timeout_s,
            late=f"The file was not stored within {timeout_s or 0:g} s. Upload it again with more.",
            broken="The upload keeps breaking off.",
        )
        self._open = ExitStack()
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._start = self._size_bytes = self._told_bytes = 0
        self._media_id = ""
        self.failure: Exception | None = None
        """Why the file could not be read while it was sent: gRPC itself would only say that something went wrong."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def prepare(self) -> None:
        """Opens the file and reads it once, for its size and digest; to be called first.

        Raises:
            OSError: it can't be read.
            TypeError: it is no path, bytes or open file.
            InvalidInput: it is empty.
        """
        self._file = self._opened()
        digest = hashlib.sha256()
        while chunk := self._file.read(CHUNK_BYTES):
            digest.update(chunk)
            self._size_bytes += len(chunk)
        if not self._size_bytes:
            raise InvalidInput(f"{self._name() or 'The file'} is empty.", code="INVALID_ARGUMENT")
        self._media_id = f"sha256:{digest.hexdigest()}"

    def messages(self, is_wanted: Callable[[], bool] = lambda: True) -> Iterator[queue_pb2.UploadMediaRequest]:
        """One attempt's messages: what is coming, then the pieces if they are wanted."""
        config = queue_pb2.UploadMediaConfig(
            content_type=self._content_type or mimetypes.guess_type(self._name(), strict=False)[0] or "",
            media_id=self._media_id,
            size_bytes=self._size_bytes,
        )
        yield queue_pb2.UploadMediaRequest(config=config)
        if not is_wanted():
            return
        for offset in range(0, self._size_bytes, CHUNK_BYTES):
            try:
                chunk = self._read(offset)
                self._tell(offset + len(chunk))
            except Exception as error:
                self.failure = error
                raise
            yield queue_pb2.UploadMediaRequest(chunk=chunk)

    def take(self, response: queue_pb2.UploadMediaResponse) -> Media:
        """The stored file."""
        self._tell(self._size_bytes)
        return queue_answers.read_media(response.media)

    def remaining_s(self) -> float | None:
        """What is left of timeout_s; None without one. Raises DeadlineExceeded when nothing is."""
        return self._patience.remaining_s()

    def delay_after(self, error: AI4ThaiError) -> float:
        """How long to wait before the next attempt.

        Raises:
            Exception: another attempt makes no sense; the file's own error, or the call's.
        """
        if self.failure is not None:
            raise self.failure from None
        return self._patience.delay_after(error)

    def _opened(self) -> IO[bytes]:
        source = self._source
        if isinstance(source, str | os.PathLike):
            return self._open.enter_context(Path(source).open("rb"))
        if isinstance(source, bytes | bytearray | memoryview):
            return io.BytesIO(source)
        if not hasattr(source, "read"):
            raise TypeError(f"A file is a path, bytes, or a file opened for reading, not {type(source).__name__}.")
        if source.seekable():
            self._start = source.tell()
            return source
        # A pipe can be read only once, but is read for its digest, and for each attempt.
        copy = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        shutil.copyfileobj(source, copy)
        copy.seek(0)
        return copy

    def _read(self, offset: int) -> bytes:
        # An attempt that broke off may still be read for by gRPC's thread, while the next one begins.
        with self._lock:
            assert self._file is not None
            self._file.seek(self._start + offset)
            return self._file.read(min(CHUNK_BYTES, self._size_bytes - offset))

    def _tell(self, done_bytes: int) -> None:
        if done_bytes > self._told_bytes:
            self._told_bytes = done_bytes
            self._patience.renew()  # whoever gets further each time may break off as often as it takes
            if self._on_progress is not None:
                self._on_progress(done_bytes, self._size_bytes)

    def _name(self) -> str:
        source: Any = self._source
        name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
        return str(name) if isinstance(name, str | os.PathLike) else ""


def run_upload(upload: Upload, stub: queue_service_pb2_grpc.QueueServiceStub, address: str) -> Media:
    """Uploads until it is done; raises what makes no sense to try again."""
    upload.prepare()
    while True:
        try:
            with translated(address):
                return upload.take(_attempt(upload, stub))
        except AI4ThaiError as error:
            time.sleep(upload.delay_after(error))


def _attempt(upload: Upload, stub: queue_service_pb2_grpc.QueueServiceStub) -> queue_pb2.UploadMediaResponse:
    asked, wanted = threading.Event(), True

    def is_wanted() -> bool:
        asked.wait(ASK_S)
        return wanted

    call = stub.UploadMedia.future(upload.messages(is_wanted), timeout=upload.remaining_s())
    try:
        wanted = _has_sign(call.initial_metadata())
        asked.set()
        return call.result()
    finally:
        wanted = False
        asked.set()
        call.cancel()  # where someone interrupts, nothing goes on behind their back


async def run_upload_async(upload: Upload, stub: queue_service_pb2_grpc.QueueServiceAsyncStub, address: str) -> Media:
    """Like run_upload, for asyncio."""
    await asyncio.to_thread(upload.prepare)
    while True:
        try:
            with translated(address):
                return upload.take(await _attempt_async(upload, stub))
        except AI4ThaiError as error:
            await asyncio.sleep(upload.delay_after(error))


async def _attempt_async(
    upload: Upload, stub: queue_service_pb2_grpc.QueueServiceAsyncStub
) -> queue_pb2.UploadMediaResponse:
    call = stub.UploadMedia(timeout=upload.remaining_s())
    messages = upload.messages()
    asked = asyncio.ensure_future(call.initial_metadata())
    try:
        # Written here, not by grpc.aio from an iterator: that one forgets the answer when it comes before all is written.
        await call.write(next(messages))
        await asyncio.wait({asked}, timeout=ASK_S)
        wanted = _has_sign(asked.result()) if asked.done() else True
        while wanted and not call.done() and (message := await asyncio.to_thread(next, messages, None)) is not None:
            await call.write(message)
        await call.done_writing()
    except asyncio.InvalidStateError:
        pass  # it was answered meanwhile
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INTERNAL:
            raise
        # A write that fails hides from grpc.aio why the call ended. Mostly the connection broke; if not, the next attempt tells.
        raise Unavailable("The upload broke off.", code="UNAVAILABLE") from None
    except BaseException:
        call.cancel()
        raise
    finally:
        asked.cancel()
    return await call


def _has_sign(metadata: Any) -> bool:
    return any(key == WANTED for key, _ in metadata or ())
