"""Pictures come from data URIs, and from hosts that the operator named, whatever the URL looks like."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.errors import Code, ServiceError
from vision_server.errors import ImageEmpty, ImageTooLarge, ImageUnreadable, InvalidField
from vision_server.openai import image_urls
from vision_server.openai.image_urls import ImageUrls, is_data_uri, read_data_uri
from vision_server.settings import VisionSettings

FIELD = "messages[0].content[0].image_url.url"
MAX_BYTES = 1000
PIXELS = bytes(range(256))
BASE64 = base64.b64encode(PIXELS).decode()


# ---- data URIs


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/jpeg;base64,{BASE64}",
        f"DATA:image/PNG;BASE64,{BASE64}",
        f"data:image/svg+xml;charset=utf-8;name=x.svg;base64,{BASE64}",
        f"data: image/png ; base64 ,{BASE64}",
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(PIXELS).decode()}",
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        "data:image/png;base64,\n" + "\r\n".join(BASE64[start : start + 76] for start in range(0, len(BASE64), 76)),
    ],
)
def test_a_data_uri_of_any_form_is_read(uri: str) -> None:
    assert is_data_uri(uri)
    assert read_data_uri(uri, FIELD, MAX_BYTES) == PIXELS


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("data:", "without a comma"),
        (f"data:image/png;base64;{BASE64}", "without a comma"),
        ("data:image/png;" + "x" * 600 + ",", "without a comma"),
        (f"data:,{BASE64}", "of the type ''"),
        (f"data:;base64,{BASE64}", "of the type ''"),
        (f"data:text/html;base64,{BASE64}", "of the type 'text/html'"),
        (f"data:application/pdf;base64,{BASE64}", "of the type 'application/pdf'"),
        ("data:image/svg+xml,%3Csvg/%3E", "not in base64"),
        (f"data:image/png;base64;charset=x,{BASE64}", "not in base64"),
        ("data:image/png;base64,A", "is broken"),
        ("data:image/png;base64,AAA=AAA=", "is broken"),
        ("data:image/png;base64,AAA!", "is broken"),
        ("data:image/png;base64,ก", "is broken"),
        ("data:image/png;base64,\ud800AAA", "is broken"),
    ],
)
def test_a_data_uri_that_is_none_is_told_so(uri: str, says: str) -> None:
    with pytest.raises(InvalidField) as caught:
        read_data_uri(uri, FIELD, MAX_BYTES)
    assert caught.value.field == FIELD
    assert says in caught.value.message
    assert "data:image/" in caught.value.cure or "base64" in caught.value.cure


def test_a_large_image_is_whole() -> None:
    content = bytes(range(256)) * 5000
    data = base64.b64encode(content).decode()
    assert read_data_uri(f"data:image/png;base64,{data}", FIELD, len(content)) == content
    for place in (1 << 18, (1 << 18) - 1, len(data) // 2):
        for broken in ("=", "!", "é"):
            with pytest.raises(InvalidField, match="is broken"):
                read_data_uri(f"data:image/png;base64,{data[:place]}{broken}{data[place + 1 :]}", FIELD, len(content))


def test_an_empty_data_uri_is_an_empty_image() -> None:
    for data in ("", "=", "%20", "==="):
        with pytest.raises(ImageEmpty) as caught:
            read_data_uri(f"data:image/png;base64,{data}", FIELD, MAX_BYTES)
        assert caught.value.field == FIELD


def test_a_large_data_uri_is_refused_before_it_is_decoded() -> None:
    for size_bytes in (MAX_BYTES - 1, MAX_BYTES, MAX_BYTES + 1, MAX_BYTES + 2):
        uri = f"data:image/png;base64,{base64.b64encode(bytes(size_bytes)).decode()}"
        if size_bytes <= MAX_BYTES:
            assert read_data_uri(uri, FIELD, MAX_BYTES) == bytes(size_bytes)
            continue
        with pytest.raises(ImageTooLarge) as caught:
            read_data_uri(uri, FIELD, MAX_BYTES)
        assert caught.value.metadata == {"bytes": str(size_bytes), "max_bytes": str(MAX_BYTES)}
        assert caught.value.field == FIELD
    with pytest.raises(ImageTooLarge):  # its base64 is broken as well, which is never looked at
        read_data_uri("data:image/png;base64," + "!" * 5000, FIELD, MAX_BYTES)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=MAX_BYTES), st.sampled_from(["", ";a=b", ";charset=utf-8;x=y"]), st.booleans())
def test_what_is_encoded_comes_back(content: bytes, parameters: str, padded: bool) -> None:
    data = base64.b64encode(content).decode()
    uri = f"data:image/webp{parameters};base64,{data if padded else data.rstrip('=')}"
    assert read_data_uri(uri, FIELD, MAX_BYTES) == content


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["image/png", "image/", ";", "base64", ",", "=", "%", "%41", "A", "/", "+", " ", "\n", "\0", "ก"]
        )
        | st.text(st.characters(codec=None), max_size=3)
    ).map("".join)
)
def test_any_data_uri_is_read_or_refused(rest: str) -> None:
    try:
        content = read_data_uri(f"data:{rest}", FIELD, MAX_BYTES)
    except ServiceError as error:
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, FIELD)
        str(error).encode()
    else:
        assert 0 < len(content) <= MAX_BYTES


# ---- which hosts


URLS = ImageUrls(("cdn.example", "files.example:8080", "[::1]:9000", "Upper.Example", "127.0.0.1"), MAX_BYTES)


@pytest.mark.parametrize(
    "url",
    [
        "https://cdn.example/a.png?b=c#d",
        "http://cdn.example",
        "HTTPS://CDN.EXAMPLE/a.png",
        "https://cdn.example:443/a.png",
        "http://cdn.example:80/a.png",
        "http://files.example:8080/a.png",
        "https://files.example:8080/a.png",
        "http://[::1]:9000/a.png",
        "http://upper.example/",
        "http://127.0.0.1/",
        "http://cdn.example?@evil.example",
        "http://cdn.example#@evil.example",
        "http://cdn.example/@evil.example/../http://evil.example",
    ],
)
def test_a_host_that_is_named_may_be_asked(url: str) -> None:
    checked = URLS.check(url, FIELD)
    # What will be connected to, by the object that the transport is given.
    assert checked.raw_host.decode() in ("cdn.example", "files.example", "::1", "upper.example", "127.0.0.1")


REFUSED_URLS = [
    "http://evil.example/",
    "http://sub.cdn.example/",
    "http://cdn.example.evil.example/",
    "http://xcdn.example/",
    "http://cdn.example./",
    "http://cdn.example:8080/",
    "http://cdn.example:443/",
    "https://cdn.example:80/",
    "http://cdn.example:0/",
    "http://cdn.example:99999/",
    "http://files.example/",
    "https://files.example/",
    "http://files.example:80/",
    "http://[::1]/",
    "http://[::1]:80/",
    "http://[::ffff:127.0.0.1]/",
    "http://[0:0:0:0:0:0:0:1]:9000/",
    "http://[::1%25eth0]:9000/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f.0.0.1/",
    "http://127.0.0.1.nip.io/",
    "http://localhost/",
    "http://169.254.169.254/latest/meta-data/",
    "http://cdn.example@evil.example/",
    "http://cdn.example:80@evil.example/",
    "http://cdn.example\\@evil.example/",
    "http://evil.example\\@cdn.example/",
    "http://evil.example#@cdn.example/",
    "http://evil.example?@cdn.example/",
    "http://evil.example/@cdn.example/",
    "http://user@cdn.example/",
    "http://user:word@cdn.example/",
    "http://cdn%2eexample/",
    "http://cdn.example%00.evil.example/",
    "http://cdn.example;.evil.example/",
    "http://cdn.example\t.evil.example/",
    "http://cdn.example\n@evil.example/",
    "http://cdn.exаmple/",  # a Cyrillic letter
    "http://ｃdn.example/",
    "http://xn--cdn-.example/",
    "http://xn--/",
    "http:cdn.example/",
    "http:///cdn.example/",
    "//cdn.example/",
    "cdn.example/a.png",
    " http://cdn.example/",
    "ftp://cdn.example/",
    "file:///etc/passwd",
    "file://cdn.example/etc/passwd",
    "gopher://cdn.example:80/",
    "unix:///var/run/docker.sock",
    "javascript:alert(1)",
    "blob:http://cdn.example/x",
    "view-source:http://cdn.example/",
    "http://",
    "",
    "http://[",
    "http://[v1.x]/",
    "http://\ud800/",
    "http://cdn.example:80:80/",
    "http://" + "a" * 70_000,
]


@pytest.mark.parametrize("url", REFUSED_URLS, ids=lambda url: repr(url)[:50])
def test_every_other_host_is_refused(url: str) -> None:
    with pytest.raises(InvalidField) as caught:
        URLS.check(url, FIELD)
    assert (caught.value.code, caught.value.field) == (Code.INVALID_ARGUMENT, FIELD)
    assert len(str(caught.value)) < 500
    str(caught.value).encode()


def test_a_refusal_says_which_setting_would_allow_it() -> None:
    with pytest.raises(InvalidField) as caught:
        ImageUrls((), MAX_BYTES).check("https://cdn.example:8443/secret?token=x", FIELD)
    assert "'cdn.example:8443'" in caught.value.message
    assert "VISION_IMAGE_URL_HOSTS" in caught.value.cure
    assert "token" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["http://", "https://", "cdn.example", "evil.example", "@", ":", "80", "/", "\\", "#", "?", "[", "]", "."]
        )
        | st.text(st.characters(codec=None), max_size=2),
        max_size=7,
    ).map("".join)
)
@example("http://cdn.example")
def test_no_url_leads_anywhere_else(url: str) -> None:
    try:
        checked = ImageUrls(("cdn.example",), MAX_BYTES).check(url, FIELD)
    except InvalidField:
        return
    assert checked.scheme in ("http", "https")
    assert checked.raw_host == b"cdn.example"
    assert checked.port in (None, 80 if checked.scheme == "http" else 443)
    assert not checked.userinfo


@pytest.mark.parametrize(
    "listed", ["https://cdn.example", "cdn.example/x", "*", "*.example", "a@b", "a:b", "a b", "::1", "a:"]
)
def test_the_setting_takes_hosts_only(listed: str) -> None:
    with pytest.raises(ValidationError, match="is no host"):
        VisionSettings(image_url_hosts=f"fine.example,{listed}")


def test_the_setting_is_a_list() -> None:
    assert VisionSettings(image_url_hosts=" a.example, [::1]:80 ,b:8080,").image_hosts == (
        "a.example",
        "[::1]:80",
        "b:8080",
    )
    assert VisionSettings().image_hosts == ()


# ---- fetching


Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def fetching(peer: Peer) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """What fetches `/picture` from a host that behaves as `peer` says, which is called once the request has been read."""
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        try:
            await peer(reader, writer)
        except ConnectionError:
            pass  # it has seen enough
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    urls = ImageUrls((f"127.0.0.1:{port}",), MAX_BYTES)
    urls.start()

    async def fetch() -> bytes:
        content = await urls.fetch(urls.check(f"http://127.0.0.1:{port}/picture?size=5", FIELD), FIELD)
        assert "get /picture?size=5 http/1.1" in asked[-1]
        assert f"host: 127.0.0.1:{port}" in asked[-1]
        assert "accept-encoding: identity" in asked[-1]
        assert "cookie" not in asked[-1]
        return content

    try:
        yield fetch
    finally:
        await urls.stop()
        server.close()


def saying(*chunks: bytes) -> Peer:
    async def peer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()

    return peer


def ok(*headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "connection: close", "", ""]).encode()


async def test_an_image_is_fetched() -> None:
    async with fetching(saying(ok("content-length: 256", "set-cookie: a=b"), PIXELS)) as fetch:
        assert await fetch() == PIXELS
        assert await fetch() == PIXELS  # without the cookie
    async with fetching(saying(ok("transfer-encoding: chunked"), b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")) as fetch:
        assert await fetch() == b"abcde"


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        ("404 Not Found", "", "answered 404"),
        ("500 Oops", "", "answered 500"),
        ("204 No Content", "", "answered 204"),
        ("206 Partial Content", "content-length: 0\r\n", "answered 206"),
        ("302 Found", "location: http://169.254.169.254/\r\n", "answered 302 when asked for the image. Redirects"),
        ("301 Moved", "location: /elsewhere\r\n", "answered 301 when asked for the image. Redirects"),
        ("401 Unauthorized", 'www-authenticate: Basic realm="x"\r\n', "answered 401"),
    ],
)
async def test_another_status_is_told_with_the_host(status: str, headers: str, says: str) -> None:
    async with fetching(saying(f"HTTP/1.1 {status}\r\n{headers}connection: close\r\n\r\n".encode())) as fetch:
        with pytest.raises(ImageUnreadable) as caught:
            await fetch()
    assert caught.value.message.startswith("127.0.0.1:")
    assert says in caught.value.message
    assert caught.value.field == FIELD


@pytest.mark.parametrize(
    "chunks",
    [
        (b"nonsense\r\n\r\n",),
        (),
        (ok("content-length: 500"), b"too few"),
        (ok("transfer-encoding: chunked"), b"zz\r\n"),
    ],
    ids=["no HTTP", "nothing", "cut short", "bad chunk"],
)
async def test_a_host_that_breaks_off_is_told(chunks: tuple[bytes, ...]) -> None:
    async with fetching(saying(*chunks)) as fetch:
        with pytest.raises(ImageUnreadable, match=r"could not be asked for the image \(RemoteProtocolError\)"):
            await fetch()


async def test_a_host_that_is_not_there_is_told() -> None:
    urls = ImageUrls(("127.0.0.1:1",), MAX_BYTES)
    urls.start()
    with pytest.raises(ImageUnreadable, match=r"127\.0\.0\.1:1 could not be asked for the image \(ConnectError\)"):
        await urls.fetch(urls.check("http://127.0.0.1:1/", FIELD), FIELD)
    await urls.stop()


async def test_no_more_is_read_than_an_image_may_have() -> None:
    sent_bytes = 0

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        writer.write(ok("transfer-encoding: chunked"))
        while not writer.is_closing():
            writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
            sent_bytes += 1024
            await writer.drain()
            await asyncio.sleep(0)

    for peer in (endless, saying(ok("content-length: 1001")), saying(ok(f"content-length: {10**18}"), bytes(2000))):
        async with asyncio.timeout(5), fetching(peer) as fetch:
            with pytest.raises(ImageTooLarge) as caught:
                await fetch()
        assert caught.value.field == FIELD
    assert sent_bytes < 50_000_000


async def test_what_is_packed_stays_packed() -> None:
    """Unpacking is what would make a small answer large."""
    async with fetching(saying(ok("content-encoding: gzip", "content-length: 5"), b"\x1f\x8bxyz")) as fetch:
        assert await fetch() == b"\x1f\x8bxyz"


async def test_an_empty_file_is_an_empty_image() -> None:
    async with fetching(saying(ok("content-length: 0"))) as fetch:
        with pytest.raises(ImageEmpty):
            await fetch()


async def test_a_host_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "FETCH_S", 0.3)

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ok("content-length: 900"))
        for _ in range(900):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with asyncio.timeout(5), fetching(drip) as fetch:
        with pytest.raises(ImageUnreadable, match=r"did not send the image within 0\.3 s"):
            await fetch()


async def test_few_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "MAX_FETCHES", 2)
    running, most = 0, 0

    async def peer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        writer.write(ok("content-length: 1") + b"x")

    async with fetching(peer) as fetch:
        assert await asyncio.gather(*(fetch() for _ in range(6))) == [b"x"] * 6
    assert most == 2
