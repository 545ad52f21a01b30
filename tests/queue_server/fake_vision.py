"""A vision server that answers as it is told, on a real socket, with the contract's own servicer.

An image's bytes say what happens to it:
    b"ok…"    answered at once; the model's name in the answer is the image's bytes
    b"bad…"   INVALID_ARGUMENT, IMAGE_UNREADABLE
    b"slow…"  waits until `release()` or until the call is cancelled
A stream's frames are looked at with the eye: whatever is blue is found, and followed as track 1.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from ai4thai.vision.v1 import detection_pb2, generation_pb2, vision_service_pb2_grpc
from ai4thai.vision.v1 import vision_service_pb2 as pb
from grpc_status import rpc_status
from PIL import Image, ImageDraw

from serving.errors import Code, ServiceError
from serving.status import to_status
from tests.ports import free_port

DOMAIN = "vision.ai4thai"


def error(code: Code, reason: str, retry_after_s: float | None = None) -> ServiceError:
    return ServiceError(code, reason, f"told to answer {reason}", retry_after_s=retry_after_s)


class FakeVision(vision_service_pb2_grpc.VisionServiceServicer):
    def __init__(self) -> None:
        self.failures: list[ServiceError] = []
        """Each is the answer to one call, before anything else."""
        self.always: ServiceError | None = None
        self.calls: list[bytes] = []
        self.cancelled_s: list[float] = []
        """time.monotonic() of each call that the caller cancelled."""
        self.prompts: list[pb.GenerateRequest] = []
        self.request_ids: list[str] = []
        self.metadata: list[Mapping[str, str]] = []
        self.room: int | None = None
        """Images at once; more are turned away."""
        self.takes_s = 0.0
        """What an image takes."""
        self.failures_after: dict[int, ServiceError] = {}
        """What the call of this number, from 0, is answered."""
        self.answered: list[bytes] = []
        """Images that were neither turned away nor bad."""
        self.stream_configs: list[pb.StreamConfig] = []
        self.frame_ids: list[int] = []
        self.frame_failures: dict[int, ServiceError] = {}
        """What is answered to the frame of this number."""
        self.slow_frame: int | None = None
        """This one is answered after `release()`."""
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server: grpc.Server | None = None
        self.port = 0

    def start(self, port: int = 0) -> None:
        """At a port that is nobody else's while this one is away and comes back."""
        self._server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        vision_service_pb2_grpc.add_VisionServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port or free_port()}")
        self._server.start()

    def stop(self) -> None:
        self._released.set()
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def break_off(self) -> None:
        """Dies with its calls unanswered."""
        assert self._server is not None
        self._server.stop(0)
        self._server = None

    def release(self) -> None:
        """Lets the slow ones go."""
        self._released.set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def wait_for_calls(self, count: int, timeout_s: float = 10) -> None:
        until_s = time.monotonic() + timeout_s
        while len(self.calls) < count:
            assert time.monotonic() < until_s, f"{len(self.calls)} calls came, {count} were expected"
            await asyncio.sleep(0.01)

    def Detect(self, request: pb.DetectRequest, context: Any) -> pb.DetectResponse:
        self._serve(request.image.content, context)
        return pb.DetectResponse(
            model=request.image.content.decode(),
            width_px=100,
            height_px=50,
            detections=[
                detection_pb2.Detection(label="circle", confidence=0.9, box=detection_pb2.Box(x_max_px=10, y_max_px=10))
            ],
            annotated_image=b"x" * 1000 if request.options.annotate else b"",
        )

    def Analyze(self, request: pb.AnalyzeRequest, context: Any) -> pb.AnalyzeResponse:
        self._serve(request.image.content, context)
        return pb.AnalyzeResponse(detection=pb.DetectResponse(width_px=7), text=f"{request.question}: a circle")

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.prompts.append(request)
        images = [part.image.content for message in request.messages for part in message.parts if part.image.content]
        self._serve(images[0] if images else b"ok", context)
        for piece in ("สวัส", "ดี"):
            yield pb.GenerateResponse(delta=pb.GenerateDelta(text=piece))
        yield pb.GenerateResponse(
            summary=pb.GenerateSummary(text="สวัสดี", finish_reason=generation_pb2.FINISH_REASON_STOP)
        )

    def DetectStream(
        self, requests: Iterator[pb.DetectStreamRequest], context: Any
    ) -> Iterator[pb.DetectStreamResponse]:
        config = next(requests).config
        self.stream_configs.append(config)
        self._serve(b"stream", context)
        count = 0
        for request in requests:
            frame = request.frame
            self.frame_ids.append(frame.frame_id)
            self.calls.append(b"frame")
            result = pb.FrameResult(frame_id=frame.frame_id)
            if frame.frame_id == self.slow_frame:
                self._wait(context)
            if frame.frame_id in self.frame_failures:
                result.error.CopyFrom(to_status(self.frame_failures[frame.frame_id], DOMAIN))
            else:
                result.detection.CopyFrom(look(frame.image.content, config))
            count += 1
            yield pb.DetectStreamResponse(result=result)
        yield pb.DetectStreamResponse(summary=pb.StreamSummary(received_count=count))

    def _serve(self, content: bytes, context: Any) -> None:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.metadata.append(metadata)
        self.request_ids.append(metadata.get("x-request-id", ""))
        with self._lock:
            self.calls.append(content)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            failure = self.always or (self.failures.pop(0) if self.failures else None)
            failure = failure or self.failures_after.get(len(self.calls) - 1)
            if self.room is not None and self.in_flight > self.room:
                failure = error(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.05)
        try:
            if failure is not None:
                self._fail(failure, context)
            if content.startswith(b"bad"):
                self._fail(error(Code.INVALID_ARGUMENT, "IMAGE_UNREADABLE"), context)
            if content.startswith(b"slow"):
                self._wait(context)
            time.sleep(self.takes_s)
            self.answered.append(content)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _wait(self, context: Any) -> None:
        """Until `release()`, or until the caller has left."""
        gone = threading.Event()

        def on_end() -> None:
            if not context.is_active() and not gone.is_set():
                gone.set()

        context.add_callback(on_end)
        while not self._released.is_set():
            if gone.wait(0.01):
                self.cancelled_s.append(time.monotonic())
                return

    def _fail(self, failure: ServiceError, context: Any) -> None:
        context.abort_with_status(rpc_status.to_status(to_status(failure, DOMAIN)))


def look(jpeg: bytes, config: pb.StreamConfig) -> pb.DetectResponse:
    """What is blue in the picture."""
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    pixels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero((pixels[..., 2] > 150) & (pixels[..., 0] < 100))
    response = pb.DetectResponse(model="eye", width_px=picture.width, height_px=picture.height)
    if len(rows):
        box = detection_pb2.Box(
            x_min_px=columns.min(), y_min_px=rows.min(), x_max_px=columns.max() + 1, y_max_px=rows.max() + 1
        )
        found = response.detections.add(label="circle", confidence=0.75, box=box)
        if config.tracker == pb.TRACKER_BYTETRACK:
            found.track_id = 1
        if config.options.annotate:
            ImageDraw.Draw(picture).rectangle(
                (box.x_min_px, box.y_min_px, box.x_max_px, box.y_max_px), outline=(0, 200, 0), width=4
            )
    if config.options.annotate:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        response.annotated_image = file.getvalue()
    return response
