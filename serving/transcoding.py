"""JSON routes for every method that carries a google.api.http annotation, answered through the server's own gRPC socket."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc
from google.api import annotations_pb2
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from serving.errors import Code, ServiceError
from serving.http_calls import (
    HTTP_STATUS,
    gone,
    grpc_name,
    metadata_of,
    off_loop_if_large,
    parse_json,
    read_body,
    retry_after,
    status_of,
    timeout_of,
    unreadable,
)
from serving.interceptors import REQUEST_ID, new_request_id
from serving.status import from_exception, to_status

# Both alphabets of RFC 4648, as protobuf's JSON allows.
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")
NDJSON = "application/x-ndjson"
_UNKNOWN_FIELD = re.compile(r'has no field named "(?P<name>[^"]*)" at "(?P<path>[^"]*)"')
_FAILED_FIELD = re.compile(r"(?:Failed to parse \w+ field: )+(?P<what>.*?)(?: at \w+\.(?P<path>[\w.\[\]]*))?\.*$")


def to_dict(message: Message) -> dict[str, Any]:
    """The message as JSON values, under the proto's own field names, fields without a value included."""
    values: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return values


def error_response(status: Status, headers: dict[str, str] | None = None) -> Response:
    """A Status as JSON, in the form of Google's APIs: `{"error": {"code", "status", "message", "details"}}`."""
    body = error_body(status)
    code = body["error"]["code"]
    extra = dict(headers or {})
    for detail in body["error"]["details"]:
        if "retryDelay" in detail:
            extra["retry-after"] = retry_after(float(detail["retryDelay"].rstrip("s")))
    return JSONResponse(body, status_code=code, headers=extra)


def error_body(status: Status) -> dict[str, Any]:
    """The JSON of `error_response`."""
    name = grpc_name(status.code)
    return {
        "error": {
            "code": HTTP_STATUS[Code(name)] if name in Code.__members__ else 500,
            "status": name,
            "message": status.message,
            "details": json_format.MessageToDict(status)["details"] if status.details else [],
        }
    }


class Transcoder:
    """Turns annotated methods into routes that call a gRPC channel."""

    def __init__(self, channel: grpc.aio.Channel, domain: str, max_body_bytes: int) -> None:
        self._channel, self._domain, self._max_body_bytes = channel, domain, max_body_bytes

    def routes(self, service_names: Sequence[str]) -> list[BaseRoute]:
        """One route for each annotated unary or server-streaming method of these services."""
        found: list[tuple[str, Route]] = []
        for service_name in service_names:
            service = descriptor_pool.Default().FindServiceByName(service_name)
            for method in service.methods:
                if method.client_streaming:
                    continue
                for verb, path, body in _bindings(method):
                    found.append((path, Route(path, self._endpoint(method, body), methods=[verb])))
        # `/v1/jobs/{id}:watch` also fits `/v1/jobs/{id}`: the one that says more comes first.
        return [route for _, route in sorted(found, key=lambda pair: (-pair[0].count(":"), pair[0]))]

    def _endpoint(self, method: MethodDescriptor, body: str) -> Callable[[Request], Any]:
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        path = f"/{method.containing_service.full_name}/{method.name}"
        kind = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        call: Any = kind(
            path, request_serializer=request_class.SerializeToString, response_deserializer=response_class.FromString
        )

        async def endpoint(request: Request) -> Response:
            identity = new_request_id(request.headers.get(REQUEST_ID))
            headers = {REQUEST_ID: identity}
            try:
                message = await self._read(request, request_class, body)
                timeout_s = timeout_of(request)
            except ServiceError as error:
                return error_response(to_status(error, self._domain), headers)
            except ClientDisconnect:
                return Response(status_code=499)
            running = call(message, metadata=metadata_of(request, identity), timeout=timeout_s)
            leaving = asyncio.ensure_future(gone(request))
            leaving.add_done_callback(lambda _: running.cancel())
            try:
                if method.server_streaming:
                    return await self._stream(running, leaving, headers)
                answer = await running
                values = await off_loop_if_large(answer.ByteSize(), to_dict, answer)
                return JSONResponse(values, headers=headers)
            except grpc.aio.AioRpcError as error:
                return error_response(status_of(error, self._domain), headers)
            except asyncio.CancelledError:
                if leaving.done():
                    return Response(status_code=499)  # the caller has left; nobody reads this
                raise
            finally:
                if not method.server_streaming:
                    leaving.cancel()

        return endpoint

    async def _stream(self, running: Any, leaving: asyncio.Future[None], headers: dict[str, str]) -> Response:
        """Newline-delimited JSON; an error before the first message is still an ordinary error response."""
        messages = aiter(running)
        try:
            first = await anext(messages)
        except StopAsyncIteration:
            first = None
        except BaseException:
            leaving.cancel()
            raise

        async def lines() -> AsyncIterator[bytes]:
            try:
                if first is not None:
                    yield _line(to_dict(first))
                async for message in messages:
                    yield _line(to_dict(message))
            except grpc.aio.AioRpcError as error:
                yield _line(error_body(status_of(error, self._domain)))
            finally:
                leaving.cancel()
                running.cancel()

        return StreamingResponse(lines(), media_type=NDJSON, headers=headers)

    async def _read(self, request: Request, request_class: type[Message], body: str) -> Message:
        """Body, then query, then path: each adds to the message; what does not fit is named."""
        message = request_class()
        if body:
            content = await read_body(request, self._max_body_bytes)
            values = await off_loop_if_large(len(content), parse_json, content)
            await off_loop_if_large(len(content), _fill, message, values)
        else:
            for name, texts in _grouped(request.query_params.multi_items()):
                _fill(message, _nested(message, name, texts))
        for name, text in request.path_params.items():
            _fill(message, _nested(message, name, [text]))
        return message


def _bindings(method: MethodDescriptor) -> Iterator[tuple[str, str, str]]:
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    for binding in (rule, *rule.additional_bindings):
        verb = binding.WhichOneof("pattern")
        if verb:
            yield verb.upper(), getattr(binding, verb), binding.body


def _fill(message: Message, values: dict[str, Any]) -> None:
    _check_shape(message.DESCRIPTOR, values, "")
    try:
        json_format.ParseDict(values, message, max_recursion_depth=32)
    except json_format.ParseError as error:
        text = str(error)
        if unknown := _UNKNOWN_FIELD.search(text):
            inner = ".".join([*unknown["path"].split(".")[1:], unknown["name"]])
            raise unreadable(f"{message.DESCRIPTOR.name} has no field {inner!r}.", inner) from None
        if failed := _FAILED_FIELD.match(text):
            # The text names the field in one of two ways, or in both; the longer says more.
            named = ".".join(re.findall(r"Failed to parse (\w+) field", text))
            path = max(named, (failed["path"] or "").rstrip("."), key=len)
            raise unreadable(f"{path}: {failed['what']}.", path) from None
        raise unreadable(text, "body") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise unreadable(f"The body does not fit {message.DESCRIPTOR.name}: {error}", "body") from None


def _check_shape(descriptor: Any, values: dict[str, Any], path: str) -> None:
    """Refuses what json_format would take and misread: letters that are no base64, and a list where an object belongs."""
    for name, value in values.items():
        field = descriptor.fields_by_name.get(name) or descriptor.fields_by_camelcase_name.get(name)
        if field is None or value is None:
            continue  # json_format names what is unknown
        place = f"{path}{name}"
        inner: Any = field.message_type
        if inner is not None and (inner.full_name.startswith("google.protobuf.") or inner.GetOptions().map_entry):
            continue
        if inner is not None and isinstance(value, list) and not field.is_repeated:
            raise unreadable(f"{place} is a list, not an object.", place)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            spot = f"{place}[{index}]" if isinstance(value, list) else place
            if inner is not None and isinstance(item, dict):
                _check_shape(inner, item, f"{spot}.")
            elif field.type == FieldDescriptor.TYPE_BYTES and isinstance(item, str) and not _BASE64.fullmatch(item):
                raise unreadable(
                    f"{spot} is no base64; send the bytes' base64 alone, without `data:…,` before it.", spot
                )


def _grouped(items: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name, text in items:
        groups.setdefault(name, []).append(text)
    yield from groups.items()


def _nested(message: Message, path: str, texts: list[str]) -> dict[str, Any]:
    """`options.model`, [`x`] → {"options": {"model": "x"}}, with numbers and booleans read from their text."""
    descriptor = message.DESCRIPTOR
    names = path.split(".")
    for name in names[:-1]:
        field = descriptor.fields_by_name.get(name)
        if field is None or field.message_type is None:
            raise unreadable(f"{message.DESCRIPTOR.name} has no field {path!r}.", path)
        descriptor = field.message_type
    field = descriptor.fields_by_name.get(names[-1])
    if field is None:
        raise unreadable(f"{message.DESCRIPTOR.name} has no field {path!r}.", path)
    values = [_scalar(field, text) for text in texts]
    value: Any = values if field.is_repeated else values[-1]
    for name in reversed(names):
        value = {name: value}
    return dict(value)


def _scalar(field: Any, text: str) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    return text  # json_format reads numbers and enums from strings


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def failure(error: BaseException, domain: str, headers: dict[str, str] | None = None) -> Response:
    """Any exception of a plain route as an error response."""
    return error_response(to_status(from_exception(error), domain), headers)
