"""One port: gRPC and HTTP/1.1 side by side, whatever else knocks."""

from __future__ import annotations

import os
import resource
import socket
import time
import urllib.request

import grpc
import pytest
from ai4thai.vision.v1 import image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.processes import ServerProcess

OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


def detect(server: ServerProcess, content: bytes = b"hello", annotate: bool = False) -> pb.DetectResponse:
    with grpc.insecure_channel(server.address, options=OPTIONS) as channel:
        request = pb.DetectRequest(image=image_pb2.Image(content=content))
        request.options.annotate = annotate
        return rpc.VisionServiceStub(channel).Detect(request, timeout=20, wait_for_ready=True)


def get(server: ServerProcess, path: str) -> str:
    with urllib.request.urlopen(f"http://{server.address}{path}", timeout=5) as response:
        return response.read().decode()


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := sock.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def test_both_protocols_answer_on_the_same_port(echo: ServerProcess) -> None:
    assert detect(echo).width_px == 5
    assert get(echo, "/health") == '{"status":"SERVING"}'
    assert get(echo, "/plain") == '{"plain":true}'


def test_the_callers_address_survives_the_relay(echo: ServerProcess) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{echo.port}") as channel:
        answer = rpc.VisionServiceStub(channel).Detect(pb.DetectRequest())
    host, _, port = answer.model.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 1023


@pytest.mark.parametrize("size_bytes", [0, 1, 65_535, 1 << 20, 20 << 20])
def test_messages_of_every_size_pass_unchanged(echo: ServerProcess, size_bytes: int) -> None:
    content = os.urandom(size_bytes)
    assert detect(echo, content, annotate=True).annotated_image == content


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=200_000), max_size=12))
def test_a_bidirectional_stream_passes_unchanged_and_in_order(echo: ServerProcess, frames: list[bytes]) -> None:
    requests = [
        pb.DetectStreamRequest(frame=pb.Frame(frame_id=number, image=image_pb2.Image(content=content)))
        for number, content in enumerate(frames)
    ]
    with grpc.insecure_channel(echo.address, options=OPTIONS) as channel:
        answers = list(rpc.VisionServiceStub(channel).DetectStream(iter(requests)))
    assert [(a.result.frame_id, a.result.detection.annotated_image) for a in answers] == list(enumerate(frames))


def test_a_preface_that_comes_byte_by_byte_is_gRPC(echo: ServerProcess) -> None:
    with connect(echo) as sock:
        for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":
            sock.sendall(bytes([byte]))
            time.sleep(0.005)
        sock.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")  # an empty SETTINGS frame
        assert sock.recv(9)[3] == 4  # the server's SETTINGS


def test_http_in_one_connection_is_kept_alive(echo: ServerProcess) -> None:
    with connect(echo) as sock:
        for _ in range(3):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"SERVING"}'):
                answer += sock.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost:",
        b"POST /v1/vision:detect HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\nhalf",
    ],
)
def test_who_does_not_finish_speaking_is_hung_up_on(hasty: ServerProcess, sent: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(sent)
        answer = read_to_end(sock)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert detect(hasty).width_px == 5


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=16, max_size=3000))
def test_garbage_is_refused_and_the_next_caller_is_served(echo: ServerProcess, garbage: bytes) -> None:
    with connect(echo) as sock:
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        answer = read_to_end(sock)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert get(echo, "/health/live") == '{"status":"SERVING"}'


def test_garbage_after_the_preface_ends_that_connection_only(echo: ServerProcess) -> None:
    with connect(echo) as sock:
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(5000))
        sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)
    assert detect(echo).width_px == 5


def test_tls_is_hung_up_on_at_once(echo: ServerProcess) -> None:
    with connect(echo) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00" + bytes(32))
        assert read_to_end(sock) == b""


def test_a_thousand_idle_connections_hold_nobody_up_and_are_closed(hasty: ServerProcess) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    sockets = [connect(hasty) for _ in range(1000)]
    try:
        assert detect(hasty).width_px == 5
        assert get(hasty, "/health") == '{"status":"SERVING"}'
        for sock in sockets:
            assert read_to_end(sock) == b""
    finally:
        for sock in sockets:
            sock.close()
    assert detect(hasty).width_px == 5
