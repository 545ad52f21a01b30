"""What happens around every call: its id, its log line, its counts, the translation of its errors."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import grpc
from prometheus_client import Counter

from serving import telemetry
from serving.errors import Code, ServiceError
from serving.logs import get_logger, request_id, trace_id
from serving.status import GRPC_CODE, from_exception, to_status
from serving.traces import TRACEPARENT, read_traceparent, trace_id_of

_log = get_logger("calls")

REQUEST_ID = "x-request-id"
"""Metadata and HTTP header: the caller's own id for the call, or ours; comes back in the trailing metadata."""

HTTP_CALLER = "x-http-caller"
"""Metadata that the transcoder sets; believed only from the process's own socket, which outsiders cannot reach."""

_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DETAILS = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"
_QUIET = ("grpc.health.v1.Health", "grpc.reflection.")
_PEER = re.compile(r"unix-abstract:(?:\\0|\0|%00)?peer/(?P<address>.+)/\d+")


def caller(context: Any) -> str:
    """Who calls, as `address:port`; through the HTTP face too."""
    peer = context.peer()
    if address := _address(peer):
        return address
    for key, value in context.invocation_metadata() or ():
        if key == HTTP_CALLER:
            return str(value)
    return unquote(peer)


def new_request_id(offered: str | None) -> str:
    """The caller's id when it is a sane one, a fresh one otherwise."""
    if offered and _REQUEST_ID_FORM.fullmatch(offered):
        return offered
    return secrets.token_hex(16)


@lru_cache(maxsize=1024)  # a connection's name stays the same for all its calls
def _address(peer: str) -> str | None:
    """`address:port` of a connection that came through the port; None: it came another way."""
    match = _PEER.match(unquote(peer))
    return match["address"] if match else None


class Method:
    """A method with what is the same for all its calls: its metrics, and whether it is logged quietly."""

    def __init__(self, path: str) -> None:
        self.service, _, self.name = path.lstrip("/").rpartition("/")
        self.path = f"{self.service}/{self.name}"
        # Probes and reflection come by the thousand; they are logged at debug and never refused.
        self.quiet = self.service.startswith(_QUIET)
        self.started = telemetry.CALLS_STARTED.labels(self.service, self.name)
        self.seconds = telemetry.CALL_SECONDS.labels(self.service, self.name)
        self._handled: dict[str, Counter] = {}

    def count_handled(self, code: str, seconds: float) -> None:
        """Counts a call that has ended."""
        handled = self._handled.get(code)
        if handled is None:
            handled = self._handled[code] = telemetry.CALLS_HANDLED.labels(self.service, self.name, code)
        handled.inc()
        self.seconds.observe(seconds)


@dataclass(slots=True)
class Call:
    """One call, from begin to end."""

    method: Method
    request_id: str
    trace_id: str
    caller: str
    began_s: float = field(default_factory=time.perf_counter)
    code: str = "OK"
    reason: str = ""
    message: str = ""
    seconds: float = 0.0


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each call: it is begun (id, counts), answered, its error translated, ended (counts, log line).

    Plain functions, not context managers one in another: those took longer than all the rest of a small call.
    """

    def __init__(self, domain: str, *, access_log: bool, max_concurrent_calls: int) -> None:
        self._domain = domain
        self._access_log = access_log
        self._max_concurrent_calls = max_concurrent_calls
        self._in_flight = 0
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replaces the handler of a method by one that is wrapped, made once."""
        path = handler_call_details.method
        wrapped = self._wrapped.get(path)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # no such method: not kept, since callers could name any number of them
            wrapped = self._wrapped[path] = self._wrap(handler, Method(path))
        return wrapped

    def _wrap(self, handler: Any, method: Method) -> Any:
        """The four shapes of a method come down to two."""

        async def answer_one(request: Any, context: Any) -> Any:
            call = self._begin(method, context)
            try:
                self._check_room(method)
                return await (handler.stream_unary or handler.unary_unary)(request, context)
            except BaseException as error:
                request = None  # grpc keeps this frame for a while (see _tell)
                await self._tell(error, call, context)
                raise
            finally:
                self._end(call)

        async def answer_many(request: Any, context: Any) -> AsyncIterator[Any]:
            call = self._begin(method, context)
            try:
                self._check_room(method)
                answering = (handler.stream_stream or handler.unary_stream)(request, context)
                request = None  # not held as long as the stream lasts
                # The inner generator ends with the outer one, also when the caller leaves between two messages.
                async with aclosing(answering) as responses:
                    async for response in responses:
                        yield response
            except BaseException as error:
                request = None
                await self._tell(error, call, context)
                raise
            finally:
                self._end(call)

        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(
            answer_many if handler.response_streaming else answer_one,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _begin(self, method: Method, context: Any) -> Call:
        offered = traceparent = None
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID:
                offered = value
            elif key == TRACEPARENT:
                traceparent = value
        call = Call(method, new_request_id(offered), trace_id_of(read_traceparent(traceparent)), caller(context))
        request_id.set(call.request_id)  # for this call's task alone: grpc.aio gives each call one of its own
        trace_id.set(call.trace_id)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        method.started.inc()
        # A balancer's or a client's health Watch lives as long as its connection: it is no work and takes nobody's place.
        if not method.quiet:
            self._in_flight += 1
            telemetry.CALLS_IN_FLIGHT.inc()
        return call

    def _end(self, call: Call) -> None:
        if not call.method.quiet:
            self._in_flight -= 1
            telemetry.CALLS_IN_FLIGHT.dec()
        call.seconds = time.perf_counter() - call.began_s
        # After the answer is on its way: the caller need not wait for our bookkeeping.
        asyncio.get_running_loop().call_soon(self._note, call)

    def _note(self, call: Call) -> None:
        call.method.count_handled(call.code, call.seconds)
        if self._access_log:
            _log_call(call)

    def _check_room(self, method: Method) -> None:
        if self._in_flight > self._max_concurrent_calls and not method.quiet:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{self._in_flight - 1} calls are being answered; the limit is {self._max_concurrent_calls}.",
                cure="Try again later, or raise SERVING_MAX_CONCURRENT_CALLS.",
                metadata={"limit": self._max_concurrent_calls},
            )

    async def _tell(self, error: BaseException, call: Call, context: Any) -> None:
        """Notes how the call failed and tells its caller; returns when there is nobody to tell, or it has been told already."""
        if isinstance(error, GeneratorExit):
            call.code = Code.CANCELLED
            return
        if isinstance(error, grpc.aio.AbortError):
            # Foreign servicers (health, reflection) abort by themselves.
            call.code = getattr(context.code(), "name", None) or "UNKNOWN"
            return
        failure = from_exception(error)
        call.code, call.reason, call.message = failure.code, failure.reason, str(failure)
        if failure.code == Code.CANCELLED:
            if (context.time_remaining() or 1) <= 0:
                call.code = Code.DEADLINE_EXCEEDED
            return  # the caller has left
        if failure.code == Code.INTERNAL and not isinstance(error, ServiceError):
            _log.exception("a fault of our own", method=call.method.path, request_id=call.request_id)
        if not isinstance(error, Exception):
            return
        status, grpc_code = to_status(failure, self._domain), GRPC_CODE[failure.code]
        # grpc keeps the AbortError in a cycle (RPCState -> AbortError -> its traceback -> frames -> context -> RPCState)
        # until the garbage collector comes by; the handler's frames in it would keep the request, images and all.
        traceback.clear_frames(error.__traceback__)
        trailers: list[tuple[str, str | bytes]] = [
            (_DETAILS, status.SerializeToString()),
            (REQUEST_ID, call.request_id),
        ]
        if failure.retry_after_s is not None:
            # What RetryInfo tells people, this tells gRPC's own retries (gRFC A6).
            trailers.append((_PUSHBACK, str(round(failure.retry_after_s * 1000))))
        try:
            await context.abort(grpc_code, status.message, tuple(trailers))
        except grpc.aio.InternalError:  # not exported more exactly: the call had ended when its status was to be sent
            call.code = Code.DEADLINE_EXCEEDED if (context.time_remaining() or 1) <= 0 else Code.CANCELLED
            raise asyncio.CancelledError from None  # grpc would log anything else as a fault of ours


def _log_call(call: Call) -> None:
    """The one line of a call, written after its answer."""
    log = _log.debug if call.method.quiet else _log.info
    fields = {"reason": call.reason, "message": call.message} if call.reason else {}
    if call.trace_id:
        fields["trace_id"] = call.trace_id
    log(
        "call ended",
        method=call.method.path,
        code=call.code,
        ms=round(call.seconds * 1000, 2),
        caller=call.caller,
        request_id=call.request_id,
        **fields,
    )
