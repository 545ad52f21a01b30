"""Whoever connects and does not speak as he should is hung up on; he holds nobody else up."""

from __future__ import annotations

import base64
import os
import resource
import socket
from contextlib import ExitStack

import pytest
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb

from tests.end_to_end.calling import Server, detect_request
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.unharmed import GOOD

pytestmark = pytest.mark.usefixtures("served_as_before")


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.process.port), timeout=30)


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := sock.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


@pytest.fixture(params=["vision", "queue"])
def either(request: pytest.FixtureRequest) -> Server:
    """Each of the two servers: what knocks on a port is the same for both."""
    server: Server = request.getfixturevalue(request.param)
    return server


def test_half_a_request_is_hung_up_on(vision: Server, queue: Server) -> None:
    halves = [
        (server, sent % path)
        for server, path in ((vision, b"/v1/vision:detect"), (queue, b"/v1/jobs"))
        for sent in (
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Le",
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{",
            b"POST %.2s",
        )
    ]
    halves += [(vision, b"PRI * HT"), (queue, b"PRI * HT")]
    with ExitStack() as open_until_the_end:
        sockets = [open_until_the_end.enter_context(connect(server)) for server, _ in halves]
        for sock, (_, sent) in zip(sockets, halves, strict=True):
            sock.sendall(sent)
        for server in (vision, queue):
            assert server.web.get("/health/live").status_code == 200
        for sock, (_, sent) in zip(sockets, halves, strict=True):
            answer = read_to_end(sock)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408"), (sent, answer)
    for server in (vision, queue):
        assert server.web.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(os.urandom(4000), id="noise"),
        pytest.param(bytes(4000), id="zeros"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(4000), id="noise after the preface"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00" + bytes(500), id="TLS"),
        pytest.param(b"GET / HTTP/9.9\r\n\r\n" * 20, id="another HTTP"),
        pytest.param(b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", id="a very long path"),
    ],
)
def test_garbage_is_hung_up_on(either: Server, sent: bytes) -> None:
    with connect(either) as sock:
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # hung up on already
        answer = read_to_end(sock)
    assert not answer.startswith(b"HTTP/1.1 2") and not answer.startswith(b"HTTP/1.1 5")
    assert either.web.get("/health/live").status_code == 200


def test_a_thousand_idle_connections_hold_nobody_up(vision: Server, queue: Server) -> None:
    """A thousand at each server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    with ExitStack() as open_until_the_end:
        sockets = [open_until_the_end.enter_context(connect(server)) for server in (vision, queue) for _ in range(1000)]
        assert vision.vision.Detect(detect_request(GOOD), timeout=10).detections
        assert queue.queue.ListJobs(queue_pb.ListJobsRequest(), timeout=10) is not None
        for server in (vision, queue):
            assert server.web.get("/health").status_code == 200
        for sock in sockets:
            assert read_to_end(sock) == b""


def test_callers_who_leave_leave_nothing_behind(vision: Server) -> None:
    for _ in range(50):
        with connect(vision) as sock:
            body = b'{"image": {"content": "' + base64.b64encode(GOOD) + b'"}}'
            sock.sendall(b"POST /v1/vision:detect HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    wait_until("no call is left", lambda: vision.vision_calls_in_flight == 0)
