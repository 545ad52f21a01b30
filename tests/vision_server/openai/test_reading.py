"""Chat JSON of any form becomes a GenerateRequest, or an error that names what was wrong."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from ai4thai.vision.v1 import generation_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import Code, ServiceError
from vision_server.openai.image_urls import ImageUrls
from vision_server.openai.reading import Chat, read_chat
from vision_server.openai.writing import error_body
from vision_server.settings import VisionSettings

SETTINGS = VisionSettings(max_image_bytes=1000, image_url_hosts="cdn.example")
PIXELS = base64.b64encode(b"a picture").decode()
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXELS}", "detail": "high"}}
LINK = {"type": "image_url", "image_url": {"url": "https://cdn.example/x.png"}}
MESSAGES = [
    {"role": "developer", "content": "Be short."},
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "อะไร"}], "name": "Mali"},
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None},
    {"role": "user", "content": [LINK, {"type": "text", "text": "And this?"}]},
]
WHOLE = {
    "model": "shapes-describer",
    "messages": MESSAGES,
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 20,
    "temperature": 1,
    "top_p": 0.5,
    "seed": 7,
    "stop": ["a", "b"],
    "user": "somebody",
    "metadata": {"a": "b"},
}


def read(values: object) -> Chat:
    urls = ImageUrls(SETTINGS.image_hosts, SETTINGS.max_image_bytes)
    return read_chat(json.dumps(values).encode(), SETTINGS, urls)


def refused(values: object) -> dict[str, Any]:
    """OpenAI's error object."""
    with pytest.raises(ServiceError) as caught:
        read(values)
    assert caught.value.code is Code.INVALID_ARGUMENT
    error: dict[str, Any] = error_body(caught.value)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def test_a_chat_becomes_a_request() -> None:
    chat = read(WHOLE)
    assert (chat.streams, chat.includes_usage, chat.max_tokens_field) == (True, True, "max_tokens")
    request = chat.request
    assert request.model == "shapes-describer"
    options = request.options
    assert (options.max_new_tokens, options.temperature, options.top_p, options.seed) == (20, 1, 0.5, 7)
    assert list(options.stop) == ["a", "b"]
    system, first, answer, second = request.messages
    assert [message.role for message in request.messages] == [
        generation_pb2.ROLE_SYSTEM,
        generation_pb2.ROLE_USER,
        generation_pb2.ROLE_ASSISTANT,
        generation_pb2.ROLE_USER,
    ]
    assert [part.text for part in system.parts] == ["Be short."]
    assert first.parts[0].image.content == b"a picture"
    assert first.parts[1].text == "อะไร"
    # An answer that had no text is an empty one: a message without parts would be refused.
    assert [part.WhichOneof("part") for part in answer.parts] == ["text"]
    (remote,) = chat.remote_images
    assert (str(remote.url), remote.field) == ("https://cdn.example/x.png", "messages[3].content[0].image_url.url")
    remote.image.content = b"fetched"
    assert second.parts[0].image.content == b"fetched"


def test_what_is_left_out_is_left_to_generate() -> None:
    chat = read({"messages": [{"role": "user", "content": "Hello"}], "model": None, "stop": None, "seed": None})
    assert (chat.request.model, chat.streams, chat.includes_usage) == ("", False, False)
    options = chat.request.options
    assert not any(options.HasField(name) for name in ("max_new_tokens", "temperature", "top_p", "seed"))
    assert not options.stop
    assert not read({"messages": MESSAGES, "stop": []}).request.options.stop


@pytest.mark.parametrize(
    ("given", "tokens", "field"),
    [
        ({"max_tokens": 3}, 3, "max_tokens"),
        ({"max_completion_tokens": 4}, 4, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": None}, 3, "max_tokens"),
        ({"max_tokens": 5.0}, 5, "max_tokens"),
    ],
)
def test_both_names_of_the_token_limit_are_read(given: dict[str, Any], tokens: int, field: str) -> None:
    chat = read({"messages": MESSAGES, **given})
    assert (chat.request.options.max_new_tokens, chat.max_tokens_field) == (tokens, field)


HARMLESS: list[dict[str, Any]] = [
    {"n": 1},
    {"n": None, "tools": None, "tool_choice": None, "response_format": None, "logprobs": None},
    {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
    {"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "frequency_penalty": 0.0, "presence_penalty": 0},
    {"user": 5, "store": True, "service_tier": "flex", "metadata": [], "reasoning_effort": "low", "new": {"x": [1]}},
    {"stream": None, "stream_options": None, "stop": None},
]


@pytest.mark.parametrize("given", HARMLESS, ids=lambda given: " ".join(given))
def test_what_changes_nothing_is_ignored(given: dict[str, Any]) -> None:
    asked = {"messages": MESSAGES}
    assert read({**asked, **given}) == read(asked)


TOOL = {"type": "function", "function": {"name": "f"}}
NOT_SERVED: list[tuple[str, Any]] = [
    ("n", 2),
    ("n", True),
    ("tools", [TOOL]),
    ("tool_choice", "auto"),
    ("functions", [{"name": "f"}]),
    ("function_call", "auto"),
    ("web_search_options", {}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("logprobs", True),
    ("top_logprobs", 3),
    ("logit_bias", {"5": 1}),
    ("frequency_penalty", 0.1),
    ("presence_penalty", -1),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy"}),
    ("verbosity", "low"),
]


@pytest.mark.parametrize(("field", "value"), NOT_SERVED, ids=lambda value: str(value)[:40])
def test_what_would_change_the_answer_and_is_not_served_is_refused(field: str, value: object) -> None:
    error = refused({"messages": MESSAGES, field: value})
    assert (error["param"], error["code"]) == (field, "invalid_field")
    assert error["message"].startswith(f"{field} is ")
    assert "does not serve" in error["message"]


USER = {"role": "user", "content": "Hello"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": "Hello"}, "messages"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [TOOL]}]}, "messages[1].tool_calls"),
    ({"messages": [USER, {"role": "assistant", "function_call": {}}]}, "messages[1].function_call"),
    ({"messages": [USER, {"role": "assistant", "audio": {"id": "x"}}]}, "messages[1].audio"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": False}, USER]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]}]},
        "messages[0].content[0].image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    ({"messages": [{"role": "user", "content": "half \ud800 a pair"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [PICTURE] * 9}]}, "messages"),
    ({"messages": [{"role": "user", "content": [LINK] * 5}] * 2}, "messages"),
    ({"messages": [USER] * 40_000 + [{"role": "user", "content": [{}] * 40_000}]}, "messages"),
    ({"messages": [USER], "model": 0}, "model"),
    ({"messages": [USER], "model": "\udfff"}, "model"),
    ({"messages": [USER], "stream": "true"}, "stream"),
    ({"messages": [USER], "stream": 1}, "stream"),
    ({"messages": [USER], "stream_options": True}, "stream_options"),
    ({"messages": [USER], "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"messages": [USER], "max_tokens": "20"}, "max_tokens"),
    ({"messages": [USER], "max_tokens": True}, "max_tokens"),
    ({"messages": [USER], "max_tokens": 1.5}, "max_tokens"),
    ({"messages": [USER], "max_tokens": 1 << 31}, "max_tokens"),
    ({"messages": [USER], "max_completion_tokens": float("inf")}, "max_completion_tokens"),
    ({"messages": [USER], "seed": 1 << 63}, "seed"),
    ({"messages": [USER], "seed": "7"}, "seed"),
    ({"messages": [USER], "temperature": "hot"}, "temperature"),
    ({"messages": [USER], "temperature": False}, "temperature"),
    ({"messages": [USER], "top_p": 10**400}, "top_p"),
    ({"messages": [USER], "stop": 5}, "stop"),
    ({"messages": [USER], "stop": ["a", None]}, "stop[1]"),
]


@pytest.mark.parametrize(
    ("values", "param"), WRONG, ids=[f"{number}-{param}" for number, (_, param) in enumerate(WRONG)]
)
def test_what_does_not_fit_is_named(values: dict[str, Any], param: str) -> None:
    error = refused(values)
    assert error["param"] == param
    assert error["message"].startswith(f"{param} ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"nonsense", b"[]", b"5", b"\xff\xfe\xff", b'{"a": 1e', b"[" * 100_000, b"9" * 5000]
)
def test_a_body_that_is_no_object_is_told_so(content: bytes) -> None:
    urls = ImageUrls((), 1000)
    if not content:  # an empty object, whose messages are missed by Generate
        assert not read_chat(content, SETTINGS, urls).request.messages
        return
    with pytest.raises(ServiceError) as caught:
        read_chat(content, SETTINGS, urls)
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, "MESSAGE_UNREADABLE")
    assert "messages" in caught.value.cure


def test_long_values_are_cut_in_errors() -> None:
    assert len(refused({"messages": [{"role": "x" * 100_000, "content": ""}]})["message"]) < 300
    assert len(refused({"messages": [USER], "tools": [TOOL] * 10_000})["message"]) < 600


# ---- any JSON in any place

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)  # half surrogate pairs too
    | st.sampled_from(
        ["user", "text", "image_url", "data:image/png;base64,QUJD", "https://cdn.example/", "http://[", "auto"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "url"]), inner)
    ),
    max_leaves=8,
)
FIELDS = [*WHOLE, *(field for field, _ in NOT_SERVED), "max_completion_tokens"]


@st.composite
def chats(draw: st.DrawFn) -> Any:
    """A right chat with another JSON value in one or more places, at any depth."""
    chat = json.loads(json.dumps(WHOLE))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = chat
        while True:
            keys: list[Any] = (
                [*place, draw(st.sampled_from(FIELDS))] if isinstance(place, dict) else list(range(len(place)))
            )
            key = draw(st.sampled_from(keys)) if keys else 0
            inner = place.get(key) if isinstance(place, dict) else place[key] if keys else None
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if isinstance(place, dict) or keys:
                place[key] = draw(JSON)
            break
    return chat


@settings(max_examples=200, deadline=None)
@given(chats() | JSON)
def test_any_json_in_any_place_is_read_or_refused(values: object) -> None:
    try:
        chat = read(values)
    except ServiceError as error:
        assert error.code is Code.INVALID_ARGUMENT
        body = error_body(error)["error"]
        assert body["param"]
        assert len(json.dumps(body, ensure_ascii=False).encode()) < 2000  # also: no half pair in it
    else:
        assert chat.request.FromString(chat.request.SerializeToString()) == chat.request or _has_nan(chat)


def _has_nan(chat: Chat) -> bool:
    return chat.request.options.temperature != chat.request.options.temperature or (
        chat.request.options.top_p != chat.request.options.top_p
    )


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        read_chat(content, SETTINGS, ImageUrls((), 1000))
    except ServiceError as error:
        assert error.code is Code.INVALID_ARGUMENT
