"""Reads OpenAI's chat JSON into a GenerateRequest; what is wrong, or would change the answer and is not served, is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from ai4thai.vision.v1 import generation_pb2, image_pb2, vision_service_pb2

from serving.http_calls import parse_json
from vision_server.errors import InvalidField
from vision_server.openai.image_urls import ImageUrls, is_data_uri, read_data_uri, shown
from vision_server.settings import VisionSettings

MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens")
"""The newer of OpenAI's names goes before the older."""

_ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "developer": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
}
_NO_TOOLS = "The model calls no tools; leave it out."
_NO_PENALTIES = "Leave it out; temperature, top_p and seed shape the answer."
# What would change the answer and is not served: the values that leave it as it is, besides null, and what to do.
_NOT_SERVED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "n": ((1,), "Ask once for each answer."),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none",), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none",), _NO_TOOLS),
    "web_search_options": ((), _NO_TOOLS),
    "response_format": (({"type": "text"},), "Answers are plain text; ask for a form of them in words."),
    "logprobs": ((False,), "Leave it out; probabilities are not told."),
    "top_logprobs": ((0,), "Leave it out; probabilities are not told."),
    "logit_bias": (({},), _NO_PENALTIES),
    "frequency_penalty": ((0,), _NO_PENALTIES),
    "presence_penalty": ((0,), _NO_PENALTIES),
    "modalities": ((["text"],), "Answers are text; leave it out."),
    "audio": ((), "Answers are text; leave it out."),
    "verbosity": (("medium",), "Leave it out; say in words how long the answer shall be."),
}
_NOT_SERVED_OF_MESSAGES: Mapping[str, tuple[tuple[object, ...], str]] = {
    "tool_calls": (([],), _NO_TOOLS),
    "function_call": ((), _NO_TOOLS),
    "audio": ((), "Send the words of it."),
}


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image that is still to be fetched from `url` into `image`, a part of the request; `field` is its place in the JSON."""

    url: httpx.URL
    field: str
    image: image_pb2.Image


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat completion that is asked for; complete once its `remote_images` are fetched."""

    request: vision_service_pb2.GenerateRequest
    streams: bool
    includes_usage: bool
    """Whether the stream ends with the usage."""
    max_tokens_field: str
    """Which of MAX_TOKENS_FIELDS it uses."""
    remote_images: tuple[RemoteImage, ...]


def read_chat(content: bytes, settings: VisionSettings, urls: ImageUrls) -> Chat:
    """The body of POST /v1/chat/completions. Ranges are checked by Generate itself. Raises ServiceError (INVALID_ARGUMENT)."""
    values = parse_json(content, "Send a JSON object with `messages`.")
    _refuse_not_served(values, _NOT_SERVED, "")
    model = values.get("model")
    request = vision_service_pb2.GenerateRequest(model="" if model is None else _text(model, "model"))
    max_tokens_field = next((name for name in MAX_TOKENS_FIELDS if values.get(name) is not None), MAX_TOKENS_FIELDS[0])
    _read_options(values, request.options, max_tokens_field, settings)
    stream_options = _typed(values, "stream_options", dict, "") or {}
    return Chat(
        request=request,
        streams=bool(_typed(values, "stream", bool, "")),
        includes_usage=bool(_typed(stream_options, "include_usage", bool, "stream_options.")),
        max_tokens_field=max_tokens_field,
        remote_images=_read_messages(_typed(values, "messages", list, "") or [], request, settings, urls),
    )


def _read_options(
    values: Mapping[str, Any], options: generation_pb2.GenerateOptions, max_tokens_field: str, settings: VisionSettings
) -> None:
    if (tokens := _whole_number(values, max_tokens_field, 32)) is not None:
        options.max_new_tokens = tokens
    if (seed := _whole_number(values, "seed", 64)) is not None:
        options.seed = seed
    for name in ("temperature", "top_p"):
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(name, value, "a number")
        try:
            setattr(options, name, float(value))
        except OverflowError:
            raise InvalidField(name, f"is {shown(value)}, which is too large.") from None
    stop = values.get("stop")
    if stop is None:
        return
    if isinstance(stop, str):
        options.stop.append(_text(stop, "stop"))
    elif isinstance(stop, list):
        options.stop.extend(_text(text, f"stop[{index}]") for index, text in enumerate(stop))
    else:
        raise _wrong_type("stop", stop, "a string or a list of strings")


def _read_messages(
    messages: list[Any], request: vision_service_pb2.GenerateRequest, settings: VisionSettings, urls: ImageUrls
) -> tuple[RemoteImage, ...]:
    """Adds them to the request; the images that are still to be fetched come back."""
    _check_counts(messages, settings)
    remote: list[RemoteImage] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _wrong_type(place, message, "an object")
        _refuse_not_served(message, _NOT_SERVED_OF_MESSAGES, f"{place}.")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise InvalidField(f"{place}.role", f"is {shown(role)}.", f"One of {', '.join(_ROLES)}.")
        content = message.get("content")
        if role == "assistant" and not content and isinstance(content, str | list | None):
            content = ""  # an answer that had no text
        turn = request.messages.add(role=_ROLES[role])
        if isinstance(content, str):
            turn.parts.add(text=_text(content, f"{place}.content"))
        elif isinstance(content, list):
            for index, part in enumerate(content):
                _read_part(part, f"{place}.content[{index}]", turn, settings, urls, remote)
        elif content is not None:
            raise _wrong_type(f"{place}.content", content, "a string or a list of parts")
    return tuple(remote)


def _read_part(
    part: Any,
    place: str,
    turn: generation_pb2.Message,
    settings: VisionSettings,
    urls: ImageUrls,
    remote: list[RemoteImage],
) -> None:
    if not isinstance(part, dict):
        raise _wrong_type(place, part, "an object")
    kind = part.get("type")
    if kind == "text":
        turn.parts.add(text=_text(part.get("text"), f"{place}.text"))
        return
    if kind != "image_url":
        raise InvalidField(f"{place}.type", f"is {shown(kind)}.", "Parts of the types text and image_url are read.")
    named = part.get("image_url")
    if not isinstance(named, dict):
        raise _wrong_type(f"{place}.image_url", named, 'an object with a "url"')
    field = f"{place}.image_url.url"
    url = named.get("url")
    if not isinstance(url, str):
        raise _wrong_type(field, url, "a string")
    image = turn.parts.add(image=image_pb2.Image()).image
    if is_data_uri(url):
        image.content = read_data_uri(url, field, settings.max_image_bytes)
    else:
        remote.append(RemoteImage(urls.check(url, field), field, image))


def _check_counts(messages: list[Any], settings: VisionSettings) -> None:
    """Before the first image is decoded or fetched, and before a million empty parts are turned into messages."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)
    if images > settings.max_images_per_request:
        limit = settings.max_images_per_request
        raise InvalidField("messages", f"has {images} images.", f"At most {limit} (VISION_MAX_IMAGES_PER_REQUEST).")
    if (count := len(messages) + len(parts)) > settings.max_text_bytes:
        raise InvalidField(
            "messages",
            f"has {count:,} messages and parts.",
            f"At most {settings.max_text_bytes:,}, one for each byte of text (VISION_MAX_TEXT_BYTES).",
        )


def _refuse_not_served(
    values: Mapping[str, Any], not_served: Mapping[str, tuple[tuple[object, ...], str]], prefix: str
) -> None:
    for name, (harmless, cure) in not_served.items():
        value = values.get(name)
        if value is not None and not any(_same(value, other) for other in harmless):
            raise InvalidField(f"{prefix}{name}", f"is {shown(value)}, which this server does not serve.", cure)


def _same(value: object, other: object) -> bool:
    """Equality that takes 0.0 for 0, but not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _typed(values: Mapping[str, Any], name: str, kind: type, prefix: str) -> Any:
    """The value, None where it is absent or null."""
    value = values.get(name)
    if value is not None and not isinstance(value, kind):
        names = {bool: "true or false", dict: "an object", list: "a list"}
        raise _wrong_type(f"{prefix}{name}", value, names[kind])
    return value


def _whole_number(values: Mapping[str, Any], name: str, bits: int) -> int | None:
    value = values.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some languages have no other numbers
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(name, value, "a whole number")
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise InvalidField(name, f"is {shown(value)}.", f"It has at most {bits} bits.")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(field, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidField(field, "has half of a surrogate pair.", "Send whole characters.") from None
    return value


def _wrong_type(field: str, value: object, wanted: str) -> InvalidField:
    problem = "is missing." if value is None else f"is {shown(value)}."
    return InvalidField(field, problem, f"It must be {wanted}.")
