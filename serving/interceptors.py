"""What happens around every call: its id, its log line, its counts, the translation of its errors."""

from __future__ import annotations

import asyncio
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc

from serving import telemetry
from serving.errors import Code, ServiceError
from serving.logs import get_logger, request_id
from serving.status import GRPC_CODE, from_exception, to_status

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
    peer = unquote(context.peer())
    if match := _PEER.match(peer):
        return match["address"]
    for key, value in context.invocation_metadata() or ():
        if key == HTTP_CALLER:
            return str(value)
    return str(peer)


def new_request_id(offered: str | None) -> str:
    """The caller's id when it is a sane one, a fresh one otherwise."""
    if offered and _REQUEST_ID_FORM.fullmatch(offered):
        return offered
    return uuid.uuid4().hex


class Method:
    """A method with what is the same for all its calls: its metrics, and whether it is logged quietly."""

    def __init__(self, path: str) -> None:
        self.service, _, self.name = path.lstrip("/").rpartition("/")
        self.path = f"{self.service}/{self.name}"
        # Probes and reflection come by the thousand; they are logged at debug and never refused.
        self.quiet = self.service.startswith(_QUIET)
        self.started = telemetry.CALLS_STARTED.labels(self.service, self.name)
        self.seconds = telemetry.CALL_SECONDS.labels(self.service, self.name)

    def count_handled(self, code: str, seconds: float) -> None:
        """Counts a call that has ended."""
        telemetry.CALLS_HANDLED.labels(self.service, self.name, code).inc()
        self.seconds.observe(seconds)


@dataclass(slots=True)
class Call:
    """One call, from begin to end."""

    method: Method
    request_id: str
    caller: str
    began_s: float = field(default_factory=time.perf_counter)
    code: str = "OK"
    reason: str = ""
    message: str = ""
    seconds: float = 0.0


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each call in `async with identified, counted, logged, translated`."""

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
            answering = (handler.stream_unary or handler.unary_unary)(request, context)
            del request
            with closing(answering):  # also when it is refused before it has begun
                async with self._around(method, context):
                    return await answering

        async def answer_many(request: Any, context: Any) -> AsyncIterator[Any]:
            answering = (handler.stream_stream or handler.unary_stream)(request, context)
            del request
            async with (
                self._around(method, context),
                # The inner generator ends with the outer one, also when the caller leaves between two messages.
                aclosing(answering) as responses,
            ):
                async for response in responses:
                    yield response

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

    @asynccontextmanager
    async def _around(self, method: Method, context: Any) -> AsyncIterator[None]:
        metadata = dict(context.invocation_metadata() or ())
        call = Call(method, new_request_id(metadata.get(REQUEST_ID)), caller(context))
        with self._identified(call, context), self._counted(call), self._logged(call):
            async with self._translated(call, context):
                self._check_room(method)
                yield

    def _check_room(self, method: Method) -> None:
        if self._in_flight > self._max_concurrent_calls and not method.quiet:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{self._in_flight - 1} calls are being answered; the limit is {self._max_concurrent_calls}.",
                cure="Try again later, or raise SERVING_MAX_CONCURRENT_CALLS.",
                metadata={"limit": self._max_concurrent_calls},
            )

    @contextmanager
    def _identified(self, call: Call, context: Any) -> Iterator[None]:
        token = request_id.set(call.request_id)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        try:
            yield
        finally:
            # A stream that its caller abandons is closed from another context, where the token means nothing.
            try:
                request_id.reset(token)
            except ValueError:
                request_id.set("")

    @contextmanager
    def _counted(self, call: Call) -> Iterator[None]:
        call.method.started.inc()
        # A balancer's or a client's health Watch lives as long as its connection: it is no work and takes nobody's place.
        weight = 0 if call.method.quiet else 1
        telemetry.CALLS_IN_FLIGHT.inc(weight)
        self._in_flight += weight
        try:
            yield
        finally:
            self._in_flight -= weight
            telemetry.CALLS_IN_FLIGHT.dec(weight)
            call.seconds = time.perf_counter() - call.began_s
            # After the answer is on its way: the caller need not wait for our bookkeeping.
            asyncio.get_running_loop().call_soon(call.method.count_handled, call.code, call.seconds)

    @contextmanager
    def _logged(self, call: Call) -> Iterator[None]:
        try:
            yield
        finally:
            if self._access_log:
                call.seconds = time.perf_counter() - call.began_s
                asyncio.get_running_loop().call_soon(_log_call, call)

    @asynccontextmanager
    async def _translated(self, call: Call, context: Any) -> AsyncIterator[None]:
        try:
            yield
        except GeneratorExit:
            call.code = Code.CANCELLED
            raise
        except grpc.aio.AbortError:
            # Foreign servicers (health, reflection) abort by themselves.
            call.code = getattr(context.code(), "name", None) or "UNKNOWN"
            raise
        except BaseException as error:
            failure = from_exception(error)
            call.code, call.reason, call.message = failure.code, failure.reason, str(failure)
            if failure.code == Code.CANCELLED:
                if (context.time_remaining() or 1) <= 0:
                    call.code = Code.DEADLINE_EXCEEDED
                raise  # the caller has left; there is nobody to tell
            if failure.code == Code.INTERNAL and not isinstance(error, ServiceError):
                _log.exception("a fault of our own", method=call.method.path, request_id=call.request_id)
            if not isinstance(error, Exception):
                raise
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
            await context.abort(grpc_code, status.message, tuple(trailers))


def _log_call(call: Call) -> None:
    """The one line of a call, written after its answer."""
    log = _log.debug if call.method.quiet else _log.info
    fields = {"reason": call.reason, "message": call.message} if call.reason else {}
    log(
        "call ended",
        method=call.method.path,
        code=call.code,
        ms=round(call.seconds * 1000, 2),
        caller=call.caller,
        request_id=call.request_id,
        **fields,
    )
