"""One caller of a load that streams: its frames, written as they are due, matched with their results in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle, islice
from typing import Any

import grpc.aio

from ai4thai.bench_results import Tally
from ai4thai.errors import AI4ThaiError, Cancelled, ServerFault, from_rpc_error, from_status
from ai4thai.vision.v1 import vision_service_pb2

# gRPC's calls have no public type that fits messages which are bytes already.
Call = Any


class StreamCaller:
    """Runs DetectStreams one after another until `over()`, or until `due` ends with None.

    `frames` are whole messages, the n-th with frame_id n. Without `due`, `in_flight` frames are kept on their way; with it each
    frame leaves when its moment comes out of the queue, and counts as sent by whoever put it in.
    """

    def __init__(
        self,
        number: int,
        open_call: Callable[[], Call],
        config: bytes,
        frames: Sequence[bytes],
        tally: Tally,
        *,
        address: str,
        in_flight: int,
        over: Callable[[], bool],
        due: asyncio.Queue[float | None] | None,
    ) -> None:
        self._number = number
        self._open_call = open_call
        self._config = config
        self._frames = frames
        self._tally = tally
        self._address = address
        self._in_flight = in_flight
        self._over = over
        self._due = due
        self._turn: Iterator[int] = islice(cycle(range(len(frames))), number % len(frames), None)
        self._waiting: deque[tuple[int, float]] = deque()
        self._all_written = False

    async def run(self, pause_s: float) -> None:
        """Streams until the end; after one that broke waits as long as the server says, or `pause_s`."""
        try:
            while not self._all_written:
                failure = await self._stream()
                if failure is not None:
                    left_s = max(0.0, self._tally.end_s - time.perf_counter())
                    await asyncio.sleep(min(failure.retry_after_s or pause_s, left_s))
                    self._all_written = self._all_written or (self._due is None and self._over())
        finally:
            while self._due is not None and not self._due.empty():
                due_s = self._due.get_nowait()
                if due_s is not None:
                    self._tally.failed(due_s, gave_up())

    async def _stream(self) -> AI4ThaiError | None:
        """One stream to its end; returns what broke it."""
        call = self._open_call()
        self._room = asyncio.Semaphore(self._in_flight)
        writing = asyncio.create_task(self._write(call))
        failure: AI4ThaiError | None = None
        try:
            async for response in call:
                if response.HasField("result"):
                    self._count(response.result)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, self._address)
        except asyncio.CancelledError:
            failure = gave_up()
            raise
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            if self._waiting and failure is None:
                failure = ServerFault(f"{self._address} ended the stream before all frames were answered.")
            while self._waiting:
                _, due_s = self._waiting.popleft()
                assert failure is not None
                self._tally.failed(due_s, failure)
        return failure

    async def _write(self, call: Call) -> None:
        # It is the reader who meets what the call fails with.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._config)
            while (due_s := await self._next_due()) is not None:
                number = next(self._turn)
                self._waiting.append((number, due_s))
                await call.write(self._frames[number])
            self._all_written = True
            await call.done_writing()

    async def _next_due(self) -> float | None:
        if self._due is not None:
            return await self._due.get()
        await self._room.acquire()
        if self._over():
            return None
        due_s = time.perf_counter()
        self._tally.sent(due_s)
        return due_s

    def _count(self, result: vision_service_pb2.FrameResult) -> None:
        number, due_s = self._waiting[0] if self._waiting else (-1, 0.0)
        if number != result.frame_id:
            raise ServerFault(f"The server answered frame {result.frame_id} when it was frame {number}'s turn.")
        self._waiting.popleft()
        self._room.release()
        match result.WhichOneof("outcome"):
            case "detection":
                self._tally.answered(due_s, result.detection.timings, self._number)
            case "dropped":
                self._tally.dropped(due_s)
            case _:
                self._tally.failed(due_s, from_status(result.error, self._address))


def gave_up() -> AI4ThaiError:
    """What becomes of that which is still on its way when the load is over."""
    return Cancelled("The load was over before the answer came.", code="CANCELLED")
