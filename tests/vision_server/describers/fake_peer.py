"""An OpenAI-compatible server of the tests' own, on a port: it answers as vLLM does, or fails as it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "typhoon2-vision"


class FakePeer:
    """What it answers is set by the test; what it was asked is kept."""

    def __init__(self) -> None:
        self.models: list[str] = [MODEL, "another"]
        self.key = ""
        self.chunks: Sequence[str] = ("A ", "red ", "circle", ".")
        self.finish_reason = "stop"
        self.usage: dict[str, Any] | None = {
            "prompt_tokens": 40,
            "total_tokens": 44,
            "completion_tokens": 4,
            "prompt_tokens_details": {"image_tokens": 36},
        }
        self.refusal: Callable[[], Response] | None = None
        """Instead of an answer."""
        self.before_chunk: Callable[[int], Awaitable[object]] | None = None
        """Awaited before the chunk of this number; it may wait or raise."""
        self.tail: Iterable[str] | None = None
        """What stands in the stream in the place of its end, as it is."""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.looks = 0
        self.lost_looks = 0
        """So many looks at the models to come fail."""
        self.running = 0
        self.left = 0
        """Answers whose caller closed the connection before their end."""
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakePeer]:
        """Serves until the block ends; the second time on the same port."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes),
            host="127.0.0.1",
            port=self.port,
            log_level="critical",
            timeout_graceful_shutdown=0,
        )
        server = uvicorn.Server(config)
        server.capture_signals = nullcontext  # type: ignore[method-assign,assignment]  # they are the test runner's
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  # it offers nothing else to wait for
            await asyncio.sleep(0.005)
        self.port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.should_exit = True
            await task

    async def _models(self, request: Request) -> Response:
        self.looks += 1
        if self.lost_looks:
            self.lost_looks -= 1
            return Response(status_code=503)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "Unauthorized", "code": 401}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _chat(self, request: Request) -> Response:
        self.asked.append(json.loads(await request.body()))
        self.headers.append(dict(request.headers))
        if self.refusal is not None:
            return self.refusal()
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        self.running += 1
        whole = False
        try:
            yield _event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            for number, chunk in enumerate(self.chunks):
                if self.before_chunk is not None:
                    await self.before_chunk(number)
                yield _event({"delta": {"content": chunk}, "finish_reason": None})
            if self.tail is not None:
                for text in self.tail:
                    await asyncio.sleep(0)  # so that an endless one ends with the connection
                    yield text
                return
            yield _event({"delta": {}, "finish_reason": self.finish_reason})
            if self.usage is not None:
                yield _event(None, usage=self.usage)
            whole = True
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
            self.left += not whole


def _event(choice: dict[str, Any] | None, **more: Any) -> str:
    choices = [] if choice is None else [{"index": 0, "logprobs": None, **choice}]
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": choices}
    return f"data: {json.dumps({**event, **more}, ensure_ascii=False)}\n\n"


def error(status: int, message: str, **headers: str) -> Callable[[], Response]:
    """A refusal in OpenAI's shape."""
    body = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
    return lambda: JSONResponse(
        body, status, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
