"""POST /v1/media and GET /v1/media/{media_id}:download: files as they are, through the server's own UploadMedia and GetMedia."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ai4thai.queue.v1 import queue_service_pb2 as pb
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from queue_server.errors import DOMAIN, InvalidField
from queue_server.media.calls import WANTED
from serving.errors import Code, ServiceError
from serving.http1 import unhurried
from serving.http_calls import Answers, OwnCalls, metadata_of, timeout_of
from serving.interceptors import REQUEST_ID, new_request_id
from serving.transcoding import failure, to_dict

_UPLOAD = "/ai4thai.queue.v1.QueueService/UploadMedia"
_GET = "/ai4thai.queue.v1.QueueService/GetMedia"
# The body comes in pieces of 64 KB; a message costs the same whatever its size, up to the contract's 1 MiB.
_CHUNK_BYTES = 512 << 10
# What curl says of --data-binary when it is told nothing: no file is meant.
_NO_TYPE = "application/x-www-form-urlencoded"
_RANGE = re.compile(r"bytes=(?:(?P<begin>\d{1,18})-(?P<last>\d{0,18})|-(?P<tail>\d{1,18}))")


def media_routes() -> list[BaseRoute]:
    """PUT is what `curl -T` sends."""
    return [
        Route("/v1/media", _upload, methods=["POST", "PUT"]),
        Route("/v1/media/{media_id}:download", _download, methods=["GET"]),
    ]


async def _upload(request: Request) -> Response:
    calls: OwnCalls = request.app.state.own_calls
    identity = new_request_id(request.headers.get(REQUEST_ID))
    headers = {REQUEST_ID: identity}
    try:
        config = _read_config(request)
        # UploadMedia itself gives up what does not come, so that a large file may take longer than other requests.
        with unhurried(request.scope):
            answer = await calls.gather(
                _UPLOAD,
                _messages(request, config),
                pb.UploadMediaResponse,
                metadata_of(request, identity),
                timeout_of(request),
                wanted=WANTED,
            )
        return JSONResponse(to_dict(answer), headers=headers)
    except ClientDisconnect:
        return Response(status_code=499)
    except ServiceError as error:
        return failure(error, DOMAIN, headers)


def _read_config(request: Request) -> pb.UploadMediaConfig:
    content_type = request.headers.get("content-type", "")
    if content_type.startswith("multipart/"):
        raise InvalidField(
            "content-type",
            "The body is a form, not the file itself.",
            cure="Send the bytes alone: `curl -T video.mp4`, or `--data-binary @video.mp4` with their content-type.",
        )
    length = request.headers.get("content-length", "0")
    return pb.UploadMediaConfig(
        content_type="" if content_type == _NO_TYPE else content_type,
        size_bytes=int(length) if length.isascii() and length.isdigit() else 0,
    )


async def _messages(request: Request, config: pb.UploadMediaConfig) -> AsyncIterator[pb.UploadMediaRequest]:
    yield pb.UploadMediaRequest(config=config)
    pieces = bytearray()
    async for piece in request.stream():
        pieces += piece
        if len(pieces) >= _CHUNK_BYTES:
            yield pb.UploadMediaRequest(chunk=bytes(pieces))
            pieces.clear()
    if pieces:
        yield pb.UploadMediaRequest(chunk=bytes(pieces))


async def _download(request: Request) -> Response:
    identity = new_request_id(request.headers.get(REQUEST_ID))
    headers = {REQUEST_ID: identity}
    answers = _ask(request, identity, 0)
    streaming = False
    try:
        messages = aiter(answers)
        file = (await anext(messages)).media
        etag = f'"{file.media_id}"'
        headers |= {
            "etag": etag,
            "accept-ranges": "bytes",
            "content-disposition": f'attachment; filename="{_name(file)}"',
            # A browser must not take it for a page of ours, whatever its sender called it.
            "x-content-type-options": "nosniff",
        }
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        wanted = _read_range(request, etag, file.size_bytes)
        headers |= {"content-type": file.content_type, "content-length": str(wanted.end - wanted.begin)}
        if wanted.partial:
            headers["content-range"] = f"bytes {wanted.begin}-{wanted.end - 1}/{file.size_bytes}"
        status_code = 206 if wanted.partial else 200
        if request.method == "HEAD":
            return Response(status_code=status_code, headers=headers)
        if wanted.begin:
            answers.cancel()
            answers = _ask(request, identity, wanted.begin)
            messages = aiter(answers)
            await anext(messages)
        streaming = True
        return StreamingResponse(_body(answers, messages, wanted), status_code, headers)
    except ServiceError as error:
        response = failure(error, DOMAIN, headers)
        if error.code is Code.OUT_OF_RANGE:
            response.status_code = 416
            response.headers["content-range"] = f"bytes */{error.metadata['size_bytes']}"
        return response
    finally:
        if not streaming:
            answers.cancel()


def _ask(request: Request, identity: str, offset_bytes: int) -> Answers[pb.GetMediaResponse]:
    calls: OwnCalls = request.app.state.own_calls
    return calls.many(
        _GET,
        pb.GetMediaRequest(media_id=request.path_params["media_id"], offset_bytes=offset_bytes),
        pb.GetMediaResponse,
        metadata_of(request, identity),
        timeout_of(request),
    )


@dataclass(frozen=True)
class _Wanted:
    begin: int
    end: int
    partial: bool


def _read_range(request: Request, etag: str, size_bytes: int) -> _Wanted:
    """What the Range header asks for. One that has several ranges, or another unit, asks for all: RFC 9110 leaves it to us."""
    whole = _Wanted(0, size_bytes, partial=False)
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    if found is None or request.headers.get("if-range", etag) != etag:
        return whole
    if found["tail"]:
        begin, end = max(0, size_bytes - int(found["tail"])), size_bytes
    else:
        begin = int(found["begin"])
        end = min(int(found["last"]) + 1, size_bytes) if found["last"] else size_bytes
        if found["last"] and int(found["last"]) < begin:
            return whole
    if begin >= size_bytes:
        raise ServiceError(
            Code.OUT_OF_RANGE,
            "INVALID_FIELD",
            f"The file has {size_bytes} bytes; there is nothing from {begin} on.",
            field="range",
            metadata={"size_bytes": size_bytes},
        )
    return _Wanted(begin, end, partial=True)


async def _body(
    answers: Answers[pb.GetMediaResponse], messages: AsyncIterator[pb.GetMediaResponse], wanted: _Wanted
) -> AsyncIterator[bytes]:
    left_bytes = wanted.end - wanted.begin
    try:
        while left_bytes:
            chunk = (await anext(messages)).chunk[:left_bytes]
            left_bytes -= len(chunk)
            yield chunk
    finally:
        answers.cancel()


def _name(file: pb.Media) -> str:
    return file.media_id.removeprefix("sha256:")[:16] + (mimetypes.guess_extension(file.content_type) or "")
