"""The `openai` package, as it comes, and curl against the vision server's chat completions and models."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ai4thai.vision.v1 import generation_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from tests.end_to_end.calling import Server
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.foreign_programs import output_of
from tests.end_to_end.picture_host import SAMPLES
from tests.end_to_end.slowing import slowed
from vision_server.shapes.questions import answer
from vision_server.shapes.scenes import Shape

SCENE = SAMPLES / "scene-01.jpg"
HOW_MANY = {"en": "How many shapes are there?", "th": "มีรูปทรงกี่ชิ้น"}
DESCRIBE = {"en": "Describe the picture.", "th": "อธิบายภาพนี้"}
MODEL = "shapes-describer"


def data_uri(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def asking(text: str, *images: Path | str) -> Any:
    """The messages of one question about pictures (files, or URLs)."""
    urls = [data_uri(image) if isinstance(image, Path) else image for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def client_of(server: Server) -> openai.OpenAI:
    """It tries each request once: repeating would hide what is looked for here."""
    http_client = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        base_url=f"http://{server.address}/v1", api_key="any", max_retries=0, timeout=60, http_client=http_client
    )


@pytest.fixture(scope="module")
def client(vision: Server) -> Iterator[openai.OpenAI]:
    with client_of(vision) as client:
        yield client


@pytest.fixture
async def async_client(vision: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"http://{vision.address}/v1", api_key="any", max_retries=0, timeout=60, http_client=http_client
    ) as client:
        yield client


@pytest.fixture(scope="module")
def wholes(client: openai.OpenAI) -> dict[str, ChatCompletion]:
    """The description of the first sample in each language, to its own end."""
    return {
        language: client.chat.completions.create(model=MODEL, messages=asking(text, SCENE))
        for language, text in DESCRIBE.items()
    }


def text_of(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


# ---- answers


def test_answers_about_the_samples_are_right(client: openai.OpenAI) -> None:
    samples = json.loads((SAMPLES / "samples.json").read_text("utf-8"))["samples"]

    def right(sample: dict[str, Any], language: str) -> bool:
        shapes = tuple(Shape(one["label"], one["colour"], tuple(one["box"]), (), (0, 0, 0)) for one in sample["shapes"])
        completion = client.chat.completions.create(
            model="", messages=asking(HOW_MANY[language], SAMPLES / sample["file"])
        )
        return text_of(completion) == answer("total", language, shapes)

    with ThreadPoolExecutor(4) as callers:
        for language in HOW_MANY:
            marks = list(callers.map(lambda sample, language=language: right(sample, language), samples))
            assert sum(marks) >= 0.8 * len(samples), (language, marks)


@pytest.mark.parametrize("language", DESCRIBE)
def test_a_completion_is_whole(wholes: dict[str, ChatCompletion], language: str) -> None:
    whole = wholes[language]
    assert text_of(whole).startswith("There are 4 shapes" if language == "en" else "มีรูปทรง 4 ชิ้น")
    assert (whole.object, whole.model) == ("chat.completion", MODEL)
    assert whole.id == f"chatcmpl-{whole._request_id}"  # the server's log has the same
    assert whole.system_fingerprint
    (choice,) = whole.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    usage = whole.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.prompt_tokens_details.model_dump()["image_tokens"] < usage.prompt_tokens


@pytest.mark.parametrize("language", DESCRIBE)
def test_a_stream_joins_to_the_completion(
    client: openai.OpenAI, wholes: dict[str, ChatCompletion], language: str
) -> None:
    whole = wholes[language]
    stream = client.chat.completions.create(
        model=MODEL, messages=asking(DESCRIBE[language], SCENE), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len(pieces) >= 7
    assert "".join(pieces) == text_of(whole)
    assert not any(piece and piece[0] in "ัิีึืฺุู็่้๊๋์ํ๎" for piece in pieces)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {(chunk.id, chunk.model, chunk.system_fingerprint) for chunk in (*chunks, last)} == {
        (last.id, MODEL, whole.system_fingerprint)
    }


async def test_the_async_client_gets_the_same(
    async_client: openai.AsyncOpenAI, wholes: dict[str, ChatCompletion]
) -> None:
    create = async_client.chat.completions.create
    messages = {language: asking(text, SCENE) for language, text in DESCRIBE.items()}
    both = await asyncio.gather(*(create(model="", messages=messages[language]) for language in DESCRIBE))
    assert [text_of(one) for one in both] == [text_of(wholes[language]) for language in DESCRIBE]
    stream = await create(model="", messages=messages["th"], stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == text_of(wholes["th"])


def test_a_conversation_about_two_pictures_is_what_generate_gets(
    vision: Server, client: openai.OpenAI, wholes: dict[str, ChatCompletion]
) -> None:
    files = (SCENE, SAMPLES / "scene-02.jpg")
    said = text_of(wholes["en"])
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Answer shortly."},
            *asking(DESCRIBE["en"], files[0]),
            {"role": "assistant", "content": said},
            *asking(DESCRIBE["th"], files[1]),
        ],
    )
    part, message = generation_pb2.MessagePart, generation_pb2.Message
    pictures = [part(image=image_pb2.Image(content=file.read_bytes())) for file in files]
    request = pb.GenerateRequest(
        messages=[
            message(role=generation_pb2.ROLE_SYSTEM, parts=[part(text="Answer shortly.")]),
            message(role=generation_pb2.ROLE_USER, parts=[pictures[0], part(text=DESCRIBE["en"])]),
            message(role=generation_pb2.ROLE_ASSISTANT, parts=[part(text=said)]),
            message(role=generation_pb2.ROLE_USER, parts=[pictures[1], part(text=DESCRIBE["th"])]),
        ]
    )
    *_, last = vision.vision.Generate(request, timeout=60)
    assert text_of(completion) == last.summary.text
    usage = completion.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens == last.summary.usage.prompt_tokens
    assert usage.prompt_tokens_details.model_dump()["image_tokens"] == last.summary.usage.image_tokens
    one = wholes["en"].usage
    assert one is not None and one.prompt_tokens_details is not None
    assert last.summary.usage.image_tokens == 2 * one.prompt_tokens_details.model_dump()["image_tokens"]


def test_options_shape_the_answer(client: openai.OpenAI, wholes: dict[str, ChatCompletion]) -> None:
    def ask(**options: Any) -> ChatCompletion:
        completion: ChatCompletion = client.chat.completions.create(
            model=MODEL, messages=asking(DESCRIBE["en"], SCENE), **options
        )
        return completion

    whole = text_of(wholes["en"])
    for name in ("max_tokens", "max_completion_tokens"):
        short = ask(**{name: 4})
        assert short.choices[0].finish_reason == "length"
        assert short.usage is not None and short.usage.completion_tokens == 4
        assert whole.startswith(text_of(short)) and len(text_of(short)) < len(whole)
    for stop in (" and ", ["never said", " and "]):
        stopped = ask(stop=stop)
        assert (text_of(stopped), stopped.choices[0].finish_reason) == (whole.partition(" and ")[0], "stop")
    seeded = [text_of(ask(temperature=2, seed=seed)) for seed in range(5)]
    assert seeded == [text_of(ask(temperature=2, seed=seed)) for seed in range(5)]
    assert len(set(seeded)) > 1
    assert text_of(ask(temperature=2, top_p=0.01, seed=1)) == text_of(ask(temperature=0)) == whole


# ---- errors

BROKEN_PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(50)).decode()
REFUSED: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str, str]] = {
    "unknown model": ({"model": "nobody"}, openai.NotFoundError, "model", "model_not_found"),
    "a detector": ({"model": "shapes-detector"}, openai.BadRequestError, "model", "wrong_task"),
    "a model not loaded": ({"model": "shapes-pose"}, openai.BadRequestError, "model", "model_unloaded"),
    "no messages": ({"messages": []}, openai.BadRequestError, "messages", "invalid_field"),
    "the assistant last": (
        {"messages": [{"role": "assistant", "content": "x"}]},
        openai.BadRequestError,
        "messages[0].role",
        "invalid_field",
    ),
    "no content": (
        {"messages": [{"role": "user", "content": []}]},
        openai.BadRequestError,
        "messages[0].content",
        "invalid_field",
    ),
    "system within": (
        {"messages": [*asking("x"), {"role": "system", "content": "x"}, *asking("x")]},
        openai.BadRequestError,
        "messages[1].role",
        "invalid_field",
    ),
    "too many tokens": ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens", "invalid_field"),
    "no tokens": ({"max_completion_tokens": 0}, openai.BadRequestError, "max_completion_tokens", "invalid_field"),
    "hot": ({"temperature": 2.5}, openai.BadRequestError, "temperature", "invalid_field"),
    "no top_p": ({"top_p": 0}, openai.BadRequestError, "top_p", "invalid_field"),
    "empty stop": ({"stop": [""]}, openai.BadRequestError, "stop", "invalid_field"),
    "two answers": ({"n": 2}, openai.BadRequestError, "n", "invalid_field"),
    "JSON": ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "invalid_field"),
    "a broken image": (
        {"messages": asking("x", BROKEN_PNG)},
        openai.BadRequestError,
        "messages[0].content[0].image_url.url",
        "image_unreadable",
    ),
    "a web address": (
        {"messages": asking("x", "http://169.254.169.254/latest/meta-data/")},
        openai.BadRequestError,
        "messages[0].content[0].image_url.url",
        "invalid_field",
    ),
    "a file": (
        {"messages": asking("x", "file:///etc/passwd")},
        openai.BadRequestError,
        "messages[0].content[0].image_url.url",
        "invalid_field",
    ),
    "the assistant's image": (
        {"messages": [{**asking("x", SCENE)[0], "role": "assistant"}, *asking("x")]},
        openai.BadRequestError,
        "messages[0].content[0].image_url.url",
        "invalid_field",
    ),
    "a long text": ({"messages": asking("word " * 20_000)}, openai.BadRequestError, "messages", "invalid_field"),
    "a prompt over the context": (
        {"messages": asking("word " * 3_000)},
        openai.BadRequestError,
        "messages",
        "context_length_exceeded",
    ),
    "a priority": (
        {"extra_headers": {"x-priority": "first"}},
        openai.BadRequestError,
        "x-priority",
        "invalid_field",
    ),
    "a timeout": (
        {"extra_headers": {"x-server-timeout": "soon"}},
        openai.BadRequestError,
        "x-server-timeout",
        "message_unreadable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_raises_the_right_error(client: openai.OpenAI, name: str, stream: bool) -> None:
    given, kind, param, code = REFUSED[name]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(
            **{"model": MODEL, "messages": asking("Hello", SCENE), **given, "stream": stream}
        )
    assert type(caught.value) is kind
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    message = caught.value.body["message"]  # type: ignore[index]
    assert len(message) > 20
    # OpenAI's names, not those of the proto.
    assert not any(word in message for word in ("options.", ".parts", "ROLE_", "max_new_tokens", "Traceback"))


def test_a_deadline_is_kept(vision: Server, client: openai.OpenAI) -> None:
    with slowed(vision.process.pid, 10), pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=asking("Hello", SCENE), extra_headers={"x-server-timeout": "0.01"}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


BODIES = [b"", b"{", b"[]", b'"x"', b"null", b"\xff\x00", b"[" * 100_000, b'{"messages": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("body", [*BODIES, b" " * (65 << 20)], ids=lambda body: repr(body[:12]))
def test_a_body_that_cannot_be_read_is_a_bad_request(vision: Server, body: bytes) -> None:
    said = vision.web.post("/v1/chat/completions", content=body)
    assert said.status_code == 400
    assert set(said.json()["error"]) == {"message", "type", "param", "code"}


# ---- callers who leave


TOKENS = "ai4thai_generated_tokens_total"
TRIES = 6  # on a busy machine the answer may be there before its caller could leave


def cancelled(vision: Server) -> float:
    return vision.metric("ai4thai_generations_total", finish_reason="cancelled")


def was_cancelled(vision: Server, before: float) -> bool:
    """Whether the generation was cancelled; in any case, nothing runs any more."""
    wait_until("the call has ended", lambda: vision.vision_calls_in_flight == 0)
    wait_until("nothing runs", lambda: vision.metric("ai4thai_running_generations") == 0)
    return cancelled(vision) > before


def test_a_stream_that_is_closed_ends_the_generation(vision: Server, client: openai.OpenAI) -> None:
    before = cancelled(vision)
    for _ in range(TRIES):
        with slowed(vision.process.pid, 20):
            stream = client.chat.completions.create(model=MODEL, messages=asking(DESCRIBE["th"], SCENE), stream=True)
            assert next(stream).choices[0].delta.role == "assistant"
            stream.close()
        if was_cancelled(vision, before):
            return
    pytest.fail("no generation was cancelled")


async def test_a_request_that_is_cancelled_ends_the_generation(
    vision: Server, async_client: openai.AsyncOpenAI
) -> None:
    before = cancelled(vision)
    for _ in range(TRIES):
        tokens_before = vision.metric(TOKENS)
        with slowed(vision.process.pid, 20):
            running = asyncio.ensure_future(
                async_client.chat.completions.create(model=MODEL, messages=asking(DESCRIBE["th"], SCENE))
            )
            await asyncio.to_thread(wait_until, "it runs", lambda before=tokens_before: vision.metric(TOKENS) > before)
            running.cancel()
            await asyncio.wait([running])
        if was_cancelled(vision, before):
            return
    pytest.fail("no generation was cancelled")


# ---- models


def test_models_that_can_chat_are_listed_beside_ours(vision: Server, client: openai.OpenAI) -> None:
    listed = client.models.list()
    assert [(model.id, model.object, model.owned_by) for model in listed] == [(MODEL, "model", "ai4thai")]
    body = vision.web.get("/v1/models").json()
    assert {"shapes-detector", MODEL} <= {model["name"] for model in body["models"]}
    retrieved = client.models.retrieve(MODEL)
    assert (retrieved.id, retrieved.created) == (MODEL, next(iter(listed)).created)
    assert vision.web.get(f"/v1/models/{MODEL}").json()["model"]["state"] == "MODEL_STATE_READY"
    with pytest.raises(openai.NotFoundError, match="no model 'nobody/at-all'"):
        client.models.retrieve("nobody/at-all")


@pytest.fixture
def alias(vision: Server) -> Iterator[str]:
    """A name that programs were written with, for the describer as long as the test lasts."""
    vision.web.post(f"/v1/models/{MODEL}:load", json={"aliases": ["gpt-4o"]}).raise_for_status()
    yield "gpt-4o"
    for verb in ("unload", "load"):  # aliases last until the model is unloaded
        vision.web.post(f"/v1/models/{MODEL}:{verb}", json={}).raise_for_status()


def test_an_alias_is_a_model_too(client: openai.OpenAI, alias: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, alias]
    assert client.models.retrieve(alias).id == alias
    completion = client.chat.completions.create(model=alias, messages=asking(HOW_MANY["en"], SCENE))
    assert (text_of(completion), completion.model) == ("There are 4.", MODEL)
    stream = client.chat.completions.create(model=alias, messages=asking(HOW_MANY["en"], SCENE), stream=True)
    assert {chunk.model for chunk in stream} == {MODEL}


# ---- curl


def test_curl_reads_the_events(vision: Server, wholes: dict[str, ChatCompletion]) -> None:
    body = json.dumps({"messages": asking(DESCRIBE["th"], SCENE), "stream": True})
    url = f"http://{vision.address}/v1/chat/completions"
    text = output_of("curl", "-sSN", "--noproxy", "*", "-m", "60", "-d", "@-", url, stdin=body)
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text_of(wholes["th"])
    assert "ส" in text  # a person can read it


# ---- images by URL


@pytest.fixture
def fetching(client: openai.OpenAI, pictures_at: str) -> tuple[openai.OpenAI, str]:
    """A client of a server that may fetch pictures from one host, and that host."""
    return client, pictures_at


def test_images_come_from_the_hosts_that_are_named_alone(fetching: tuple[openai.OpenAI, str]) -> None:
    client, place = fetching
    port = place.rpartition(":")[2]

    def ask(url: str) -> str:
        return text_of(client.chat.completions.create(model="", messages=asking(HOW_MANY["en"], url)))

    assert ask(f"http://{place}/scene-01.jpg") == "There are 4."
    for url, says in (
        (f"http://localhost:{port}/scene-01.jpg", "does not fetch from"),
        (f"http://{place}@localhost:{port}/scene-01.jpg", "a user's name"),
        (f"http://{place}/moved", f"{place} answered 302 when asked for the image. Redirects are not followed."),
        (f"http://{place}/missing.jpg", f"{place} answered 404"),
        (f"http://{place}/samples.json", "The bytes are no image"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(says)) as caught:
            ask(url)
        assert caught.value.param == "messages[0].content[0].image_url.url"


# ---- whatever is sent

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["user", "system", "text", "image_url", MODEL, "data:image/png;base64,QUJD", "http://x.example/", "\ud800"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image_url", "url"]), inner, max_size=4)
    ),
    max_leaves=6,
)
FIELDS = [
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.sampled_from([*FIELDS, "n", "tools", "user"]), VALUES, max_size=4),
    message=st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system"]) | VALUES, "content": st.text(max_size=5) | VALUES}
    ),
)
def test_whatever_is_sent_is_answered_or_refused(vision: Server, values: dict[str, Any], message: Any) -> None:
    body = json.dumps({"messages": [message], "max_tokens": 2, **values}).encode()
    said = vision.web.post("/v1/chat/completions", content=body, timeout=httpx.Timeout(30))
    assert said.status_code in (200, 400, 404), (body, said.text)
    if said.status_code != 200:
        assert set(said.json()["error"]) == {"message", "type", "param", "code"}
    elif said.headers["content-type"] == "application/json":
        assert said.json()["object"] == "chat.completion"
    else:
        assert said.text.endswith("data: [DONE]\n\n")
