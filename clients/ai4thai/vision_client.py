"""The client of a vision server, for threads and for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self, Unpack

import grpc
import grpc.aio

from ai4thai import wire
from ai4thai.channel import open_async_channel, open_channel
from ai4thai.errors import translated
from ai4thai.health import check_health, check_health_async
from ai4thai.image_input import ImageInput
from ai4thai.options import DetectOptions, Message, StreamOptions, TextOptions
from ai4thai.results import Analysis, DetectResult
from ai4thai.server_info import Device, Health, Model, ServerInfo
from ai4thai.streams import AsyncDetectStream, AsyncTextStream, DetectStream, TextStream
from ai4thai.vision.v1 import (
    device_service_pb2,
    device_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    vision_service_pb2,
    vision_service_pb2_grpc,
)

DEFAULT_ADDRESS: Final = "localhost:2001"
SERVICE_NAME: Final = "ai4thai.vision.v1.VisionService"
"""The health service that says whether the server is ready."""


class VisionClient:
    """Calls a vision server; safe to share between threads. Every method raises AI4ThaiError (see errors.py).

    Calls that are safe to repeat are repeated by gRPC while the server is full or away (see channel.RETRY_CONFIG).
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Remembers the server; nothing is sent before the first call.

        Args:
            address: `host:port`, or `grpcs://host:port` for TLS.
            timeout_s: what a call may take, unless it says otherwise itself; a stream of images has no limit of its own.
            credentials: TLS with these credentials.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, credentials=credentials)
        self._vision = vision_service_pb2_grpc.VisionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._devices = device_service_pb2_grpc.DeviceServiceStub(self._channel)

    def detect(
        self, image: ImageInput, *, priority: str = "", timeout_s: float | None = None, **options: Unpack[DetectOptions]
    ) -> DetectResult:
        """Finds the objects in one image; `annotate=True` also brings the picture with the boxes drawn in.

        `priority`: whose turn it is while the server is busy, `interactive`, `standard` (the default) or `batch`.
        """
        request = wire.write_detect(image, options, priority)
        with translated(self.address):
            return wire.read_detect(self._vision.Detect(request, timeout=timeout_s or self._timeout_s))

    def detect_stream(
        self,
        images: Iterable[ImageInput],
        *,
        timeout_s: float | None = None,
        **options: Unpack[StreamOptions],
    ) -> DetectStream:
        """Finds the objects in each image of a stream; results come in order, a bad image is a result with an error.

        Images are taken from the iterable as the server works them off, `max_in_flight` at once (0: the server's default). With
        a `tracker` objects keep their `track_id` through the stream. The stream's `summary` has the counts afterwards. Without
        timeout_s it may last for ever.
        """
        return DetectStream(
            lambda requests: self._vision.DetectStream(requests, timeout=timeout_s),
            images,
            options,
            self.address,
        )

    def generate(
        self,
        messages: Iterable[Message],
        *,
        priority: str = "",
        timeout_s: float | None = None,
        **options: Unpack[TextOptions],
    ) -> TextStream:
        """Answers a conversation: pieces of text as they come; `.summary` and `.text` have the whole.

        `priority`: whose turn it is while the server is busy, `interactive`, `standard` (the default) or `batch`.
        """
        request = wire.write_generate(messages, options, priority)
        return TextStream(self._vision.Generate(request, timeout=timeout_s or self._timeout_s), self.address)

    def ask(
        self,
        image: ImageInput,
        question: str,
        *,
        priority: str = "",
        timeout_s: float | None = None,
        **options: Unpack[TextOptions],
    ) -> TextStream:
        """Asks about one image, in any language the model speaks."""
        return self.generate([question_about(image, question)], priority=priority, timeout_s=timeout_s, **options)

    def analyze(
        self,
        image: ImageInput,
        question: str,
        *,
        detect: DetectOptions | None = None,
        text: TextOptions | None = None,
        priority: str = "",
        timeout_s: float | None = None,
    ) -> Analysis:
        """Finds the objects in one image and answers a question about it, grounded in what was found."""
        request = wire.write_analyze(image, question, detect or {}, text or {}, priority)
        with translated(self.address):
            return wire.read_analyze(self._vision.Analyze(request, timeout=timeout_s or self._timeout_s))

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server is, what it has loaded, its limits; answers while models still load."""
        request = vision_service_pb2.GetServerInfoRequest()
        with translated(self.address):
            return wire.read_info(self._vision.GetServerInfo(request, timeout=timeout_s or self._timeout_s))

    def list_models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """The models that the server was told to serve, then the others that it has or could load."""
        request = model_service_pb2.ListModelsRequest()
        with translated(self.address):
            answer = self._models.ListModels(request, timeout=timeout_s or self._timeout_s)
        return tuple(wire.read_model(model) for model in answer.models)

    def get_model(self, name: str, *, timeout_s: float | None = None) -> Model:
        """One model, and how far it is while it loads."""
        request = model_service_pb2.GetModelRequest(name=name)
        with translated(self.address):
            return wire.read_model(self._models.GetModel(request, timeout=timeout_s or self._timeout_s).model)

    def load_model(self, name: str, aliases: Sequence[str] = (), *, timeout_s: float | None = None) -> Model:
        """Loads a model that lies in the server's model directory, or anew when its weights have changed; until it is ready.

        `aliases`: other names that it shall answer to, taken from the models that have them now. Without timeout_s it takes as
        long as it takes. A call that ends early does not stop the loading: get_model tells how far it is.
        """
        request = wire.write_load_model(name, aliases)
        with translated(self.address):
            return wire.read_model(self._models.LoadModel(request, timeout=timeout_s).model)

    def unload_model(self, name: str, *, timeout_s: float | None = None) -> Model:
        """Has a model finish its calls and leave the memory; until it has. Without timeout_s as long as that takes."""
        request = model_service_pb2.UnloadModelRequest(name=name)
        with translated(self.address):
            return wire.read_model(self._models.UnloadModel(request, timeout=timeout_s).model)

    def devices(self, *, timeout_s: float | None = None) -> tuple[Device, ...]:
        """The devices that the models run on."""
        request = device_service_pb2.ListDevicesRequest()
        with translated(self.address):
            answer = self._devices.ListDevices(request, timeout=timeout_s or self._timeout_s)
        return tuple(wire.read_device(device) for device in answer.devices)

    def watch_devices(self, interval_s: float = 1.0, *, timeout_s: float | None = None) -> Iterator[tuple[Device, ...]]:
        """The devices now and then each `interval_s` (0.1 s to 1 hour), until you stop reading or the server stops."""
        call = self._devices.WatchDevices(wire.write_watch_devices(interval_s), timeout=timeout_s)
        try:
            with translated(self.address):
                for answer in call:
                    yield tuple(wire.read_device(device) for device in answer.devices)
        finally:
            call.cancel()

    def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """Whether the process lives (empty), SERVICE_NAME is ready, or `model/<name>` is."""
        return check_health(self._channel, self.address, service, timeout_s or self._timeout_s)

    def close(self) -> None:
        """Ends what still runs."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncVisionClient:
    """VisionClient for asyncio; use it within one running loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Like VisionClient; the channel is opened by the first call."""
        self.address = address
        self._timeout_s = timeout_s
        self._credentials = credentials

    async def detect(
        self, image: ImageInput, *, priority: str = "", timeout_s: float | None = None, **options: Unpack[DetectOptions]
    ) -> DetectResult:
        """See VisionClient.detect."""
        request = await asyncio.to_thread(wire.write_detect, image, options, priority)  # may read a file
        with translated(self.address):
            return wire.read_detect(await self._vision.Detect(request, timeout=timeout_s or self._timeout_s))

    def detect_stream(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        timeout_s: float | None = None,
        **options: Unpack[StreamOptions],
    ) -> AsyncDetectStream:
        """See VisionClient.detect_stream; the images may come asynchronously."""
        return AsyncDetectStream(
            lambda requests: self._vision.DetectStream(requests, timeout=timeout_s),
            images,
            options,
            self.address,
        )

    def generate(
        self,
        messages: Iterable[Message],
        *,
        priority: str = "",
        timeout_s: float | None = None,
        **options: Unpack[TextOptions],
    ) -> AsyncTextStream:
        """See VisionClient.generate."""

        async def start() -> Any:
            request = await asyncio.to_thread(wire.write_generate, messages, options, priority)
            return self._vision.Generate(request, timeout=timeout_s or self._timeout_s)

        return AsyncTextStream(start, self.address)

    def ask(
        self,
        image: ImageInput,
        question: str,
        *,
        priority: str = "",
        timeout_s: float | None = None,
        **options: Unpack[TextOptions],
    ) -> AsyncTextStream:
        """See VisionClient.ask."""
        return self.generate([question_about(image, question)], priority=priority, timeout_s=timeout_s, **options)

    async def analyze(
        self,
        image: ImageInput,
        question: str,
        *,
        detect: DetectOptions | None = None,
        text: TextOptions | None = None,
        priority: str = "",
        timeout_s: float | None = None,
    ) -> Analysis:
        """See VisionClient.analyze."""
        request = await asyncio.to_thread(wire.write_analyze, image, question, detect or {}, text or {}, priority)
        with translated(self.address):
            return wire.read_analyze(await self._vision.Analyze(request, timeout=timeout_s or self._timeout_s))

    async def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """See VisionClient.info."""
        request = vision_service_pb2.GetServerInfoRequest()
        with translated(self.address):
            return wire.read_info(await self._vision.GetServerInfo(request, timeout=timeout_s or self._timeout_s))

    async def list_models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """See VisionClient.list_models."""
        request = model_service_pb2.ListModelsRequest()
        with translated(self.address):
            answer = await self._models.ListModels(request, timeout=timeout_s or self._timeout_s)
        return tuple(wire.read_model(model) for model in answer.models)

    async def get_model(self, name: str, *, timeout_s: float | None = None) -> Model:
        """See VisionClient.get_model."""
        request = model_service_pb2.GetModelRequest(name=name)
        with translated(self.address):
            return wire.read_model((await self._models.GetModel(request, timeout=timeout_s or self._timeout_s)).model)

    async def load_model(self, name: str, aliases: Sequence[str] = (), *, timeout_s: float | None = None) -> Model:
        """See VisionClient.load_model."""
        request = wire.write_load_model(name, aliases)
        with translated(self.address):
            return wire.read_model((await self._models.LoadModel(request, timeout=timeout_s)).model)

    async def unload_model(self, name: str, *, timeout_s: float | None = None) -> Model:
        """See VisionClient.unload_model."""
        request = model_service_pb2.UnloadModelRequest(name=name)
        with translated(self.address):
            return wire.read_model((await self._models.UnloadModel(request, timeout=timeout_s)).model)

    async def devices(self, *, timeout_s: float | None = None) -> tuple[Device, ...]:
        """See VisionClient.devices."""
        request = device_service_pb2.ListDevicesRequest()
        with translated(self.address):
            answer = await self._devices.ListDevices(request, timeout=timeout_s or self._timeout_s)
        return tuple(wire.read_device(device) for device in answer.devices)

    async def watch_devices(
        self, interval_s: float = 1.0, *, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[Device, ...]]:
        """See VisionClient.watch_devices."""
        call = self._devices.WatchDevices(wire.write_watch_devices(interval_s), timeout=timeout_s)
        try:
            with translated(self.address):
                async for answer in call:
                    yield tuple(wire.read_device(device) for device in answer.devices)
        finally:
            call.cancel()

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """See VisionClient.health."""
        return await check_health_async(self._channel, self.address, service, timeout_s or self._timeout_s)

    async def close(self) -> None:
        """Ends what still runs."""
        await self._channel.close()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return open_async_channel(self.address, credentials=self._credentials)

    @cached_property
    def _vision(self) -> vision_service_pb2_grpc.VisionServiceAsyncStub:
        return vision_service_pb2_grpc.VisionServiceStub(self._channel)

    @cached_property
    def _models(self) -> model_service_pb2_grpc.ModelServiceAsyncStub:
        return model_service_pb2_grpc.ModelServiceStub(self._channel)

    @cached_property
    def _devices(self) -> device_service_pb2_grpc.DeviceServiceAsyncStub:
        return device_service_pb2_grpc.DeviceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


def question_about(image: ImageInput, question: str) -> Message:
    """A user's turn of one image and one question."""
    # In a message a str is words, so a path given as a str becomes a Path.
    return Message("user", [Path(image) if isinstance(image, str) else image, question])
