"""Calls the vision server in a way that another thread can stop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import grpc
from ai4thai.channel import open_channel
from ai4thai.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from queue_server import statuses
from queue_server.errors import VisionUnreachable
from queue_server.jobs import Failure
from queue_server.work.task import Answer, ItemError, Stopped, VisionFailed

# What another attempt may mend.
_RETRIABLE = frozenset(
    {
        *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED),
        *(grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN),
    }
)
# A full server that does not say when to come again (gRPC itself refused the call) is asked after this time.
FULL_AGAIN_S = 1.0
# Reasons that lie in one image and say nothing about the others.
_OF_THE_ITEM = frozenset(
    {"IMAGE_UNREADABLE", "IMAGE_TOO_LARGE", "IMAGE_EMPTY", "MESSAGE_UNREADABLE", "PROMPT_TOO_LONG"}
)


class _Call(Protocol):
    """What grpc's unary futures and response streams have in common."""

    def cancel(self) -> bool: ...


class Vision:
    """The channel to the vision server, shared by all attempts of a worker."""

    def __init__(self, address: str, *, call_s: float, connect_s: float) -> None:
        self._address = address
        self._call_s = call_s
        self._connect_s = connect_s
        self._channel: grpc.Channel | None = None
        self._stub: Any = None
        self._ready = threading.Event()

    def start(self) -> None:
        """Opens the channel and keeps an eye on its connection."""
        # Without gRPC's own retries: the queue's are longer, visible in the job's attempts, and survive this process.
        self._channel = open_channel(self._address, retries=False)
        self._stub = vision_service_pb2_grpc.VisionServiceStub(self._channel)
        self._channel.subscribe(self._on_connectivity, try_to_connect=True)

    def stop(self) -> None:
        """Closes the channel; calls that still run are cancelled."""
        if self._channel is not None:
            self._channel.unsubscribe(self._on_connectivity)
            self._channel.close()

    def begin(
        self, request_id: str, stopping: Callable[[], bool], *, priority: str = "", trace: str = ""
    ) -> VisionCalls:
        """The calls of one attempt, once the server can be reached; its log names them by `request_id`.

        `priority` says whose turn it is when the server is busy, unless a request says so itself; `trace`: a W3C traceparent.

        Raises:
            VisionFailed: it cannot; the attempt is free.
            Stopped: `stopping` became true meanwhile.
        """
        if self._channel is None:
            raise RuntimeError("Vision has not been started.")
        until_s = time.monotonic() + self._connect_s
        while not self._ready.wait(0.1):
            if stopping():
                raise Stopped
            if time.monotonic() >= until_s:
                raise VisionFailed(self._unreachable(f"no connection within {self._connect_s:g} s", free=True))
        words = {"x-request-id": request_id, "x-priority": priority, "traceparent": trace}
        metadata = tuple((key, value) for key, value in words.items() if value)
        return VisionCalls(self._stub, metadata, self._call_s, self._unreachable)

    def _on_connectivity(self, state: grpc.ChannelConnectivity) -> None:
        # An idle connection (the server said goodbye after a quiet time) is made again by the next call.
        if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE):
            self._ready.set()
        else:
            self._ready.clear()

    def _unreachable(self, why: str, *, free: bool) -> Failure:
        error = VisionUnreachable(address=self._address, why=why)
        return Failure(error.reason, str(error), statuses.write_error(error), retriable=True, free=free)


class VisionCalls:
    """The calls of one attempt; `cancel` stops those that run and forbids more."""

    def __init__(
        self, stub: Any, metadata: tuple[tuple[str, str], ...], call_s: float, unreachable: Callable[..., Failure]
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._call_s = call_s
        self._unreachable = unreachable
        self._lock = threading.Lock()
        self._running: dict[_Call, float] = {}
        """Each with the moment until which its next answer must have come, for those that have no deadline of gRPC's."""
        self._expired: set[_Call] = set()
        self._cancelled = False

    def detect(self, request: vision_service_pb2.DetectRequest) -> Answer[vision_service_pb2.DetectResponse]:
        """Begins a Detect."""
        pending: Answer[vision_service_pb2.DetectResponse] = self._begin(self._stub.Detect.future, request)
        return pending

    def analyze(self, request: vision_service_pb2.AnalyzeRequest) -> Answer[vision_service_pb2.AnalyzeResponse]:
        """Begins an Analyze."""
        pending: Answer[vision_service_pb2.AnalyzeResponse] = self._begin(self._stub.Analyze.future, request)
        return pending

    def generate(
        self, request: vision_service_pb2.GenerateRequest, on_tokens: Callable[[int], None]
    ) -> vision_service_pb2.GenerateSummary:
        """Makes a Generate and waits for its end; `on_tokens` hears how many pieces of text have come.

        Raises:
            VisionFailed, Stopped.
        """
        call = self._made(lambda: self._stub.Generate(request, timeout=self._call_s, metadata=self._metadata))
        pieces = 0
        try:
            for response in call:
                if response.WhichOneof("message") == "summary":
                    return vision_service_pb2.GenerateSummary.FromString(response.summary.SerializeToString())
                pieces += 1
                on_tokens(pieces)
        except grpc.RpcError as error:
            raise self._translated(error, call) from error
        finally:
            self._ended(call)
        raise VisionFailed(self._unreachable("the answer broke off before its summary", free=False))

    def detect_stream(
        self,
        config: vision_service_pb2.StreamConfig,
        frames: Iterator[vision_service_pb2.Frame],
        *,
        max_in_flight: int,
    ) -> Generator[vision_service_pb2.FrameResult]:
        """Makes a DetectStream: each frame's result, in their order. To be closed.

        `frames` is read by a thread of gRPC's, no more than `max_in_flight` ahead of the results that were taken here; it must
        end soon after the attempt has been stopped. The stream lasts as long as the frames do, but not longer than a call may
        without an answer.

        Raises:
            VisionFailed, Stopped; what `frames` raised, once all those before it are answered.
        """
        outgoing = _OutgoingFrames(config, frames, max_in_flight)
        call = self._made(lambda: self._stub.DetectStream(outgoing.requests(), metadata=self._metadata), self._call_s)
        try:
            for response in call:
                with self._lock:
                    self._running[call] = time.monotonic() + self._call_s
                if response.WhichOneof("message") == "summary":
                    if outgoing.failure is not None:
                        raise outgoing.failure
                    return
                yield response.result
                outgoing.answered()
        except grpc.RpcError as error:
            raise self._translated(error, call) from error
        finally:
            outgoing.stop()
            self._ended(call)
        raise VisionFailed(self._unreachable("the stream broke off before its summary", free=False))

    def cancel(self) -> None:
        """Cancels what runs; safe from any thread, also twice."""
        with self._lock:
            self._cancelled = True
            running = list(self._running)
        for call in running:
            call.cancel()

    def expire(self) -> None:
        """Cancels the streams that have not been answered for too long; to be called now and then."""
        now_s = time.monotonic()
        with self._lock:
            late = [call for call, until_s in self._running.items() if until_s < now_s]
            self._expired.update(late)
        for call in late:
            call.cancel()

    def _begin(self, method: Callable[..., Any], request: object) -> Any:
        call = self._made(lambda: method(request, timeout=self._call_s, metadata=self._metadata))
        return _Pending(call, self)

    def _made(self, make: Callable[[], Any], answer_s: float = math.inf) -> Any:
        with self._lock:
            if self._cancelled:
                raise Stopped
            call = make()
            self._running[call] = time.monotonic() + answer_s
        return call

    def _ended(self, call: _Call) -> None:
        with self._lock:
            self._running.pop(call, None)
        # A stream that is left before its end must be told so; one that has ended does not mind.
        call.cancel()

    def _cut_off(self, call: _Call) -> Exception:
        """What a cancelled call means: that we stopped it, or that the server did."""
        if self._cancelled:
            return Stopped()
        if call not in self._expired:
            return VisionFailed(self._unreachable("it ended the call", free=False))
        message = f"No frame was answered for {self._call_s:g} s."
        status = Status(code=grpc.StatusCode.DEADLINE_EXCEEDED.value[0], message=message)
        return VisionFailed(Failure("DEADLINE_EXCEEDED", message, status.SerializeToString(), retriable=True))

    def _translated(self, error: Any, call: _Call) -> Exception:
        """What a failed call means: for the attempt (VisionFailed), for one item (ItemError), or that it was stopped."""
        code: grpc.StatusCode = error.code()
        if self._cancelled or code == grpc.StatusCode.CANCELLED:
            return self._cut_off(call)
        status = _status_of(error)
        reason, retry_after_s = _read_details(status.details)
        if reason in _OF_THE_ITEM or (
            code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in status.message
        ):
            return ItemError(status)
        if code == grpc.StatusCode.UNAVAILABLE and not reason:
            # Not the server's word but the connection's. The job may be what broke the server, so that this counts.
            return VisionFailed(self._unreachable(status.message, free=False))
        later = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
        return VisionFailed(
            Failure(
                reason or code.name,
                status.message,
                status.SerializeToString(),
                retriable=code in _RETRIABLE,
                # The server itself said "later" (loading, full, shutting down): the work was not begun.
                free=later,
                retry_after_s=retry_after_s or (FULL_AGAIN_S if code == grpc.StatusCode.RESOURCE_EXHAUSTED else 0.0),
            )
        )


class _OutgoingFrames:
    """The requests of a DetectStream: the config, then the frames, a bounded number of them unanswered."""

    def __init__(
        self, config: vision_service_pb2.StreamConfig, frames: Iterator[vision_service_pb2.Frame], max_in_flight: int
    ) -> None:
        self._config = config
        self._frames = frames
        self._room = threading.Semaphore(max_in_flight)
        self._stopped = False
        self.failure: Exception | None = None
        """What the frames raised. gRPC would log it, cancel the call, and tell nobody what it was."""

    def requests(self) -> Iterator[vision_service_pb2.DetectStreamRequest]:
        """For gRPC's own thread."""
        yield vision_service_pb2.DetectStreamRequest(config=self._config)
        try:
            for frame in self._frames:
                while not self._room.acquire(timeout=0.1):
                    if self._stopped:
                        return
                yield vision_service_pb2.DetectStreamRequest(frame=frame)
        except Exception as error:
            self.failure = error

    def answered(self) -> None:
        """One frame was; there is room for one more."""
        self._room.release()

    def stop(self) -> None:
        """No more frames."""
        self._stopped = True


class _Pending:
    """A unary call on its way."""

    def __init__(self, call: Any, calls: VisionCalls) -> None:
        self._call = call
        self._calls = calls

    def result(self) -> Any:
        """Waits for the response; raises VisionFailed, ItemError, Stopped."""
        try:
            return self._call.result()
        except grpc.FutureCancelledError:
            # grpc says this of every CANCELLED, also of one that the server chose.
            raise self._calls._cut_off(self._call) from None
        except grpc.RpcError as error:
            raise self._calls._translated(error, self._call) from error
        finally:
            self._calls._ended(self._call)


def _status_of(error: Any) -> Status:
    status = rpc_status.from_call(error)
    return status or Status(code=error.code().value[0], message=error.details() or error.code().name)


def _read_details(details: Sequence[Any]) -> tuple[str, float | None]:
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return info.reason, retry_after_s
