"""The pictures that a chat names by URL: data URIs, and files on hosts that the operator allows."""

from __future__ import annotations

import asyncio
import binascii
import reprlib
from collections.abc import Iterable
from urllib.parse import unquote

import httpx

from vision_server.errors import ImageEmpty, ImageTooLarge, ImageUnreadable, InvalidField

FETCH_S = 10.0
"""Seconds that one file may take, its wait for a turn included."""
MAX_FETCHES = 8
"""Files fetched at once, in the whole server."""

_HEADER_LENGTH = 512  # characters before the comma of a data URI
_SHOWN_LENGTH = 80
_DEFAULT_PORTS = {"http": 80, "https": 443}
_BLANKS = " \t\n\r\f"
_WITHOUT_BLANKS = str.maketrans("", "", _BLANKS)
_PIECE_LENGTH = 1 << 18  # a multiple of 4: characters of whole groups
_SEND_DATA = "Send the image itself: data:image/jpeg;base64,…"
_URL_SETTING = "VISION_IMAGE_URL_HOSTS"
# No compression: a small file could unpack to any size.
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "ai4thai-vision"}


def shown(value: object) -> str:
    """A value as an error may quote it, cut to a few dozen characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN_LENGTH else f"{value[:_SHOWN_LENGTH]}…")
    return reprlib.repr(value)


def is_data_uri(url: str) -> bool:
    """Whether it begins as one; the scheme's case does not matter."""
    return url[:5].lower() == "data:"


def read_data_uri(uri: str, field: str, max_bytes: int) -> bytes:
    """The bytes of `data:image/…;base64,…` (RFC 2397); parameters are allowed, percent-encoding and blanks too.

    Only base64 is read, of either alphabet, with or without its padding. Raises InvalidField, ImageEmpty, ImageTooLarge (from its
    length, before it is decoded).
    """
    header, comma, _ = uri[:_HEADER_LENGTH].partition(",")
    if not comma:
        raise InvalidField(
            field, f"is a data: URI without a comma in its first {_HEADER_LENGTH} characters.", _SEND_DATA
        )
    media, *parameters = (word.strip() for word in header[5:].split(";"))
    if not media.lower().startswith("image/"):
        raise InvalidField(field, f"is a data: URI of the type {shown(media)}, not of an image.", _SEND_DATA)
    if not parameters or parameters[-1].lower() != "base64":
        raise InvalidField(field, "is a data: URI that is not in base64.", _SEND_DATA)
    data = uri[len(header) + 1 :]
    if "%" in data:
        data = unquote(data)
    if any(blank in data for blank in _BLANKS):
        data = data.translate(_WITHOUT_BLANKS)
    data = data.rstrip("=").replace("-", "+").replace("_", "/")
    size_bytes = len(data) * 3 // 4
    if size_bytes > max_bytes:
        raise _too_large(size_bytes, max_bytes, field)
    content = _decoded(data)
    if content is None:
        raise InvalidField(field, "is a data: URI whose base64 is broken.", "Send the whole file in base64.")
    if not content:
        raise ImageEmpty(field)
    return content


def _decoded(data: str) -> bytes | None:
    """Base64 without padding as bytes; None: it is broken.

    Piece by piece, since binascii holds the interpreter: 20 MB at once would keep the event loop waiting for a tenth of a second.
    """
    if "=" in data:
        return None
    pieces = (data[start : start + _PIECE_LENGTH] for start in range(0, len(data), _PIECE_LENGTH))
    try:
        # Not base64.b64decode(validate=True), whose regular expression takes longer than all the rest.
        return b"".join(binascii.a2b_base64(piece + "=" * (-len(piece) % 4), strict_mode=True) for piece in pieces)
    except ValueError:  # binascii.Error is one; so is what non-ASCII letters raise
        return None


class ImageUrls:
    """Fetches images from the hosts that the operator names and from no others."""

    def __init__(self, hosts: Iterable[str], max_image_bytes: int) -> None:
        self._allowed = frozenset(map(_place, hosts))
        self._max_bytes = max_image_bytes
        self._turns = asyncio.Semaphore(MAX_FETCHES)
        self._transport: httpx.AsyncHTTPTransport | None = None

    def start(self) -> None:
        """Makes ready to fetch, where any host is allowed."""
        if self._allowed:
            # The bare transport: a client would keep one caller's cookies for the next, and could follow redirects.
            self._transport = httpx.AsyncHTTPTransport(
                limits=httpx.Limits(max_connections=MAX_FETCHES), trust_env=False
            )

    async def stop(self) -> None:
        """Closes its connections."""
        if self._transport is not None:
            await self._transport.aclose()

    def check(self, text: str, field: str) -> httpx.URL:
        """The URL, when it may be fetched. What is checked is the very object that is fetched: nothing reads it twice.

        Raises InvalidField.
        """
        try:
            url = httpx.URL(text)
            host = url.raw_host.decode("ascii")
        except (httpx.InvalidURL, ValueError):
            raise InvalidField(field, f"is {shown(text)}, which is no URL.", _SEND_DATA) from None
        default_port = _DEFAULT_PORTS.get(url.scheme)
        if default_port is None or not host:
            raise InvalidField(field, f"is {shown(text)}, which is neither a data: nor an http(s) URL.", _SEND_DATA)
        if url.userinfo:
            raise InvalidField(field, "has a user's name or password before its host.", "Leave them out.")
        port = default_port if url.port is None else url.port
        if (host, port) in self._allowed or (port == default_port and (host, None) in self._allowed):
            return url
        raise InvalidField(
            field,
            f"names the host {shown(_shown_place(url))}, which this server does not fetch from.",
            f"{_SEND_DATA} (Which hosts it fetches from is the operator's setting {_URL_SETTING}.)",
        )

    async def fetch(self, url: httpx.URL, field: str) -> bytes:
        """The file; `url` is from check(). Raises ImageUnreadable, ImageTooLarge, ImageEmpty."""
        assert self._transport is not None, "check() lets nothing pass where no host is allowed"
        place = _shown_place(url)
        try:
            async with asyncio.timeout(FETCH_S), self._turns:
                return await self._read(self._transport, url, place, field)
        except TimeoutError:
            raise ImageUnreadable(f"{place} did not send the image within {FETCH_S:g} s.", _SEND_DATA, field) from None
        except httpx.HTTPError as error:
            problem = f"{place} could not be asked for the image ({type(error).__name__})."
            raise ImageUnreadable(problem, _SEND_DATA, field) from None

    async def _read(self, transport: httpx.AsyncHTTPTransport, url: httpx.URL, place: str, field: str) -> bytes:
        timeouts = {"timeout": httpx.Timeout(FETCH_S).as_dict()}
        response = await transport.handle_async_request(
            httpx.Request("GET", url, headers=_HEADERS, extensions=timeouts)
        )
        try:
            if response.status_code != 200:
                redirects = " Redirects are not followed." if response.is_redirect else ""
                raise ImageUnreadable(
                    f"{place} answered {response.status_code} when asked for the image.{redirects}", _SEND_DATA, field
                )
            told = response.headers.get("content-length", "")
            if told.isdecimal() and len(told) < 20 and int(told) > self._max_bytes:
                raise _too_large(int(told), self._max_bytes, field)
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > self._max_bytes:
                    raise _too_large(len(content), self._max_bytes, field)
            if not content:
                raise ImageEmpty(field)
            return bytes(content)
        finally:
            await response.aclose()


def _place(entry: str) -> tuple[str, int | None]:
    """`cdn.example:8080` → (`cdn.example`, 8080), `[::1]` → (`::1`, None: the scheme's own port)."""
    host, colon, port = entry.rpartition(":")
    if not colon or not port.isdecimal():
        host, port = entry, ""
    return host.strip("[]").lower(), int(port) if port else None


def _shown_place(url: httpx.URL) -> str:
    host = url.raw_host.decode("ascii")
    host = f"[{host}]" if ":" in host else host
    return host if url.port is None else f"{host}:{url.port}"


def _too_large(size_bytes: int, max_bytes: int, field: str) -> ImageTooLarge:
    error = ImageTooLarge(amount=size_bytes, limit=max_bytes, unit="bytes", setting="VISION_MAX_IMAGE_BYTES")
    error.at(field)
    return error
