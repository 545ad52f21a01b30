"""POST /v1/chat/completions and GET /v1/models, answered through the server's own Generate, ListModels and GetModel."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ai4thai.vision.v1 import model_service_pb2, vision_service_pb2
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from serving.errors import Code, ServiceError
from serving.http_calls import (
    HTTP_STATUS,
    Answers,
    OwnCalls,
    gone,
    metadata_of,
    off_loop_if_large,
    read_body,
    retry_after,
    timeout_of,
)
from serving.interceptors import REQUEST_ID, new_request_id
from serving.status import from_exception, to_status
from serving.transcoding import error_body, to_dict
from vision_server.errors import InvalidField
from vision_server.openai import writing
from vision_server.openai.image_urls import ImageUrls
from vision_server.openai.reading import MAX_TOKENS_FIELDS, Chat, read_chat
from vision_server.results import ModelInfo, Task
from vision_server.settings import VisionSettings

_GENERATE = "/ai4thai.vision.v1.VisionService/Generate"
_LIST_MODELS = "/ai4thai.vision.v1.ModelService/ListModels"
_GET_MODEL = "/ai4thai.vision.v1.ModelService/GetModel"
# Line ends to some readers of events, though not to JSON.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_DONE = b"data: [DONE]\n\n"
# nginx, for one, would otherwise gather the pieces of an answer.
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

ResultT = TypeVar("ResultT")
_Answers = Answers[vision_service_pb2.GenerateResponse]


class _ModelName(StringConvertor):
    """With slashes, since one may be called `llava-hf/llava-1.5-7b-hf`; without the `:` of `…:load`, another method."""

    regex = "[^:]+"


class OpenAIRoutes:
    """OpenAI's face of the describers; `infos` tells which models there are now."""

    def __init__(
        self,
        settings: VisionSettings,
        infos: Callable[[], Sequence[ModelInfo]],
        domain: str,
    ) -> None:
        self._settings = settings
        self._infos = infos
        self._domain = domain
        self._urls = ImageUrls(settings.image_hosts, settings.max_image_bytes)
        self._started_s = int(time.time())

    def start(self) -> None:
        """Makes ready to fetch images."""
        self._urls.start()

    async def stop(self) -> None:
        """Closes the connections to hosts of images."""
        await self._urls.stop()

    def routes(self) -> list[BaseRoute]:
        """The two model routes answer what ListModels and GetModel do, and OpenAI's fields beside it."""
        register_url_convertor("model", _ModelName())
        return [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._list_models, methods=["GET"]),
            Route("/v1/models/{name:model}", self._get_model, methods=["GET"]),
        ]

    async def _chat(self, request: Request) -> Response:
        calls: OwnCalls = request.app.state.own_calls
        identity = new_request_id(request.headers.get(REQUEST_ID))
        headers = {REQUEST_ID: identity}
        max_tokens_field = MAX_TOKENS_FIELDS[0]
        try:
            content = await _read_body(request, calls.max_body_bytes)
            chat = await off_loop_if_large(len(content), read_chat, content, self._settings, self._urls)
            del content  # not held as long as the answer lasts
            max_tokens_field = chat.max_tokens_field
            until_s = _until_s(timeout_of(request))
            leaving = asyncio.ensure_future(gone(request))
            streaming = False
            try:
                head = self._head(identity, chat.request.model)
                await _unless(leaving, self._fetch_images(chat, calls.max_body_bytes, until_s))
                timeout_s = None if until_s is None else max(0.001, until_s - time.perf_counter())
                answers = calls.many(
                    _GENERATE,
                    chat.request,
                    vision_service_pb2.GenerateResponse,
                    metadata_of(request, identity),
                    timeout_s,
                )
                leaving.add_done_callback(lambda _: answers.cancel())
                if chat.streams:
                    response = await _stream(answers, chat, head, leaving, headers)
                    streaming = True
                    return response
                summary = await _whole(answers)
                head = self._head(identity, summary.model)
                return JSONResponse(writing.completion(head, summary), headers=headers)
            except asyncio.CancelledError:
                if leaving.done():
                    return Response(status_code=499)  # the caller has left; nobody reads this
                raise
            finally:
                if not streaming:
                    leaving.cancel()
        except ServiceError as error:
            return _failed(error, headers, max_tokens_field)
        except ClientDisconnect:
            return Response(status_code=499)

    async def _fetch_images(self, chat: Chat, max_bytes: int, until_s: float | None) -> None:
        if not chat.remote_images:
            return
        try:
            async with (
                asyncio.timeout(None if until_s is None else until_s - time.perf_counter()),
                asyncio.TaskGroup() as fetches,
            ):
                fetched = [
                    (remote, fetches.create_task(self._urls.fetch(remote.url, remote.field)))
                    for remote in chat.remote_images
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        except TimeoutError as error:
            raise from_exception(error) from None
        for remote, fetch in fetched:
            remote.image.content = fetch.result()
        if (size_bytes := chat.request.ByteSize()) > max_bytes:
            raise InvalidField(
                "messages",
                f"has {size_bytes:,} bytes with its images fetched; the limit is {max_bytes:,}.",
                "Send fewer or smaller images, or raise SERVING_MAX_MESSAGE_BYTES on the server.",
            )

    def _head(self, identity: str, name: str) -> writing.Head:
        """The model is told by its own name; a name that is not among them as it was asked for."""
        for info in self._infos():
            if info.task is Task.GENERATE and (name in (info.name, *info.aliases) if name else info.is_default):
                return writing.Head(identity, int(time.time()), info.name, info.card.version if info.card else "")
        return writing.Head(identity, int(time.time()), name, "")

    async def _list_models(self, request: Request) -> Response:
        async def read(calls: OwnCalls, identity: str) -> dict[str, Any]:
            listed = await calls.one(
                _LIST_MODELS,
                model_service_pb2.ListModelsRequest(),
                model_service_pb2.ListModelsResponse,
                metadata_of(request, identity),
                timeout_of(request),
            )
            return {**to_dict(listed), "object": "list", "data": writing.model_entries(listed, self._started_s)}

        return await self._tell_of_models(request, read)

    async def _get_model(self, request: Request) -> Response:
        name = request.path_params["name"]

        async def read(calls: OwnCalls, identity: str) -> dict[str, Any]:
            found = await calls.one(
                _GET_MODEL,
                model_service_pb2.GetModelRequest(name=name),
                model_service_pb2.GetModelResponse,
                metadata_of(request, identity),
                timeout_of(request),
            )
            return {**to_dict(found), **writing.model_entry(name, self._started_s)}

        return await self._tell_of_models(request, read)

    async def _tell_of_models(
        self, request: Request, read: Callable[[OwnCalls, str], Coroutine[Any, Any, dict[str, Any]]]
    ) -> Response:
        identity = new_request_id(request.headers.get(REQUEST_ID))
        headers = {REQUEST_ID: identity}
        leaving = asyncio.ensure_future(gone(request))
        try:
            values = await _unless(leaving, read(request.app.state.own_calls, identity))
            return JSONResponse(values, headers=headers)
        except ServiceError as error:
            google, openai = error_body(to_status(error, self._domain)), writing.error_body(error)
            body = {"error": {**openai["error"], **google["error"]}}
            return JSONResponse(body, status_code=HTTP_STATUS[error.code], headers=_with_retry(error, headers))
        except asyncio.CancelledError:
            if leaving.done():
                return Response(status_code=499)
            raise
        finally:
            leaving.cancel()


async def _stream(
    answers: _Answers, chat: Chat, head: writing.Head, leaving: asyncio.Future[None], headers: dict[str, str]
) -> Response:
    """Server-sent events; an error before the first message is still an ordinary error response."""
    messages = aiter(answers)
    first = await anext(messages)
    with_usage, max_tokens_field = chat.includes_usage, chat.max_tokens_field  # not the chat, which has the images

    async def events() -> AsyncIterator[bytes]:
        try:
            yield _event(writing.chunk(head, {"role": "assistant", "content": ""}, includes_usage=with_usage))
            message = first
            while message.WhichOneof("message") == "delta":
                yield _event(writing.chunk(head, {"content": message.delta.text}, includes_usage=with_usage))
                message = await anext(messages)
            yield _event(writing.last_chunk(head, message.summary, includes_usage=with_usage))
            if with_usage:
                yield _event(writing.usage_chunk(head, message.summary))
            yield _DONE
        except ServiceError as error:
            yield _event(writing.error_body(error, max_tokens_field))
        finally:
            leaving.cancel()
            answers.cancel()

    return StreamingResponse(events(), media_type="text/event-stream", headers={**headers, **_STREAM_HEADERS})


async def _whole(answers: _Answers) -> vision_service_pb2.GenerateSummary:
    """The last message of a Generate, which has all of its text."""
    async for message in answers:
        if message.WhichOneof("message") == "summary":
            return message.summary
    raise RuntimeError("a generation ended without its summary")


async def _read_body(request: Request, max_body_bytes: int) -> bytes:
    """Like serving's, but no client shall send again what is too large, as OpenAI's do with RESOURCE_EXHAUSTED's status."""
    try:
        return await read_body(request, max_body_bytes)
    except ServiceError as error:
        raise ServiceError(
            Code.INVALID_ARGUMENT, error.reason, error.message, cure=error.cure, metadata=error.metadata, field="body"
        ) from None


async def _unless(leaving: asyncio.Future[None], work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """What the work returns; when the caller leaves before, it is cancelled."""
    task = asyncio.ensure_future(work)
    cancel: Callable[[object], object] = lambda _: task.cancel()  # noqa: E731  # removed below, so it needs a name
    leaving.add_done_callback(cancel)
    try:
        return await task
    finally:
        leaving.remove_done_callback(cancel)


def _until_s(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.perf_counter() + timeout_s


def _event(values: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(values, ensure_ascii=False).translate(_LINE_ENDS)}\n\n".encode()


def _failed(error: ServiceError, headers: dict[str, str], max_tokens_field: str) -> Response:
    body = writing.error_body(error, max_tokens_field)
    return JSONResponse(body, status_code=HTTP_STATUS[error.code], headers=_with_retry(error, headers))


def _with_retry(error: ServiceError, headers: dict[str, str]) -> dict[str, str]:
    return headers if error.retry_after_s is None else {**headers, "retry-after": retry_after(error.retry_after_s)}
