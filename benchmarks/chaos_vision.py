"""A vision server of the chaos runs, `python -m benchmarks.chaos_vision`: answers what an image's bytes say, and tells each call.

A process of its own on a real socket with the contract's own servicer. An image is `<seconds> <kind> <anything>`: it takes so
many seconds, and then is answered with objects that depend on all of its bytes (`good`) or is IMAGE_UNREADABLE (`bad`).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from typing import Any

import grpc
from ai4thai.vision.v1 import detection_pb2, vision_service_pb2, vision_service_pb2_grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

MODEL = "stand-in"


def write_image(seconds: float, *, good: bool, filling: bytes) -> bytes:
    """An image that takes this long."""
    return b" ".join([f"{seconds:.3f}".encode(), b"good" if good else b"bad", filling])


def seconds_of(image: bytes) -> float:
    """How long an image takes."""
    return float(image.split(b" ", 1)[0])


def answer(image: bytes) -> vision_service_pb2.DetectResponse | None:
    """The one right answer; None: it is unreadable."""
    if image.split(b" ", 2)[1] == b"bad":
        return None
    digest = hashlib.sha256(image).digest()
    return vision_service_pb2.DetectResponse(
        model=MODEL,
        width_px=100 + digest[0],
        height_px=100 + digest[1],
        detections=[
            detection_pb2.Detection(
                label=digest.hex()[:16], confidence=0.9, box=detection_pb2.Box(x_max_px=digest[2], y_max_px=digest[3])
            )
        ],
    )


class StandIn(vision_service_pb2_grpc.VisionServiceServicer):
    """Writes a line to stdout when a call begins, is answered, is cancelled: the record of what the queue had done."""

    async def Detect(
        self, request: vision_service_pb2.DetectRequest, context: Any
    ) -> vision_service_pb2.DetectResponse:
        """Waits as long as the image says, then answers."""
        request_id = dict(context.invocation_metadata()).get("x-request-id", "")
        image = request.image.content
        _tell("began", request_id)
        try:
            await asyncio.sleep(seconds_of(image))
        except asyncio.CancelledError:
            _tell("cancelled", request_id)
            raise
        found = answer(image)
        if found is None:
            _tell("answered", request_id)
            await context.abort_with_status(rpc_status.to_status(_unreadable()))
            raise AssertionError("abort raises")
        _tell("answered", request_id)
        return found


def _unreadable() -> Status:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="IMAGE_UNREADABLE", domain="vision.ai4thai"))
    return Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="It says that it is bad.", details=[info])


def _tell(event: str, request_id: str) -> None:
    print(json.dumps({"event": event, "at_s": time.monotonic(), "request_id": request_id}), flush=True)


async def _serve(port: int) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    vision_service_pb2_grpc.add_VisionServiceServicer_to_server(StandIn(), server)  # type: ignore[abstract]  # the others are UNIMPLEMENTED
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(json.dumps({"event": "listening", "port": port}), flush=True)
    await server.wait_for_termination()


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one; the first line tells")
    asyncio.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
