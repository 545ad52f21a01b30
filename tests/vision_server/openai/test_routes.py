"""What happens between an HTTP request and Generate: errors before and within the stream, time, callers who leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ai4thai.vision.v1 import generation_pb2, model_service_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from starlette.applications import Starlette

from serving.errors import Code, ServiceError
from vision_server.openai.routes import OpenAIRoutes
from vision_server.results import Card, ModelInfo, ModelState, Task
from vision_server.settings import VisionSettings

CARD = Card("v7", Task.GENERATE, "transformers", "fp32", "cpu", (), 144, 1)
INFOS = (
    ModelInfo("eyes", Task.DETECT, ModelState.READY, 1.0, is_default=True),
    ModelInfo("mouth", Task.GENERATE, ModelState.READY, 1.0, is_default=True, card=CARD, aliases=("live",)),
)
SUMMARY = pb.GenerateSummary(
    text="a\u2028b",
    finish_reason=generation_pb2.FINISH_REASON_LENGTH,
    usage=generation_pb2.Usage(prompt_tokens=5, image_tokens=3, completion_tokens=2),
    model="mouth",
)
ASK = {"messages": [{"role": "user", "content": "Hello"}]}
FULL = ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "Full.", cure="Wait.", retry_after_s=2.2)
BROKEN = ServiceError(Code.INTERNAL, "INTERNAL", "It broke.")


class Scripted:
    """Stands for serving.http_calls.OwnCalls: `said` are deltas, a summary, or the error that ends the call."""

    max_body_bytes = 5000

    def __init__(self, *said: str | pb.GenerateSummary | ServiceError | None) -> None:
        self.said = said
        self.request = pb.GenerateRequest()
        self.timeout_s: float | None = None
        self.cancelled = asyncio.Event()

    def many(
        self, path: str, message: pb.GenerateRequest, answer: object, metadata: object, timeout_s: float | None
    ) -> Scripted:
        assert path == "/ai4thai.vision.v1.VisionService/Generate"
        self.request, self.timeout_s = message, timeout_s
        return self

    async def one(self, path: str, *_: object) -> model_service_pb2.ListModelsResponse:
        raise self.said[0]  # type: ignore[misc]

    def cancel(self) -> None:
        self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[pb.GenerateResponse]:
        for one in self.said:
            if one is None:  # waits until the caller leaves
                await self.cancelled.wait()
                raise asyncio.CancelledError
            if isinstance(one, ServiceError):
                raise one
            if isinstance(one, str):
                yield pb.GenerateResponse(delta=pb.GenerateDelta(text=one))
            else:
                yield pb.GenerateResponse(summary=one)


def app_of(calls: Scripted, **settings: Any) -> Starlette:
    routes = OpenAIRoutes(VisionSettings(**settings), lambda: INFOS, "vision.ai4thai")
    routes.start()
    app = Starlette(routes=routes.routes())
    app.state.own_calls = calls
    return app


async def post(calls: Scripted, body: object, headers: dict[str, str] | None = None, **settings: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app_of(calls, **settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post("/v1/chat/completions", json=body, headers=headers)


def events(answer: httpx.Response) -> list[Any]:
    """The data of each event; what is no JSON (`[DONE]`) as text."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *blocks, end = answer.content.split(b"\n\n")
    assert end == b""
    assert all(block.startswith(b"data: ") for block in blocks)
    texts = [block.removeprefix(b"data: ").decode() for block in blocks]
    return [json.loads(text) if text.startswith("{") else text for text in texts]


async def test_a_stream_has_a_head_pieces_an_end_and_its_usage() -> None:
    asked = {**ASK, "model": "live", "stream": True, "stream_options": {"include_usage": True}}
    answer = await post(Scripted("a", "\u2028b", SUMMARY), asked, {"x-request-id": "r1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "r1")
    assert "\u2028" not in answer.text  # a line's end to some readers of events
    *chunks, done = events(answer)
    assert done == "[DONE]"
    for chunk in chunks:
        assert (chunk["id"], chunk["object"], chunk["model"]) == ("chatcmpl-r1", "chat.completion.chunk", "mouth")
        assert chunk["system_fingerprint"] == "v7"
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "\u2028b"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"image_tokens": 3, "cached_tokens": 0},
    }


async def test_an_error_before_the_first_piece_is_a_response() -> None:
    for stream in (False, True):
        answer = await post(Scripted(FULL), {**ASK, "stream": stream})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        assert answer.json() == {
            "error": {
                "message": "Full. Wait.",
                "type": "rate_limit_error",
                "param": None,
                "code": "rate_limit_exceeded",
            }
        }


async def test_an_error_within_the_stream_is_its_last_event() -> None:
    calls = Scripted("a", BROKEN)
    *chunks, last = events(await post(calls, {**ASK, "stream": True}))
    assert chunks[-1]["choices"][0]["delta"] == {"content": "a"}
    assert "usage" not in chunks[-1]
    error = {"message": "It broke.", "type": "server_error", "param": None, "code": "internal"}
    assert last == {"error": error}
    assert calls.cancelled.is_set()


@pytest.mark.parametrize(
    ("field", "given", "param"),
    [
        ("options.max_new_tokens", {"max_tokens": 9}, "max_tokens"),
        ("options.max_new_tokens", {"max_completion_tokens": 9}, "max_completion_tokens"),
        ("options.top_p", {}, "top_p"),
        ("options.stop", {}, "stop"),
        ("messages[2].parts", {}, "messages[2].content"),
        ("messages[2].parts[1].image", {}, "messages[2].content[1].image_url.url"),
        ("messages[2].role", {}, "messages[2].role"),
        ("x-priority", {}, "x-priority"),
    ],
)
async def test_fields_have_openais_names(field: str, given: dict[str, Any], param: str) -> None:
    error = ServiceError(Code.INVALID_ARGUMENT, "INVALID_FIELD", f"{field} is ROLE_SYSTEM.", cure="Else.", field=field)
    for stream in (False, True):
        answer = await post(Scripted(error), {**ASK, **given, "stream": stream})
        assert answer.status_code == 400
        assert answer.json()["error"] == {
            "message": f'{param} is "system". Else.',
            "type": "invalid_request_error",
            "param": param,
            "code": "invalid_field",
        }


async def test_a_body_that_is_too_large_is_not_to_be_sent_again() -> None:
    answer = await post(Scripted(), {"messages": [{"role": "user", "content": "x" * 5000}]})
    assert answer.status_code == 400  # not 429, which OpenAI's clients repeat
    assert "5000 bytes" in answer.json()["error"]["message"]


async def test_the_time_and_the_bytes_of_fetching_count() -> None:
    async def slow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n" + bytes(900))

    server = await asyncio.start_server(slow, "127.0.0.1", 0)
    place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    part = {"type": "image_url", "image_url": {"url": f"http://{place}/"}}
    asked = {"messages": [{"role": "user", "content": [part]}]}
    calls = Scripted(SUMMARY)

    answer = await post(calls, asked, {"x-server-timeout": "0.05"}, image_url_hosts=place)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert not calls.request.messages  # Generate was never asked

    answer = await post(calls, asked, {"x-server-timeout": "5"}, image_url_hosts=place)
    assert answer.status_code == 200
    assert calls.request.messages[0].parts[0].image.content == bytes(900)
    assert calls.timeout_s is not None
    assert 0 < calls.timeout_s < 4.9

    # The JSON fits into a message, with the image fetched it does not.
    calls.max_body_bytes = 800
    answer = await post(calls, asked, image_url_hosts=place)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "800" in answer.json()["error"]["message"]
    server.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["fetching", "before the first piece", "within the answer"])
async def test_a_caller_who_leaves_ends_the_call(stream: bool, when: str) -> None:
    hung_up = asyncio.Event()
    asked_for_the_image = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked_for_the_image.set()
        while await reader.read(1000):
            pass
        hung_up.set()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    url = f"http://{place}/"
    content: Any = [{"type": "image_url", "image_url": {"url": url}}] if when == "fetching" else "Hello"
    calls = Scripted(None) if when == "before the first piece" else Scripted("a", None)
    app = app_of(calls, image_url_hosts=place)
    body = json.dumps({"messages": [{"role": "user", "content": content}], "stream": stream}).encode()
    left = asyncio.Event()
    read = False

    async def receive() -> Any:
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 5),
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    serving = asyncio.ensure_future(app(scope, receive, send))
    async with asyncio.timeout(5):
        if when == "fetching":
            await asked_for_the_image.wait()
        await asyncio.sleep(0.05)
        assert not serving.done()
        left.set()
        assert (await asyncio.wait([serving], timeout=3))[0]  # not by this test's own time limit
        if when == "fetching":
            await hung_up.wait()
            assert not calls.request.messages
        else:
            assert calls.cancelled.is_set()
    server.close()
    streamed = stream and when == "within the answer"
    assert [message["status"] for message in sent if "status" in message] == [200 if streamed else 499]


async def test_errors_about_models_are_read_by_both_kinds_of_clients() -> None:
    error = ServiceError(Code.UNAVAILABLE, "DRAINING", "Going.", retry_after_s=1)
    transport = httpx.ASGITransport(app_of(Scripted(error)))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for path in ("/v1/models", "/v1/models/llava-hf/llava-1.5-7b-hf", "/v1/models/llava-hf%2Fllava-1.5-7b-hf"):
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            said = answer.json()["error"]
            assert (said["code"], said["status"], said["details"][0]["reason"]) == (503, "UNAVAILABLE", "DRAINING")
            assert (said["message"], said["type"], said["param"]) == ("Going.", "server_error", None)
