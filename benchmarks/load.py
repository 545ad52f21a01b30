"""Callers of the vision server: Detect one after another, or DetectStream, each counted until the time is over."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import grpc
from ai4thai.vision.v1 import image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc

from serving.rpc import channel_options

WARM_UP_S = 1.0
STREAM_IN_FLIGHT = 4


@dataclass(frozen=True)
class Load:
    """What a number of callers saw."""

    callers: int
    images_per_s: float
    p50_ms: float
    p99_ms: float


def run_detect(address: str, images: Sequence[bytes], callers: int, seconds: float) -> Load:
    """Unary calls; a caller sends its next image when it has the last one's answer."""
    return asyncio.run(_run(_detect_caller, address, images, callers, seconds))


def run_streams(address: str, images: Sequence[bytes], callers: int, seconds: float) -> Load:
    """Streams; a caller keeps STREAM_IN_FLIGHT frames on their way."""
    return asyncio.run(_run(_stream_caller, address, images, callers, seconds))


class _Clock:
    """Counts the answers that come between the warm-up's end and the end."""

    def __init__(self, seconds: float) -> None:
        self.begin_s = time.perf_counter() + WARM_UP_S
        self.end_s = self.begin_s + seconds
        self.latencies_s: list[float] = []

    def over(self) -> bool:
        return time.perf_counter() >= self.end_s

    def count(self, sent_s: float) -> None:
        now_s = time.perf_counter()
        if self.begin_s <= now_s < self.end_s:
            self.latencies_s.append(now_s - sent_s)


async def _run(caller: object, address: str, images: Sequence[bytes], callers: int, seconds: float) -> Load:
    clock = _Clock(seconds)
    requests = [image_pb2.Image(content=content) for content in images]
    # A connection each, as callers on different machines would have.
    options = [*channel_options(64 << 20), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(callers)]
    try:
        await asyncio.gather(
            *(
                caller(rpc.VisionServiceStub(channel), islice(cycle(requests), number, None), clock)  # type: ignore[operator]
                for number, channel in enumerate(channels)
            )
        )
    finally:
        for channel in channels:
            await channel.close()
    milliseconds = sorted(latency_s * 1000 for latency_s in clock.latencies_s)
    return Load(
        callers,
        len(milliseconds) / seconds,
        statistics.median(milliseconds),
        milliseconds[min(len(milliseconds) - 1, round(len(milliseconds) * 0.99))],
    )


async def _detect_caller(stub: rpc.VisionServiceAsyncStub, images: islice[image_pb2.Image], clock: _Clock) -> None:
    while not clock.over():
        sent_s = time.perf_counter()
        await stub.Detect(pb.DetectRequest(image=next(images)))
        clock.count(sent_s)


async def _stream_caller(stub: rpc.VisionServiceAsyncStub, images: islice[image_pb2.Image], clock: _Clock) -> None:
    sent: dict[int, float] = {}
    room = asyncio.Semaphore(STREAM_IN_FLIGHT)

    async def requests() -> AsyncIterator[pb.DetectStreamRequest]:
        yield pb.DetectStreamRequest(config=pb.StreamConfig(max_in_flight=STREAM_IN_FLIGHT))
        number = 0
        while True:
            await room.acquire()
            if clock.over():
                return
            sent[number] = time.perf_counter()
            yield pb.DetectStreamRequest(frame=pb.Frame(frame_id=number, image=next(images)))
            number += 1

    async for response in stub.DetectStream(requests()):
        if response.HasField("result"):
            if not response.result.HasField("detection"):
                raise RuntimeError(f"a frame failed: {response.result.error.message}")
            clock.count(sent.pop(response.result.frame_id))
            room.release()
