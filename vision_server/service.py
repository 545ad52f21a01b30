"""The services of the vision server: what happens to each call, in a few lines each."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from ai4thai.vision.v1 import (
    device_service_pb2,
    device_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    vision_service_pb2,
    vision_service_pb2_grpc,
)
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from serving.health import Health
from serving.transcoding import to_dict
from vision_server import __version__, metrics, wire
from vision_server.admission import Admission
from vision_server.answers import Answers
from vision_server.detections import Detections
from vision_server.devices import Devices
from vision_server.errors import ImageEmpty, ModelControlOff, WrongOrder
from vision_server.images import Images, decode_threads
from vision_server.models import READY_NAME, Models
from vision_server.openai.routes import OpenAIRoutes
from vision_server.requests import EncodedImage, Frame
from vision_server.results import ServerInfo
from vision_server.settings import VisionSettings
from vision_server.streams import Streams

CAPABILITIES = (
    "detect",
    "detect_stream",
    "generate",
    "analyze",
    "annotate",
    "masks",
    "track",
    "drop_oldest",
    "load_model",
    "watch_devices",
)


class VisionServer(
    vision_service_pb2_grpc.VisionServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
    device_service_pb2_grpc.DeviceServiceServicer,
):
    """VisionService, ModelService and DeviceService over one set of models."""

    name = "vision_server"
    version = __version__
    domain = wire.DOMAIN
    service_names: Sequence[str] = (
        READY_NAME,
        "ai4thai.vision.v1.ModelService",
        "ai4thai.vision.v1.DeviceService",
    )
    ready_name = READY_NAME

    def __init__(self, settings: VisionSettings, max_message_bytes: int) -> None:
        self._settings = settings
        self._max_message_bytes = max_message_bytes
        self._started_s = time.perf_counter()
        self._images = Images(
            threads=decode_threads(settings.decode_threads, settings.core_count),
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            gpu="cuda:0" if settings.gpu_decode else "",
        )
        self._models = Models(settings)
        self._admission = Admission(
            max_images=settings.max_queued_images,
            max_bytes=settings.max_queued_bytes,
            estimate_s=lambda: self._models.estimate_s(),
            ageing_ms=settings.priority_ageing_ms,
        )
        self._devices = Devices(self._models.busy_s)
        self._detections = Detections(self._models, self._images, self._admission)
        self._streams = Streams(self._detections, self._images, max_streams=settings.max_streams)
        self._answers = Answers(self._models, self._images, self._admission, self._detections)
        self._openai = OpenAIRoutes(settings, lambda: self._models.infos, self.domain)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the three servicers."""
        vision_service_pb2_grpc.add_VisionServiceServicer_to_server(self, server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, server)
        device_service_pb2_grpc.add_DeviceServiceServicer_to_server(self, server)

    def routes(self) -> Sequence[BaseRoute]:
        """GET /info, answered without gRPC, and OpenAI's."""

        async def info(_request: Request) -> Response:
            return JSONResponse(to_dict(wire.write_server_info(self._info())))

        return [Route("/info", info), *self._openai.routes()]

    async def start(self, health: Health) -> None:
        """Begins to load the models."""
        self._images.start()
        self._openai.start()
        metrics.ADMITTED_IMAGES.set_function(lambda: self._admission.image_count)
        metrics.ADMITTED_BYTES.set_function(lambda: self._admission.size_bytes)
        self._models.start(health)

    def drain(self) -> None:
        """Ends what would last: streams, watches of the devices, and waiting for a model to load."""
        self._streams.drain()
        self._devices.drain()
        self._models.drain()

    async def stop(self) -> None:
        """Lets go of the models."""
        await self._openai.stop()
        await self._models.stop()
        self._images.stop()

    async def Detect(
        self, request: vision_service_pb2.DetectRequest, context: Any
    ) -> vision_service_pb2.DetectResponse:
        """Finds the objects in one image."""
        options = wire.read_detect_options(request.options)
        priority = wire.read_priority(request.priority, _priority_word(context))
        image = wire.read_image(request.image)
        seen = await self._detections.detect(image, options, _deadline_s(context), priority=priority)
        return wire.write_detections(seen.answer)

    async def DetectStream(
        self, request_iterator: AsyncIterator[vision_service_pb2.DetectStreamRequest], context: Any
    ) -> AsyncIterator[vision_service_pb2.DetectStreamResponse]:
        """Finds the objects in each frame of a stream."""
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "config":
            raise WrongOrder("The stream does not begin with a config.", "Send `config` first, then `frame`s.")
        options = wire.read_stream_config(first.config, self._settings, _priority_word(context))
        stream = self._streams.detect(_frames(requests), options, _deadline_s(context))
        async with aclosing(stream) as items:
            async for item in items:
                yield wire.write_stream(item)

    async def Generate(
        self, request: vision_service_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[vision_service_pb2.GenerateResponse]:
        """Answers a conversation, in pieces as they come."""
        options = wire.read_generate_options(request.options, self._settings)
        turns = wire.read_messages(request.messages, self._settings)
        priority = wire.read_priority(request.priority, _priority_word(context))
        answer = self._answers.generate(request.model, turns, options, _deadline_s(context), priority)
        async with aclosing(answer) as pieces:
            async for piece in pieces:
                yield wire.write_generated(piece)

    async def Analyze(
        self, request: vision_service_pb2.AnalyzeRequest, context: Any
    ) -> vision_service_pb2.AnalyzeResponse:
        """Finds the objects in one image and answers a question about it."""
        detect_options = wire.read_detect_options(request.detect_options, "detect_options")
        options = wire.read_generate_options(request.generate_options, self._settings, "generate_options")
        question = wire.read_question(request.question, self._settings)
        priority = wire.read_priority(request.priority, _priority_word(context))
        image = wire.read_image(request.image)
        analysis = await self._answers.analyze(
            image, question, detect_options, request.model, options, _deadline_s(context), priority
        )
        return wire.write_analysis(analysis)

    async def GetServerInfo(
        self, request: vision_service_pb2.GetServerInfoRequest, context: Any
    ) -> vision_service_pb2.GetServerInfoResponse:
        """Tells what this server is."""
        return wire.write_server_info(self._info())

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: Any
    ) -> model_service_pb2.ListModelsResponse:
        """Lists the models."""
        return wire.write_models(await self._models.list())

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: Any
    ) -> model_service_pb2.GetModelResponse:
        """Tells of one model."""
        return model_service_pb2.GetModelResponse(model=wire.write_model(await self._models.get(request.name)))

    async def LoadModel(
        self, request: model_service_pb2.LoadModelRequest, context: Any
    ) -> model_service_pb2.LoadModelResponse:
        """Loads a model, or loads it anew."""
        self._check_model_control()
        info = await self._models.load(request.name, wire.read_aliases(request))
        return model_service_pb2.LoadModelResponse(model=wire.write_model(info))

    async def UnloadModel(
        self, request: model_service_pb2.UnloadModelRequest, context: Any
    ) -> model_service_pb2.UnloadModelResponse:
        """Unloads a model."""
        self._check_model_control()
        info = await self._models.unload(request.name)
        return model_service_pb2.UnloadModelResponse(model=wire.write_model(info))

    async def ListDevices(
        self, request: device_service_pb2.ListDevicesRequest, context: Any
    ) -> device_service_pb2.ListDevicesResponse:
        """Lists the devices."""
        devices = await self._devices.list()
        return device_service_pb2.ListDevicesResponse(devices=map(wire.write_device, devices))

    async def WatchDevices(
        self, request: device_service_pb2.WatchDevicesRequest, context: Any
    ) -> AsyncIterator[device_service_pb2.WatchDevicesResponse]:
        """Tells of the devices again and again."""
        moments = self._devices.watch(wire.read_interval_s(request))
        async with aclosing(moments):
            async for devices in moments:
                yield device_service_pb2.WatchDevicesResponse(devices=map(wire.write_device, devices))

    def _check_model_control(self) -> None:
        if not self._settings.model_control:
            raise ModelControlOff

    def _info(self) -> ServerInfo:
        settings = self._settings
        return ServerInfo(
            version=self.version,
            uptime_s=time.perf_counter() - self._started_s,
            models=self._models.infos,
            device=self._models.device,
            limits={
                "max_image_bytes": settings.max_image_bytes,
                "max_image_pixels": settings.max_image_pixels,
                "max_message_bytes": self._max_message_bytes,
                "max_queued_images": settings.max_queued_images,
                "max_stream_in_flight": settings.max_stream_in_flight,
                "max_streams": settings.max_streams,
                "max_new_tokens": settings.max_new_tokens,
                "max_queued_generations": settings.max_queued_generations,
                "max_images_per_request": settings.max_images_per_request,
                "max_model_bytes": self._models.limit_bytes,
            },
            capabilities=CAPABILITIES,
            ready=self._models.ready,
        )


async def _frames(requests: AsyncIterator[vision_service_pb2.DetectStreamRequest]) -> AsyncIterator[Frame]:
    async for request in requests:
        if request.WhichOneof("message") != "frame":
            raise WrongOrder("A message after the config is no frame.", "Send one `config`, then `frame`s only.")
        frame = request.frame
        try:
            image = wire.read_image(frame.image, "frame.image")
        except ImageEmpty:
            image = EncodedImage(b"", "frame.image")  # this frame's own error, found when its turn comes
        yield Frame(frame.frame_id, image)


def _priority_word(context: Any) -> str | None:
    """What the call's metadata says of its priority; None: nothing."""
    return next((value for key, value in context.invocation_metadata() or () if key == "x-priority"), None)


def _deadline_s(context: Any) -> float | None:
    """The caller's deadline as a moment of time.perf_counter(); None: there is none."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.perf_counter() + remaining_s
