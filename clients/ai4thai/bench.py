"""A load on a vision server: callers or streams as fast as they are answered, or images at a fixed rate.

At a fixed rate (an open loop) a latency counts from the moment that the image was due, sent or not: a server that stalls is
charged with all that should have come meanwhile. Without one (a closed loop) each caller sends its next image when it has the
last answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, cycle, islice
from typing import Any, Final

import grpc
import grpc.aio

from ai4thai.bench_results import LoadProgress, LoadReport, Tally
from ai4thai.bench_streams import StreamCaller, gave_up
from ai4thai.channel import MAX_MESSAGE_BYTES, channel_target
from ai4thai.errors import NotFound, Unavailable, from_rpc_error
from ai4thai.vision.v1 import detection_pb2, image_pb2, vision_service_pb2

_SERVICE: Final = "/ai4thai.vision.v1.VisionService"
_TICK_S: Final = 0.25
_PAUSE_S: Final = 0.05
"""A caller whose call failed waits as long as the server says, else this long: who is gone is not asked in a busy loop."""
_STOP_S: Final = 1.0
"""A load that is stopped waits this long for what is on its way."""

# A connection each, as callers on different machines would have; what fails counts as failed, and is not sent again.
_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)

# gRPC's multicallables have no public type that fits messages which are bytes already.
_Method = Any


class Arrivals(StrEnum):
    """When images are due at a fixed rate: in even steps, or at random as independent callers come (Poisson)."""

    EVEN = "even"
    POISSON = "poisson"


@dataclass(frozen=True)
class Load:
    """What to ask of the server."""

    callers: int = 16
    """Callers, or streams, each with a connection of its own; at least 1."""
    seconds: float = 10.0
    """How long is measured, after `warm_up_s`."""
    warm_up_s: float = 1.0
    rate_per_s: float | None = None
    """Images due a second, over all connections. None: as fast as they are answered."""
    arrivals: Arrivals = Arrivals.EVEN
    max_outstanding: int = 1000
    """At a fixed rate, images on their way at once; what is due beyond is not sent, and counted."""
    streams: bool = False
    """DetectStream instead of Detect."""
    in_flight: int = 4
    """Frames of one stream on their way at once; at a fixed rate the server alone holds them back."""
    drop_oldest: bool = False
    """Frames that wait at the server give way to later ones."""
    model: str = ""
    """The detector. Empty: the server's default."""
    deadline_s: float = 30.0
    """A call's deadline; a stream's frames get this long after the end."""


class Bench:
    """One load on one server; `images` are whole files' bytes, sent in turn. `on_progress` is called a few times a second."""

    def __init__(
        self,
        address: str,
        images: Sequence[bytes],
        load: Load,
        on_progress: Callable[[LoadProgress], object] = lambda _: None,
    ) -> None:
        self._address = address
        self._load = load
        self._on_progress = on_progress
        self._stopping = asyncio.Event()
        options = detection_pb2.DetectOptions(model=load.model)
        # Written once: a generator that spends its time on protobuf measures protobuf.
        self._requests: list[bytes] = []
        self._frames: list[bytes] = []
        for number, content in enumerate(images):
            image = image_pb2.Image(content=content)
            frame = vision_service_pb2.Frame(frame_id=number, image=image)
            self._requests.append(vision_service_pb2.DetectRequest(image=image, options=options).SerializeToString())
            self._frames.append(vision_service_pb2.DetectStreamRequest(frame=frame).SerializeToString())
        overflow = vision_service_pb2.OVERFLOW_DROP_OLDEST if load.drop_oldest else vision_service_pb2.OVERFLOW_BLOCK
        config = vision_service_pb2.StreamConfig(
            options=options, overflow=overflow, max_in_flight=0 if load.rate_per_s else load.in_flight
        )
        self._config = vision_service_pb2.DetectStreamRequest(config=config).SerializeToString()

    def stop(self) -> None:
        """Ends the load now; run() reports what was measured until here."""
        self._stopping.set()

    async def run(self) -> LoadReport:
        """Puts the load on. Raises Unavailable and NotFound (the model) when the very first call says so."""
        load = self._load
        channels = [_open_channel(self._address) for _ in range(load.callers)]
        try:
            await self._ask_once(channels[0])
            began_s = time.perf_counter()
            begin_s = began_s + load.warm_up_s
            self._tally = Tally(begin_s, begin_s + load.seconds, load.callers)
            working = [asyncio.create_task(work) for work in self._work(channels, began_s)]
            telling = asyncio.create_task(self._tell(began_s))
            try:
                return await self._measure(working)
            finally:
                for task in (*working, telling):
                    task.cancel()
                await asyncio.gather(*working, telling, return_exceptions=True)
        finally:
            for channel in channels:
                await channel.close()

    async def _ask_once(self, channel: grpc.aio.Channel) -> None:
        """Nobody there, or no such model: told at once, not after ten seconds of failures."""
        try:
            await _detect(channel)(self._requests[0], timeout=self._load.deadline_s)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, self._address)
            if isinstance(failure, Unavailable | NotFound):
                raise failure from None

    async def _measure(self, working: Sequence[asyncio.Task[None]]) -> LoadReport:
        tally = self._tally
        await self._wait(working, tally.begin_s)
        cpu_s = time.process_time()
        await self._wait(working, tally.end_s)
        cpu_s = time.process_time() - cpu_s
        patience_s = self._load.deadline_s + _STOP_S
        if self._stopping.is_set():
            tally.end_s = max(tally.begin_s, min(tally.end_s, time.perf_counter()))
            patience_s = _STOP_S
        await asyncio.wait(working, timeout=patience_s)
        for task in working:
            task.cancel()
        for ended in await asyncio.gather(*working, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return tally.report(cpu_s)

    async def _wait(self, working: Sequence[asyncio.Task[None]], until_s: float) -> None:
        """Until the moment, until stop(), or until a worker breaks."""
        stopping = asyncio.create_task(self._stopping.wait())
        left_s = max(0.0, until_s - time.perf_counter())
        done, _ = await asyncio.wait([*working, stopping], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in done:
            await task

    async def _tell(self, began_s: float) -> None:
        tally, load, answered, told_s = self._tally, self._load, 0, began_s
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.perf_counter()
            moment = LoadProgress(
                elapsed_s=now_s - began_s,
                total_s=load.warm_up_s + load.seconds,
                is_warm=now_s >= tally.begin_s,
                images_per_s=(tally.answered_count - answered) / (now_s - told_s),
                failed_count=tally.failed_count,
                outstanding_count=tally.outstanding_count,
            )
            answered, told_s = tally.answered_count, now_s
            self._on_progress(moment)

    def _work(self, channels: Sequence[grpc.aio.Channel], began_s: float) -> Iterator[Coroutine[Any, Any, None]]:
        """What is to run side by side."""
        rate_per_s = self._load.rate_per_s
        if self._load.streams:
            queues: list[asyncio.Queue[float | None]] = []
            if rate_per_s is not None:
                queues = [asyncio.Queue() for _ in channels]
                yield self._queue_when_due(queues, self._due(began_s, rate_per_s))
            for number, channel in enumerate(channels):
                yield self._stream_caller(number, channel, queues[number] if queues else None).run(_PAUSE_S)
        elif rate_per_s is not None:
            yield self._call_when_due(channels, self._due(began_s, rate_per_s))
        else:
            for number, channel in enumerate(channels):
                yield self._call_in_turn(number, channel)

    def _over(self) -> bool:
        return self._stopping.is_set() or time.perf_counter() >= self._tally.end_s

    async def _call_in_turn(self, number: int, channel: grpc.aio.Channel) -> None:
        detect = _detect(channel)
        for request in islice(cycle(self._requests), number % len(self._requests), None):
            if self._over():
                return
            pause_s = await self._call(detect, request, time.perf_counter(), number)
            if pause_s:
                await asyncio.sleep(min(pause_s, max(0.0, self._tally.end_s - time.perf_counter())))

    async def _call_when_due(self, channels: Sequence[grpc.aio.Channel], due: AsyncIterator[float]) -> None:
        requests = cycle(self._requests)
        methods = cycle([_detect(channel) for channel in channels])
        calls: set[asyncio.Task[float]] = set()
        try:
            async for due_s in due:
                self._tally.sent(due_s)
                task = asyncio.create_task(self._call(next(methods), next(requests), due_s, None))
                calls.add(task)
                task.add_done_callback(calls.discard)
            await asyncio.gather(*calls)
        finally:
            left = list(calls)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _call(self, detect: _Method, request: bytes, due_s: float, caller: int | None) -> float:
        """One call to its end; returns how long its caller should pause."""
        if caller is not None:
            self._tally.sent(due_s)
        try:
            response = await detect(request, timeout=self._load.deadline_s)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, self._address)
            self._tally.failed(due_s, failure)
            return failure.retry_after_s or _PAUSE_S
        except asyncio.CancelledError:
            self._tally.failed(due_s, gave_up())
            raise
        self._tally.answered(due_s, response.timings, caller)
        return 0.0

    async def _due(self, began_s: float, rate_per_s: float) -> AsyncIterator[float]:
        """Each moment at which an image is due, when it has come; those for which there is no room are passed over."""
        tally, chance = self._tally, random.Random(0)
        moment_s = began_s
        for number in count(1):
            await asyncio.sleep(max(0.0, moment_s - time.perf_counter()))
            if self._stopping.is_set() or moment_s >= tally.end_s:
                return
            if tally.outstanding_count >= self._load.max_outstanding:
                tally.unsent(moment_s)
            else:
                tally.lagged(moment_s)
                yield moment_s
            if self._load.arrivals is Arrivals.POISSON:
                moment_s += chance.expovariate(rate_per_s)
            else:
                moment_s = began_s + number / rate_per_s

    async def _queue_when_due(self, queues: Sequence[asyncio.Queue[float | None]], due: AsyncIterator[float]) -> None:
        """Hands what is due to the streams in turn, then tells them that it was all."""
        turn = cycle(queues)
        async for due_s in due:
            self._tally.sent(due_s)
            next(turn).put_nowait(due_s)
        for queue in queues:
            queue.put_nowait(None)

    def _stream_caller(
        self, number: int, channel: grpc.aio.Channel, due: asyncio.Queue[float | None] | None
    ) -> StreamCaller:
        method: Any = channel.stream_stream(
            f"{_SERVICE}/DetectStream", response_deserializer=vision_service_pb2.DetectStreamResponse.FromString
        )
        return StreamCaller(
            number,
            method,
            self._config,
            self._frames,
            self._tally,
            address=self._address,
            in_flight=self._load.in_flight,
            over=self._over,
            due=due,
        )


def _detect(channel: grpc.aio.Channel) -> _Method:
    return channel.unary_unary(f"{_SERVICE}/Detect", response_deserializer=vision_service_pb2.DetectResponse.FromString)


def _open_channel(address: str) -> grpc.aio.Channel:
    target, is_tls = channel_target(address)
    if is_tls:
        return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options=_OPTIONS)
    return grpc.aio.insecure_channel(target, options=_OPTIONS)
