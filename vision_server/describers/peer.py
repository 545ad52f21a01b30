"""Speaks with an OpenAI-compatible server (vLLM, SGLang, llama.cpp, another vision server): its models, and answers as they come.

    PeerError
    ├── PeerAway        cannot be reached, hung up, or said nothing for too long
    ├── PeerRefused     answered with an HTTP error, or with an error in the stream
    └── PeerUnreadable  answered something else than the OpenAI API does

httpx and the few lines of server-sent events that a chat needs, not the `openai` package: a piece of an answer takes 0.05 ms of
the event loop this way and 0.3 ms as that package's models, with which 64 answers at 50 tokens a second would fill a core.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vision_server.results import Usage

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 5.0
_MODELS_S = 5.0
# uvicorn, and so vLLM, closes a connection that has been idle for 5 s; one that is let go sooner is never found closed.
_KEEP_IDLE_S = 3.0
_MAX_LINE_BYTES = 1 << 20
_MAX_MODELS_BYTES = 4 << 20
_MAX_ERROR_BYTES = 1 << 16
_MAX_MESSAGE_CHARS = 500
_MAX_RETRY_AFTER_S = 3600.0
_MAX_TOKENS = 2**31 - 1
# Words of errors: another vision server's on its way out, then OpenAI's.
_STATUSES = {"draining": 503, "invalid_request_error": 400, "rate_limit_error": 429}


class PeerError(Exception):
    """The other server did not answer as wanted; the text is a sentence's end: `http://… cannot be reached`."""


class PeerAway(PeerError):
    """It cannot be reached, hung up, or said nothing for too long."""


class PeerUnreadable(PeerError):
    """It answered something else than the OpenAI API does."""


class PeerRefused(PeerError):
    """It answered with an error; `status` is HTTP's, `said` its own words."""

    def __init__(self, url: str, status: int, said: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{url} answered {status}: {said}" if said else f"{url} answered {status}")
        self.status = status
        self.said = said
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """A piece of an answer; what it says nothing of is empty or None."""

    text: str = ""
    finish_reason: str = ""
    usage: Usage | None = None


class Peer:
    """One server. open() may run in any thread, everything else belongs to one event loop.

    `silence_s`: a server that says nothing for this long is given up. `max_answers`: connections kept for the next answers.
    """

    def __init__(self, base_url: str, *, api_key: str, silence_s: float, max_answers: int) -> None:
        self.url = base_url
        self._api_key = api_key
        self._silence_s = silence_s
        self._max_answers = max_answers
        self._client: httpx.AsyncClient | None = None

    def open(self) -> None:
        """Makes the client; opens no connection. Blocks for 0.1 to 0.3 s: imports, and certificates are read."""
        import httpx

        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            # The key goes to the server that the operator named, and not to where that one points.
            follow_redirects=False,
            timeout=httpx.Timeout(self._silence_s, connect=_CONNECT_S, pool=None),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=self._max_answers, keepalive_expiry=_KEEP_IDLE_S
            ),
        )

    async def close(self) -> None:
        """Closes its connections."""
        if self._client is not None:
            await self._client.aclose()

    async def models(self) -> tuple[str, ...]:
        """The ids of its models. Raises PeerError, after 5 s at the latest."""
        url = f"{self.url}/models"
        try:
            async with asyncio.timeout(_MODELS_S):
                with self._translated():
                    async with self._opened.stream("GET", url) as response:
                        if response.status_code != 200:
                            raise await _refusal(url, response)
                        content = await _read(response, _MAX_MODELS_BYTES)
        except TimeoutError:
            raise PeerAway(f"{url} did not answer within {_MODELS_S:g} s") from None
        try:
            listed = json.loads(content)["data"]
            return tuple(str(model["id"]) for model in listed)
        except (ValueError, KeyError, TypeError):
            raise PeerUnreadable(f"{url} does not list models as the OpenAI API does") from None

    async def answer(self, body: bytes, headers: Mapping[str, str]) -> AsyncGenerator[AnswerEvent, None]:
        """The events of a chat completion that streams; closing it closes the connection, at which the server stops.

        Raises PeerError.
        """
        url = f"{self.url}/chat/completions"
        with self._translated():
            async with self._opened.stream(
                "POST", url, content=body, headers={"Content-Type": "application/json", **headers}
            ) as response:
                if response.status_code != 200:
                    raise await _refusal(url, response)
                kind = response.headers.get("content-type", "")
                if not kind.startswith("text/event-stream"):
                    raise PeerUnreadable(f"{url} answered {kind or 'something without a type'} and no stream of events")
                async with aclosing(_data(url, response.aiter_bytes())) as events:
                    async for data in events:
                        if data.startswith(b"[DONE]"):
                            return
                        yield _event(url, data)

    @property
    def _opened(self) -> httpx.AsyncClient:
        assert self._client is not None, "open() comes first"
        return self._client

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """httpx's errors as ours, in words for the operator."""
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise PeerAway(f"{self.url} cannot be reached: {_reason(error)}") from error
        except httpx.TimeoutException as error:
            raise PeerAway(f"{self.url} said nothing for {self._silence_s:g} s") from error
        except httpx.TransportError as error:
            raise PeerAway(f"{self.url} hung up: {_reason(error)}") from error
        except httpx.HTTPError as error:
            raise PeerUnreadable(f"{self.url} is not understood: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    """The body, or its beginning."""
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) >= max_bytes:
            break
    return bytes(content[:max_bytes])


async def _data(url: str, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """What stands behind each `data:`; the OpenAI API puts an event on one line, and everything else is passed over.

    Lines are found in bytes: a JSON string may hold characters that Python too counts as line ends (U+2028).
    """
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        *lines, rest = buffer.split(b"\n") if b"\n" in chunk else (buffer,)
        for line in lines:
            if line.startswith(b"data:"):
                yield bytes(line[5:]).strip()
        buffer = rest
        if len(buffer) > _MAX_LINE_BYTES:
            raise PeerUnreadable(f"{url} sent a line of more than {_MAX_LINE_BYTES:,} bytes")


def _event(url: str, data: bytes) -> AnswerEvent:
    """Reads one event. Raises PeerUnreadable, and PeerRefused where it tells of an error."""
    try:
        event = json.loads(data)
        if (error := event.get("error")) is not None:
            raise PeerRefused(url, _status(error), _said(event))
        usage = None if event.get("usage") is None else _usage(event["usage"])
        choice = next(iter(event.get("choices") or ()), None)
        if choice is None:
            return AnswerEvent(usage=usage)
        text = (choice.get("delta") or {}).get("content") or ""
        finish_reason = choice.get("finish_reason") or ""
    except (ValueError, AttributeError, TypeError):
        raise PeerUnreadable(f"{url} sent an event that is none of the OpenAI API: {_clipped(repr(data))}") from None
    if not isinstance(text, str) or not isinstance(finish_reason, str):
        raise PeerUnreadable(f"{url} sent a piece of an answer that is no text: {_clipped(repr(data))}")
    return AnswerEvent(text, finish_reason, usage)


def _usage(usage: dict[str, Any]) -> Usage:
    """Tokens as the server counts them; `image_tokens` only some tell, our own among them."""
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        _count(usage.get("prompt_tokens")), _count(details.get("image_tokens")), _count(usage.get("completion_tokens"))
    )


def _count(value: object) -> int:
    return min(max(value, 0), _MAX_TOKENS) if isinstance(value, int) else 0


async def _refusal(url: str, response: httpx.Response) -> PeerRefused:
    """What an answer that is not 200 says."""
    content = await _read(response, _MAX_ERROR_BYTES)
    try:
        said = _said(json.loads(content))
    except ValueError:
        said = _clipped(content.decode(errors="replace"))
    return PeerRefused(url, response.status_code, said, _retry_after_s(response.headers.get("retry-after", "")))


def _said(body: object) -> str:
    """The message of an error: `{"error": {"message": …}}` or an older or simpler form of it."""
    for key in ("error", "message", "detail"):
        if not isinstance(body, dict):
            break
        if key in body:
            body = body[key] if not isinstance(body[key], dict) else body[key].get("message", body[key])
    return _clipped(body if isinstance(body, str) else json.dumps(body, ensure_ascii=False))


def _status(error: object) -> int:
    """The HTTP status that an error in a stream would have had: vLLM's `code` is one, others tell a word; else 500."""
    if not isinstance(error, dict):
        return 500
    code = error.get("code")
    if isinstance(code, int) and 400 <= code <= 599:
        return code
    return next(
        (_STATUSES[word] for word in (code, error.get("type")) if isinstance(word, str) and word in _STATUSES), 500
    )


def _retry_after_s(told: str) -> float | None:
    """The seconds of a Retry-After; None: it has none (its other form, a date, is not used by these servers)."""
    try:
        seconds = float(told)
    except ValueError:
        return None
    return min(seconds, _MAX_RETRY_AFTER_S) if math.isfinite(seconds) and seconds >= 0 else None


def _clipped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_MESSAGE_CHARS else f"{text[:_MAX_MESSAGE_CHARS]}…"
