"""The streams that the vision client hands out: texts that grow, results that follow images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Generic, Self, TypeAlias, TypeVar, cast

from ai4thai import wire
from ai4thai.errors import AI4ThaiError, Cancelled, ServerFault, translated
from ai4thai.image_input import ImageInput
from ai4thai.options import StreamOptions
from ai4thai.results import Answer, FrameResult, StreamSummary
from ai4thai.vision.v1 import vision_service_pb2

# gRPC's call objects have no public base class that covers reading and cancelling.
Call: TypeAlias = Any

Item = TypeVar("Item")
End = TypeVar("End")


class _Stream(Generic[Item, End]):
    """What sync and asyncio share: many items, then one end; cancelled on purpose it just stops."""

    def __init__(self, address: str, read: Callable[[Any], Item | End], end_type: type[End]) -> None:
        self._address = address
        self._read = read
        self._end_type = end_type
        self._call: Call = None
        self._end: End | None = None
        self._cancelled = False
        self._failure: Exception | None = None  # of the caller's own images

    def cancel(self) -> None:
        """Stops the server's work; iterating ends without an error."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def _take(self, message: Any) -> Item | None:
        read = self._read(message)
        if isinstance(read, self._end_type):
            self._end = read
            return None
        return cast(Item, read)

    def _finish(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._end is None and not self._cancelled:
            raise ServerFault(f"{self._address} ended the stream without its summary.", address=self._address)

    def _whole(self) -> End:
        if self._end is not None:
            return self._end
        if self._cancelled:
            raise Cancelled("The stream was cancelled before its end.", code="CANCELLED", address=self._address)
        raise AI4ThaiError("Read all results first; the count comes last.", code="FAILED_PRECONDITION")


class _SyncStream(_Stream[Item, End], Iterator[Item]):
    def __next__(self) -> Item:
        try:
            with translated(self._address):
                for message in self._call:
                    item = self._take(message)
                    if item is not None:
                        return item
        except Cancelled:
            if not self._cancelled:
                raise
        self._finish()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()


class _AsyncStream(_Stream[Item, End], AsyncIterator[Item]):
    async def _begin(self) -> Call:
        return self._call

    async def __anext__(self) -> Item:
        if self._cancelled and self._call is None:
            raise StopAsyncIteration
        try:
            with translated(self._address):
                if self._call is None:
                    self._call = await self._begin()
                async for message in self._call:
                    item = self._take(message)
                    if item is not None:
                        return item
        except (asyncio.CancelledError, Cancelled):
            # grpc.aio says CancelledError for both: the stream's own cancel(), and the caller's task being cancelled.
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                raise
        self._finish()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()


class TextStream(_SyncStream[str, Answer]):
    """Pieces of a text as they come; leaving its `with` block, or cancel(), stops the generation."""

    def __init__(self, call: Call, address: str) -> None:
        super().__init__(address, wire.read_generate_message, Answer)
        self._call = call

    @property
    def summary(self) -> Answer:
        """The whole answer; reads what is still to come.

        Raises:
            Cancelled: the stream was cancelled before its end.
        """
        for _ in self:
            pass
        return self._whole()

    @property
    def text(self) -> str:
        """The whole text; reads what is still to come."""
        return self.summary.text


class AsyncTextStream(_AsyncStream[str, Answer]):
    """TextStream for asyncio: `async for piece in stream`, then `await stream.summary()`; the call starts at the first read."""

    def __init__(self, start: Callable[[], Awaitable[Call]], address: str) -> None:
        super().__init__(address, wire.read_generate_message, Answer)
        self._start = start

    async def _begin(self) -> Call:
        return await self._start()

    async def summary(self) -> Answer:
        """The whole answer; reads what is still to come."""
        async for _ in self:
            pass
        return self._whole()

    async def text(self) -> str:
        """The whole text; reads what is still to come."""
        return (await self.summary()).text


class DetectStream(_SyncStream[FrameResult, StreamSummary]):
    """Results in the images' order; images are read as the server takes them, never far ahead.

    A server that shuts down answers the images that it has read, then iterating raises Unavailable: send those without a result
    in a new stream, to another server if there is one.
    """

    def __init__(
        self,
        start: Callable[[Iterator[vision_service_pb2.DetectStreamRequest]], Call],
        images: Iterable[ImageInput],
        options: StreamOptions,
        address: str,
    ) -> None:
        super().__init__(address, wire.read_stream_message, StreamSummary)
        config = wire.write_stream_config(options)
        self._call = start(self._requests(config, images))

    def _requests(
        self, config: vision_service_pb2.DetectStreamRequest, images: Iterable[ImageInput]
    ) -> Iterator[vision_service_pb2.DetectStreamRequest]:
        yield config
        try:
            for frame_id, image in enumerate(images):
                yield wire.write_frame(frame_id, image)
        except Exception as error:
            # gRPC drains this in a thread of its own, where an exception would be lost in a log: it is kept for the
            # reader, who first gets the results of all images before it.
            self._failure = error

    @property
    def summary(self) -> StreamSummary:
        """The server's count, once all results have been read.

        Raises:
            AI4ThaiError: there are results still to be read, or the stream was cancelled.
        """
        return self._whole()


class AsyncDetectStream(_AsyncStream[FrameResult, StreamSummary]):
    """DetectStream for asyncio: `async for result in stream`, then `stream.summary`."""

    def __init__(
        self,
        start: Callable[[AsyncIterator[vision_service_pb2.DetectStreamRequest]], Call],
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        options: StreamOptions,
        address: str,
    ) -> None:
        super().__init__(address, wire.read_stream_message, StreamSummary)
        config = wire.write_stream_config(options)
        self._call = start(self._requests(config, images))

    async def _requests(
        self,
        config: vision_service_pb2.DetectStreamRequest,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
    ) -> AsyncIterator[vision_service_pb2.DetectStreamRequest]:
        yield config
        try:
            frame_id = 0
            async for image in _async_images(images):
                yield await asyncio.to_thread(wire.write_frame, frame_id, image)  # may read a file
                frame_id += 1
        except Exception as error:
            self._failure = error  # as in DetectStream

    @property
    def summary(self) -> StreamSummary:
        """The server's count, once all results have been read."""
        return self._whole()


async def _async_images(images: Iterable[ImageInput] | AsyncIterable[ImageInput]) -> AsyncIterator[ImageInput]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
        return
    source: Iterator[Any] = iter(images)
    end: Any = object()
    while (
        image := await asyncio.to_thread(lambda: next(source, end))
    ) is not end:  # a generator may read a disk or a camera
        yield image
