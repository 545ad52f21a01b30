"""Fetches a file from the queue server, going on where it was until all of it is there, and verifies it."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeAlias

from ai4thai import queue_answers
from ai4thai.errors import AI4ThaiError, ServerFault, translated
from ai4thai.job_results import Media
from ai4thai.media_input import is_media_id
from ai4thai.patience import Patience
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb2
from ai4thai.queue.v1 import queue_service_pb2_grpc
from ai4thai.uploading import OnProgress


class Writable(Protocol):
    """What a file is written to: anything with write()."""

    def write(self, data: bytes, /) -> object:
        """Takes bytes."""


DownloadTarget: TypeAlias = str | os.PathLike[str] | Writable
"""A path, which has the whole file or is untouched; or a file opened for writing bytes."""


class Download:
    """One file on its way down; a context manager. What has come is kept across broken connections, and verified at the end.

    It makes no calls itself, so that threads and asyncio share it.
    """

    def __init__(
        self,
        media_id: str,
        target: DownloadTarget,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Remembers what to fetch.

        Raises:
            ValueError: no media_id.
        """
        if not is_media_id(media_id):
            raise ValueError(f"{media_id!r} is no media_id; one is sha256: and 64 hex digits.")
        self._media_id = media_id
        self._target = target
        self._on_progress = on_progress
        self._patience = Patience(
            timeout_s,
            late=f"The file {media_id} did not come within {timeout_s or 0:g} s.",
            broken=f"The download of {media_id} keeps breaking off.",
        )
        self._digest = hashlib.sha256()
        self._received_bytes = 0
        self._media: Media | None = None
        self._part: Path | None = None
        self._file: Writable | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        target = self._target
        if isinstance(target, str | os.PathLike):
            path = Path(target)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            # Beside its place, so that it gets there in one step; the target's name may be as long as names can be.
            self._part = path.parent / f".ai4thai-{uuid.uuid4().hex}.part"
            self._file = self._open.enter_context(self._part.open("xb"))
        else:
            self._file = target
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have come."""
        return self._media is not None and self._received_bytes >= self._media.size_bytes

    def request(self) -> queue_pb2.GetMediaRequest:
        """The request that goes on behind the last byte that came."""
        return queue_pb2.GetMediaRequest(media_id=self._media_id, offset_bytes=self._received_bytes)

    def take(self, response: queue_pb2.GetMediaResponse) -> None:
        """Writes what has come.

        Raises:
            OSError: it can't be written.
        """
        self._patience.renew()
        if response.HasField("media"):
            self._media = queue_answers.read_media(response.media)
        if response.chunk:
            assert self._file is not None
            self._file.write(response.chunk)
            self._digest.update(response.chunk)
            self._received_bytes += len(response.chunk)
            if self._on_progress is not None and self._media is not None:
                self._on_progress(self._received_bytes, self._media.size_bytes)

    def remaining_s(self) -> float | None:
        """What is left of timeout_s; None without one. Raises DeadlineExceeded when nothing is."""
        return self._patience.remaining_s()

    def delay_after(self, error: AI4ThaiError | None) -> float:
        """How long to wait before going on after an error, or after a stream that ended too early (None).

        Raises:
            AI4ThaiError: going on makes no sense.
        """
        return self._patience.delay_after(error)

    def finish(self) -> Media:
        """Puts the file in its place once its bytes are those that its id says.

        Raises:
            ServerFault: they are others.
            OSError: it can't be written.
        """
        assert self._media is not None
        if f"sha256:{self._digest.hexdigest()}" != self._media_id:
            raise ServerFault(
                f"What came as {self._media_id} has another digest: it was damaged on its way or where it is stored.",
                code="DATA_LOSS",
            )
        self._open.close()
        if self._part is not None:
            assert isinstance(self._target, str | os.PathLike)
            self._part.replace(self._target)
        return self._media


def run_download(download: Download, stub: queue_service_pb2_grpc.QueueServiceStub, address: str) -> Media:
    """Downloads until it is done; raises what makes no sense to try again."""
    while not download.is_complete:
        failure: AI4ThaiError | None = None
        try:
            with translated(address):
                call = stub.GetMedia(download.request(), timeout=download.remaining_s())
                try:
                    for response in call:
                        download.take(response)
                finally:
                    call.cancel()
        except AI4ThaiError as error:
            failure = error
        if not download.is_complete:
            time.sleep(download.delay_after(failure))
    return download.finish()


async def run_download_async(
    download: Download, stub: queue_service_pb2_grpc.QueueServiceAsyncStub, address: str
) -> Media:
    """Like run_download, for asyncio."""
    while not download.is_complete:
        failure: AI4ThaiError | None = None
        try:
            with translated(address):
                call = stub.GetMedia(download.request(), timeout=download.remaining_s())
                try:
                    async for response in call:
                        await asyncio.to_thread(download.take, response)  # it writes a file
                finally:
                    call.cancel()
        except AI4ThaiError as error:
            failure = error
        if not download.is_complete:
            await asyncio.sleep(download.delay_after(failure))
    return download.finish()
