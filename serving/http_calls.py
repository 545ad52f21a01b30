"""The server's own methods, called for an HTTP request: its body, what it passes on, its caller's leaving, its errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from starlette.requests import Request

from serving.errors import Code, ServiceError
from serving.interceptors import HTTP_CALLER, REQUEST_ID
from serving.status import from_exception, to_status

# google.rpc.Code's own mapping to HTTP (the comments of google/rpc/code.proto).
HTTP_STATUS = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
TIMEOUT_HEADER = "x-server-timeout"
"""Seconds that the caller is willing to wait (the name is Google's)."""

_PASSED_ON = ("x-priority", "x-client-id", "traceparent")
"""Headers that methods read as metadata of the same name."""

_SEE_PROTOS = "The proto files say which fields there are, and of which type."
_DETAILS = "grpc-status-details-bin"
# Below this a body is parsed on the loop: a thread would cost more than it saves.
_SMALL_BODY_BYTES = 1 << 16

AnswerT = TypeVar("AnswerT", bound=Message)
ResultT = TypeVar("ResultT")
Metadata = tuple[tuple[str, str], ...]


class OwnCalls:
    """Calls methods through the server's own socket, so that HTTP requests pass the same interceptors as all others."""

    def __init__(self, channel: grpc.aio.Channel, domain: str, max_body_bytes: int) -> None:
        self._channel = channel
        self._domain = domain
        self.max_body_bytes = max_body_bytes
        """Bytes of one message, and of one HTTP body."""

    async def one(
        self, path: str, message: Message, answer: type[AnswerT], metadata: Metadata, timeout_s: float | None
    ) -> AnswerT:
        """The answer of a method with one; `path` is `/package.Service/Method`. Raises ServiceError."""
        method: Any = self._channel.unary_unary(
            path,
            request_serializer=type(message).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            answered: AnswerT = await method(message, metadata=metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _service_error(status_of(error, self._domain)) from None
        return answered

    def many(
        self, path: str, message: Message, answer: type[AnswerT], metadata: Metadata, timeout_s: float | None
    ) -> Answers[AnswerT]:
        """The answers of a method with many."""
        method: Any = self._channel.unary_stream(
            path,
            request_serializer=type(message).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return Answers(method(message, metadata=metadata, timeout=timeout_s), self._domain)

    async def gather(
        self,
        path: str,
        messages: AsyncIterator[Message],
        answer: type[AnswerT],
        metadata: Metadata,
        timeout_s: float | None,
        *,
        wanted: str,
    ) -> AnswerT:
        """The answer of a method that takes many messages, and has `wanted` in its initial metadata when the first is not enough.

        Raises ServiceError, and what iterating over the messages raises.
        """
        method: Any = self._channel.stream_unary(
            path, request_serializer=_serialize, response_deserializer=answer.FromString
        )
        call = method(metadata=metadata, timeout=timeout_s)
        try:
            async for message in messages:
                await call.write(message)
                # Who writes on while the method refuses what it has got learns of a broken call, and not why.
                if wanted not in await call.initial_metadata():
                    break
            await call.done_writing()
            answered: AnswerT = await call
        except grpc.aio.AioRpcError as error:
            raise _service_error(status_of(error, self._domain)) from None
        finally:
            call.cancel()
        return answered


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


class Answers(Generic[AnswerT]):
    """The answers of a running call, in order; iterating raises ServiceError, and CancelledError once it is cancelled."""

    def __init__(self, call: Any, domain: str) -> None:
        self._call = call
        self._domain = domain

    def cancel(self) -> None:
        """Ends the call; does nothing when it has ended."""
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[AnswerT]:
        try:
            async for message in self._call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise _service_error(status_of(error, self._domain)) from None


def status_of(error: grpc.aio.AioRpcError, domain: str) -> Status:
    """The Status that an error of the server's own call carries, or one made from its code."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS:
            return Status.FromString(value)
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:  # the channel's own, which has no details
        return to_status(from_exception(TimeoutError()), domain)
    return Status(code=error.code().value[0], message=error.details() or "")


def grpc_name(number: int) -> str:
    """`5` → `NOT_FOUND`."""
    return next((code.name for code in grpc.StatusCode if code.value[0] == number), "UNKNOWN")


def retry_after(seconds: float) -> str:
    """The header's value: whole seconds, rounded up, since Retry-After knows no fractions."""
    return str(max(1, -int(-seconds // 1)))


def metadata_of(request: Request, identity: str) -> Metadata:
    """What the call that answers a request is made with."""
    client = request.client
    return (
        (REQUEST_ID, identity),
        (HTTP_CALLER, f"{client.host}:{client.port}" if client else "?"),
        # Metadata is ASCII; what is not comes out escaped, and is refused for what it is.
        *(
            (name, request.headers[name].encode("ascii", "backslashreplace").decode())
            for name in _PASSED_ON
            if name in request.headers
        ),
    )


def timeout_of(request: Request) -> float | None:
    """The seconds that the caller is willing to wait; None: it says nothing. Raises ServiceError."""
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 86400:
        raise unreadable(f"{TIMEOUT_HEADER} is {text!r}; it must be seconds, above 0 up to a day.", TIMEOUT_HEADER)
    return seconds


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """The whole body. Raises ServiceError when it is too large, ClientDisconnect when the caller leaves."""
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes > max_body_bytes:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "MESSAGE_UNREADABLE",
                f"The body is larger than {max_body_bytes} bytes.",
                cure="Send less at once, or raise SERVING_MAX_MESSAGE_BYTES.",
                metadata={"limit_bytes": max_body_bytes},
            )
        chunks.append(chunk)
    return b"".join(chunks)


def parse_json(content: bytes, cure: str = _SEE_PROTOS) -> dict[str, Any]:
    """A body's JSON object; an empty body is an empty one. Raises ServiceError."""
    try:
        values = json.loads(content or b"{}")
    except (ValueError, RecursionError) as error:
        raise unreadable(f"The body is no JSON that can be read: {error}.", "", cure) from None
    if not isinstance(values, dict):
        raise unreadable(f"The body is a JSON {type(values).__name__}, not an object.", "", cure)
    return values


def unreadable(text: str, field: str, cure: str = _SEE_PROTOS) -> ServiceError:
    """The error of a body or header that does not fit; `field` empty: the body as a whole."""
    return ServiceError(Code.INVALID_ARGUMENT, "MESSAGE_UNREADABLE", text, cure=cure, field=field or "body")


async def gone(request: Request) -> None:
    """Returns when the caller closes the connection; the body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def off_loop_if_large(size_bytes: int, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """What the function returns; a large input is worked on in a thread, where it holds up nobody."""
    if size_bytes <= _SMALL_BODY_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def _service_error(status: Status) -> ServiceError:
    """The error that a Status was made from (serving.status.to_status), its cure within the message."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    name = grpc_name(status.code)
    return ServiceError(
        Code(name) if name in Code.__members__ else Code.INTERNAL,
        info.reason or name,
        status.message,
        metadata=dict(info.metadata),
        field=bad.field_violations[0].field if bad.field_violations else "",
        retry_after_s=retry_after_s,
    )
