"""Files over HTTP: POST and PUT /v1/media, GET and HEAD /v1/media/{media_id}:download, as an operator's process serves them."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.queue_server.conftest import Process
from tests.queue_server.test_media import PLACES, at, files_in, id_of, no_bytes_left, some_bytes


class Web:
    """The process, from outside."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def reason(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        status, _, content = self.ask(method, path, body, **headers)
        (info,) = [one for one in json.loads(content)["error"]["details"] if "reason" in one]
        return status, info["reason"]

    def store(self, content: bytes, **headers: str) -> str:
        status, _, answer = self.ask("POST", "/v1/media", content, **headers)
        assert status == 200, answer
        return str(json.loads(answer)["media"]["media_id"])


@pytest.fixture(params=PLACES)
def web(
    request: pytest.FixtureRequest, redis_url: str, tmp_path: Path, start_process: Callable[..., Process]
) -> Iterator[Web]:
    """With limits that an ordinary request's body would meet soon: 100 kB, one second."""
    settings = at(request.param, tmp_path, max_media_bytes=9_000_000, max_redis_media_bytes=9_000_000)
    process = start_process(
        "queue_server",
        REDIS_URL=redis_url,
        QUEUE_WORKER_PORT="0",
        SERVING_HOST="127.0.0.1",
        SERVING_MAX_MESSAGE_BYTES="2000000",
        SERVING_HTTP_REQUEST_SECONDS="1",
        **{f"QUEUE_{name.upper()}": str(value) for name, value in settings.items()},
    )
    line = process.lines_until('"listening"')[-1]
    web = Web(process, json.loads(line)["port"])
    yield web
    process.popen.terminate()


def test_files_go_in_and_come_out_as_they_are(web: Web, redis_client: Any, tmp_path: Path) -> None:
    # Given a file larger than any other body may be, sent in both ways
    content = some_bytes(5_000_000)
    media_id = web.store(content, Content_Type="video/mp4")
    assert media_id == id_of(content)
    status, headers, answer = web.ask("PUT", "/v1/media", iter([content[:10], content[10:]]), x_request_id="mine")
    assert (status, headers["x-request-id"]) == (200, "mine")
    media = json.loads(answer)["media"]
    assert media["size_bytes"] == "5000000" and media["content_type"] == "video/mp4" and media["expire_time"]
    path = f"/v1/media/{media_id}:download"
    # Then it comes back whole, with what a downloader needs
    status, headers, answer = web.ask("GET", path)
    assert (status, answer) == (200, content)
    assert headers["content-type"] == "video/mp4" and headers["content-length"] == "5000000"
    assert headers["etag"] == f'"{media_id}"' and headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] == f'attachment; filename="{media_id[7:23]}.mp4"'
    status, head, answer = web.ask("HEAD", path)
    assert (status, answer) == (200, b"")
    assert {**head, "x-request-id": ""} == {**headers, "x-request-id": ""}
    assert web.ask("GET", path, if_none_match=headers["etag"])[0] == 304
    # And in parts
    for asked, begin, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=4999990-", 4_999_990, 5_000_000),
        ("bytes=4999990-6000000", 4_999_990, 5_000_000),
        ("bytes=-7", 4_999_993, 5_000_000),
        ("bytes=-6000000", 0, 5_000_000),
    ):
        status, headers, answer = web.ask("GET", path, range=asked, if_range=f'"{media_id}"')
        assert (status, answer) == (206, content[begin:end]), asked
        assert headers["content-range"] == f"bytes {begin}-{end - 1}/5000000"
    for asked in ("bytes=0-1,3-4", "lines=1-2", "bytes=5-4", "bytes=-"):
        assert web.ask("GET", path, range=asked)[2] == content
    assert web.ask("GET", path, range="bytes=0-1", if_range='"other"')[0] == 200
    for asked in ("bytes=5000000-", "bytes=-0"):
        status, headers, _ = web.ask("GET", path, range=asked)
        assert (status, headers["content-range"]) == (416, "bytes */5000000")
    # And line by line as JSON
    status, _, answer = web.ask("GET", f"/v1/media/{media_id}?offset_bytes=4999999")
    first, last = (json.loads(line) for line in answer.splitlines())
    assert status == 200 and first["media"]["media_id"] == media_id and len(last["chunk"]) == 4


def test_what_cannot_be_stored_or_found_is_told(web: Web, redis_client: Any, tmp_path: Path) -> None:
    assert web.reason("GET", f"/v1/media/{id_of(b'none')}:download") == (404, "MEDIA_NOT_FOUND")
    assert web.reason("GET", "/v1/media/x:download") == (404, "MEDIA_NOT_FOUND")
    assert web.ask("HEAD", "/v1/media/x:download")[0] == 404
    assert web.reason("POST", "/v1/media", b"") == (400, "MEDIA_INVALID")
    assert web.reason("POST", "/v1/media", b"x", content_type="multipart/form-data; boundary=x") == (
        400,
        "INVALID_FIELD",
    )
    assert web.reason("POST", "/v1/media", b"x", content_type="video") == (400, "INVALID_FIELD")
    assert web.ask("DELETE", "/v1/media")[0] == 405
    # One that is too large, whether it says so or not
    assert web.reason("POST", "/v1/media", bytes(9_000_001)) == (400, "MEDIA_INVALID")
    pieces = (bytes(100_000) for _ in range(120))
    assert web.reason("POST", "/v1/media", pieces) == (400, "MEDIA_INVALID")
    assert no_bytes_left(redis_client, tmp_path)
    # curl's words for "no type" are none
    media_id = web.store(b"x" * 2000, content_type="application/x-www-form-urlencoded")
    _, headers, _ = web.ask("GET", f"/v1/media/{media_id}:download")
    assert headers["content-type"] == "application/octet-stream"


def test_a_slow_file_takes_its_time_and_a_broken_off_one_leaves_nothing(
    web: Web, redis_client: Any, tmp_path: Path
) -> None:
    def begin(size_bytes: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", web.port), timeout=20)
        sock.sendall(f"POST /v1/media HTTP/1.1\r\nhost: x\r\ncontent-length: {size_bytes}\r\n\r\n".encode())
        return sock

    # Given a body that takes longer than a request may
    content = some_bytes(3_000_000)
    with begin(len(content)) as sock:
        for begin_bytes in range(0, len(content), 1_000_000):
            sock.sendall(content[begin_bytes : begin_bytes + 1_000_000])
            time.sleep(0.6)
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
    status, _, answer = web.ask("GET", f"/v1/media/{id_of(content)}:download")
    assert status == 200 and hashlib.sha256(answer).digest() == hashlib.sha256(content).digest()
    # When another breaks off, then only the first is left
    with begin(len(content)) as sock:
        sock.sendall(bytes(2_500_000))
    until_s = time.monotonic() + 10
    while redis_client.keys("{vq}:part:*") or redis_client.zcard("{vq}:objects") != len(files_in(tmp_path)):
        assert time.monotonic() < until_s
        time.sleep(0.05)
    assert len(redis_client.keys("{vq}:media:*")) == 1 and len(files_in(tmp_path)) <= 1
