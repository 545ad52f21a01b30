"""What a soak's callers do, each kind of work with the errors that it may meet; everything else is unexplained."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
from ai4thai.errors import AI4ThaiError, from_rpc_error, from_status
from ai4thai.vision.v1 import (
    detection_pb2,
    device_service_pb2,
    device_service_pb2_grpc,
    generation_pb2,
    image_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    vision_service_pb2,
    vision_service_pb2_grpc,
)

DEADLINE_S = 60.0
CYCLED = "cycled"
ALIAS = "soaked"

# (code, reason); gRPC itself gives no reason when it cancels, or when a deadline passes on the caller's side.
Errors = frozenset[tuple[str, str]]
CANCELLED: Errors = frozenset({("CANCELLED", ""), ("CANCELLED", "CANCELLED")})
LATE: Errors = frozenset({("DEADLINE_EXCEEDED", ""), ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")})
BAD_IMAGE: Errors = frozenset({("INVALID_ARGUMENT", "IMAGE_UNREADABLE"), ("INVALID_ARGUMENT", "IMAGE_EMPTY")})
UNLOADED: Errors = frozenset({("FAILED_PRECONDITION", "MODEL_UNLOADED")})


class Wrong(Exception):
    """The server answered, but not what it should have."""


class Work:
    """All kinds of work on one server; `rest()` ends what runs and lets nothing new begin until `go()`."""

    def __init__(
        self, address: str, images: Sequence[bytes], detectors: Sequence[str], describer: str, weights: Path
    ) -> None:
        self._address = address
        self._images = images
        self._detectors = detectors
        self._describer = describer
        self._weights = weights
        self._random = random.Random(1)
        self._working = asyncio.Event()
        self._busy = 0
        self._idle = asyncio.Event()
        self.done: Counter[str] = Counter()
        """Pieces of work that ended as they should, by their kind."""
        self.explained: Counter[tuple[str, str]] = Counter()
        """Errors that the work was made to meet."""
        self.unexplained: list[str] = []
        """All others, and wrong answers; a line each."""

    async def __aenter__(self) -> Work:
        self._channel = self._open()
        self._vision: Any = vision_service_pb2_grpc.VisionServiceStub(self._channel)
        self._models: Any = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._devices: Any = device_service_pb2_grpc.DeviceServiceStub(self._channel)
        self._web = httpx.AsyncClient(base_url=f"http://{self._address}", timeout=DEADLINE_S, trust_env=False)
        self._seen = {model: [await self._labels(image, model) for image in self._images] for model in self._detectors}
        kinds: list[tuple[Callable[[], Awaitable[None]], Errors, int]] = [
            (self.detects, frozenset(), 3),
            (self.sends_bad_images, BAD_IMAGE, 1),
            (self.cancels, CANCELLED, 1),
            (self.has_no_time, LATE, 1),
            (self.streams, frozenset(), 2),
            (self.leaves_streams, CANCELLED, 1),
            (self.drops_frames, frozenset(), 1),
            (self.asks, frozenset(), 1),
            (self.leaves_answers, CANCELLED, 1),
            (self.looks_around, frozenset(), 1),
            (self.cycles_a_model, UNLOADED, 1),
        ]
        self.kinds = [_name(work) for work, _, _ in kinds]
        self._tasks = [
            asyncio.create_task(self._again_and_again(work, allowed))
            for work, allowed, count in kinds
            for _ in range(count)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
        await self._web.aclose()

    def go(self) -> None:
        """Everybody works."""
        self._working.set()

    async def rest(self) -> None:
        """Until everybody has ended what they were at."""
        self._working.clear()
        while self._busy:
            self._idle.clear()
            await self._idle.wait()

    async def _again_and_again(self, work: Callable[[], Awaitable[None]], allowed: Errors) -> None:
        name = _name(work)
        while True:
            await self._working.wait()
            self._busy += 1
            try:
                await work()
                self.done[name] += 1
            except (grpc.aio.AioRpcError, AI4ThaiError) as error:
                failure = error if isinstance(error, AI4ThaiError) else from_rpc_error(error, self._address)
                if (failure.code, failure.reason) in allowed:
                    self.explained[failure.code, failure.reason] += 1
                    self.done[name] += 1
                else:
                    await self._note(f"{name}: {failure.code} {failure.reason}: {failure}")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # grpc.aio's word for a call that was cancelled.
                await self._note(f"{name}: cancelled by nobody")
            except (Wrong, httpx.HTTPError) as error:
                await self._note(f"{name}: {type(error).__name__}: {error}")
            finally:
                self._busy -= 1
                self._idle.set()

    async def _note(self, line: str) -> None:
        self.unexplained.append(line)
        await asyncio.sleep(0.2)  # a server that is gone is not asked a thousand times

    # What they do

    async def detects(self) -> None:
        """Any detector, any options; what it finds does not depend on who else asks."""
        number, model = self._random.randrange(len(self._images)), self._random.choice(self._detectors)
        options = detection_pb2.DetectOptions(
            model=model,
            annotate=self._random.random() < 0.2,
            masks=self._random.random() < 0.5,
            mask_form=self._random.choice([detection_pb2.MASK_FORM_POLYGON, detection_pb2.MASK_FORM_RLE]),
        )
        response = await self._detect(self._images[number], options, self._random.choice([1, 2, 3]))
        if labels_of(response) != self._seen[model][number]:
            raise Wrong(f"{model} saw {labels_of(response)} where it saw {self._seen[model][number]} alone")
        if options.annotate and not response.annotated_image.startswith(b"\xff\xd8"):
            raise Wrong("annotate was asked for, but there is no JPEG")

    async def sends_bad_images(self) -> None:
        """Empty, cut off, no image at all: the caller's fault, and nobody else's trouble."""
        whole = self._random.choice(self._images)
        bad = self._random.choice([b"", whole[: len(whole) // 3], os.urandom(500), b"GIF89a" + bytes(20)])
        await self._detect(bad, detection_pb2.DetectOptions())
        raise Wrong(f"a bad image of {len(bad)} bytes was answered")

    async def cancels(self) -> None:
        """Leaves after some milliseconds, wherever its image is by then."""
        call = self._vision.Detect(self._request(), timeout=DEADLINE_S)
        await asyncio.sleep(self._random.random() * 0.06)
        call.cancel()
        await _ended(call)

    async def has_no_time(self) -> None:
        """A deadline that passes on the way."""
        await self._vision.Detect(self._request(), timeout=0.001 + self._random.random() * 0.05)

    async def streams(self) -> None:
        """A stream with a tracker from its begin to its end."""
        tracker = self._random.choice(
            [vision_service_pb2.TRACKER_NONE, vision_service_pb2.TRACKER_BYTETRACK, vision_service_pb2.TRACKER_BOTSORT]
        )
        config = vision_service_pb2.StreamConfig(tracker=tracker, max_in_flight=self._random.choice([0, 1, 4]))
        count = self._random.randint(1, 12)
        results, summary = await self._stream(config, count)
        if [result.frame_id for result in results] != list(range(count)):
            raise Wrong(f"of {count} frames came {[result.frame_id for result in results]}")
        if summary is None or (summary.received_count, summary.detected_count) != (count, count):
            raise Wrong(f"the summary of {count} frames is {summary}")

    async def leaves_streams(self) -> None:
        """In the middle: by cancelling, or with its whole connection."""
        channel = self._open()
        stub: Any = vision_service_pb2_grpc.VisionServiceStub(channel)
        config = vision_service_pb2.StreamConfig(tracker=vision_service_pb2.TRACKER_BYTETRACK)
        call = stub.DetectStream(self._frames(config, 1000), timeout=DEADLINE_S)
        try:
            for _ in range(self._random.randint(0, 5)):
                await call.read()
            if self._random.random() < 0.5:
                call.cancel()
                await _ended(call)
        finally:
            await channel.close()

    async def drops_frames(self) -> None:
        """A camera that is too quick: every frame is accounted for."""
        config = vision_service_pb2.StreamConfig(overflow=vision_service_pb2.OVERFLOW_DROP_OLDEST, max_in_flight=2)
        count = self._random.randint(5, 20)
        results, summary = await self._stream(config, count, slowly=True)
        dropped = sum(result.HasField("dropped") for result in results)
        if len(results) != count or summary is None or summary.dropped_count != dropped:
            raise Wrong(f"of {count} frames came {len(results)}, {dropped} dropped; the summary is {summary}")

    async def asks(self) -> None:
        """A question about an image, through Generate or Analyze."""
        image, question = image_pb2.Image(content=self._random.choice(self._images)), "How many shapes are there?"
        if self._random.random() < 0.5:
            request = vision_service_pb2.AnalyzeRequest(image=image, question=question, model=self._describer)
            if not (await self._vision.Analyze(request, timeout=DEADLINE_S)).text:
                raise Wrong("an Analyze without words")
            return
        pieces, summary = "", None
        async for response in self._vision.Generate(self._question(image, question), timeout=DEADLINE_S):
            pieces += response.delta.text
            summary = response.summary if response.HasField("summary") else summary
        if summary is None or summary.text != pieces:
            raise Wrong(f"the pieces {pieces!r} do not make {summary}")

    async def leaves_answers(self) -> None:
        """After the first word."""
        image = image_pb2.Image(content=self._random.choice(self._images))
        call = self._vision.Generate(self._question(image, "What is in the picture?"), timeout=DEADLINE_S)
        await call.read()
        call.cancel()
        await _ended(call)

    async def looks_around(self) -> None:
        """Health, metrics, models, devices, as a dashboard does."""
        for path in ("/health", "/metrics", "/info", "/v1/models"):
            response = await self._web.get(path)
            if response.status_code != 200:
                raise Wrong(f"GET {path} answered {response.status_code}: {response.text[:200]}")
        await self._models.ListModels(model_service_pb2.ListModelsRequest(), timeout=DEADLINE_S)
        await self._devices.ListDevices(device_service_pb2.ListDevicesRequest(), timeout=DEADLINE_S)
        await asyncio.sleep(0.1)

    async def cycles_a_model(self) -> None:
        """Loads a model, loads it anew under traffic, unloads it; its calls fail only while it is not there."""
        load = model_service_pb2.LoadModelRequest(name=CYCLED, aliases=[ALIAS])
        await self._models.LoadModel(load, timeout=DEADLINE_S)
        os.utime(self._weights)
        reloading = asyncio.ensure_future(self._models.LoadModel(load, timeout=DEADLINE_S))
        while not reloading.done():
            await self._detect(self._images[0], detection_pb2.DetectOptions(model=self._random.choice([CYCLED, ALIAS])))
        await reloading
        await self._models.UnloadModel(model_service_pb2.UnloadModelRequest(name=CYCLED), timeout=DEADLINE_S)
        await self._detect(self._images[0], detection_pb2.DetectOptions(model=CYCLED))
        raise Wrong("a model that is not loaded has answered")

    # What they do it with

    def _open(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])

    def _request(self) -> vision_service_pb2.DetectRequest:
        return vision_service_pb2.DetectRequest(image=image_pb2.Image(content=self._random.choice(self._images)))

    async def _detect(
        self, content: bytes, options: detection_pb2.DetectOptions, priority: int = 0
    ) -> vision_service_pb2.DetectResponse:
        request = vision_service_pb2.DetectRequest(image=image_pb2.Image(content=content), options=options)
        request.priority = priority  # type: ignore[assignment]  # an enum's number
        response: vision_service_pb2.DetectResponse = await self._vision.Detect(request, timeout=DEADLINE_S)
        return response

    async def _labels(self, image: bytes, model: str) -> list[str]:
        return labels_of(await self._detect(image, detection_pb2.DetectOptions(model=model)))

    def _question(self, image: image_pb2.Image, question: str) -> vision_service_pb2.GenerateRequest:
        parts = [generation_pb2.MessagePart(image=image), generation_pb2.MessagePart(text=question)]
        return vision_service_pb2.GenerateRequest(
            model=self._describer,
            messages=[generation_pb2.Message(role=generation_pb2.ROLE_USER, parts=parts)],
            options=generation_pb2.GenerateOptions(max_new_tokens=24),
        )

    async def _frames(
        self, config: vision_service_pb2.StreamConfig, count: int
    ) -> AsyncIterator[vision_service_pb2.DetectStreamRequest]:
        yield vision_service_pb2.DetectStreamRequest(config=config)
        for number in range(count):
            image = image_pb2.Image(content=self._images[number % len(self._images)])
            yield vision_service_pb2.DetectStreamRequest(frame=vision_service_pb2.Frame(frame_id=number, image=image))

    async def _stream(
        self, config: vision_service_pb2.StreamConfig, count: int, *, slowly: bool = False
    ) -> tuple[list[vision_service_pb2.FrameResult], vision_service_pb2.StreamSummary | None]:
        """The results and the summary. Raises AI4ThaiError for a frame that failed."""
        results: list[vision_service_pb2.FrameResult] = []
        summary = None
        async for response in self._vision.DetectStream(self._frames(config, count), timeout=DEADLINE_S):
            if response.HasField("summary"):
                summary = response.summary
                continue
            if response.result.HasField("error"):
                raise from_status(response.result.error, self._address)
            results.append(response.result)
            if slowly:
                await asyncio.sleep(0.01)
        return results, summary


def labels_of(response: vision_service_pb2.DetectResponse) -> list[str]:
    """What was surely seen, whatever the order of equals."""
    if response.classes:
        return [response.classes[0].label]
    return sorted(found.label for found in response.detections if found.confidence > 0.5)


def _name(work: Callable[[], Awaitable[None]]) -> str:
    return work.__name__.replace("_", " ")


async def _ended(call: Any) -> None:
    """Waits for a call that was cancelled to have ended; one that was answered before is fine too."""
    code = await call.code()
    if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
        raise Wrong(f"a cancelled call ended with {code.name}: {await call.details()}")
