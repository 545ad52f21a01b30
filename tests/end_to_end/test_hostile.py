"""Whatever is sent, it is answered with a clear error or a close, and the next caller is served as before."""

from __future__ import annotations

import base64
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb
from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import generation_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from google.protobuf.json_format import MessageToDict

from tests.end_to_end.calling import Server, detect_request, generate_request, json_refusal, question, refused
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.pictures import encoded, foreign, jpeg, png_bomb

GROWTH_BYTES = 300_000_000
GOOD = jpeg(foreign(3, 3, 3).image)


def memory_bytes(server: Server) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


@pytest.fixture(scope="module")
def before(vision: Server) -> tuple[Any, int]:
    """The right answer and the memory in use, after some ordinary work."""
    for _ in range(5):
        answer = vision.vision.Detect(detect_request(GOOD))
    # Big ordinary messages, so that what the allocator keeps at hand is counted before, not after.
    large = encoded(foreign(3, 3, 3).image.resize((2500, 2500)), "BMP")
    for _ in range(3):
        vision.vision.Detect(detect_request(large))
    return answer.detections, memory_bytes(vision)


@pytest.fixture(autouse=True)
def served_as_before(vision: Server, before: tuple[Any, int]) -> Iterator[None]:
    """After every test: the same process gives the same answer, over gRPC and HTTP, in about the same memory."""
    yield
    detections, before_bytes = before
    again = vision.vision.Detect(detect_request(GOOD), timeout=10).detections
    assert [(d.label, d.box) for d in again] == [(d.label, d.box) for d in detections]
    assert vision.web.get("/health").json() == {"status": "SERVING"}
    assert vision.process.process.poll() is None
    assert memory_bytes(vision) < before_bytes + GROWTH_BYTES


BAD_IMAGES = {
    "not an image": (b"this is no image" * 100, "IMAGE_UNREADABLE"),
    "zero bytes": (b"", "IMAGE_EMPTY"),
    "one byte": (b"\xff", "IMAGE_UNREADABLE"),
    "truncated JPEG": (GOOD[: len(GOOD) // 2], "IMAGE_UNREADABLE"),
    "JPEG without pixels": (GOOD[:200], "IMAGE_UNREADABLE"),
    "PNG with a broken checksum": (
        encoded(foreign(3).image, "PNG")[:29] + b"\0\0\0\0" + encoded(foreign(3).image, "PNG")[33:],
        "IMAGE_UNREADABLE",
    ),
    "truncated PNG": (encoded(foreign(3).image, "PNG")[:400], "IMAGE_UNREADABLE"),
    "truncated WebP": (encoded(foreign(3).image, "WEBP")[:300], "IMAGE_UNREADABLE"),
    "100-megapixel PNG": (png_bomb(10_000, 10_000), "IMAGE_TOO_LARGE"),
    "a PNG of 2^31 by 2^31": (png_bomb(8, 8)[:16] + b"\x7f\xff\xff\xff" * 2 + png_bomb(8, 8)[24:], None),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "IMAGE_UNREADABLE"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" * 50, "IMAGE_UNREADABLE"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_told_so(vision: Server, name: str) -> None:
    content, reason = BAD_IMAGES[name]
    said = refused(lambda: vision.vision.Detect(detect_request(content), timeout=20))
    assert said.code == "INVALID_ARGUMENT"
    assert said.reason == reason or (reason is None and said.reason in ("IMAGE_TOO_LARGE", "IMAGE_UNREADABLE"))
    assert said.domain == "vision.ai4thai"
    assert said.field.startswith("image")
    # The message is for a person: a sentence, no traceback and no address of an object.
    assert len(said.message) > 20 and "0x" not in said.message and "Traceback" not in said.message
    # The JSON face tells the same.
    body = {"image": {"content": base64.b64encode(content).decode()}}
    answer = vision.web.post("/v1/vision:detect", json=body)
    assert answer.status_code == 400
    assert json_refusal(answer) == said
    # So do the describer's methods, naming where in the request the image stands.
    generating = refused(lambda: list(vision.vision.Generate(generate_request(content, "What is this?"), timeout=20)))
    assert (generating.code, generating.reason) == (said.code, said.reason)
    assert generating.field.startswith("messages[0].parts[0].image")
    analyzing = pb.AnalyzeRequest(image=image_pb2.Image(content=content), question="What is this?")
    assert refused(lambda: vision.vision.Analyze(analyzing, timeout=20)).reason == said.reason


def test_a_bomb_is_refused_by_its_header_alone(vision: Server) -> None:
    bomb = png_bomb(10_000, 10_000)
    assert len(bomb) < 100_000
    said = refused(lambda: vision.vision.Detect(detect_request(bomb), timeout=20))
    assert said.reason == "IMAGE_TOO_LARGE"
    limit = vision.vision.GetServerInfo(pb.GetServerInfoRequest()).limits.max_image_pixels
    assert {"100000000", str(limit)} <= set(said.metadata.values())


@pytest.mark.parametrize(
    ("width_px", "height_px", "size_bytes", "reason"),
    [
        (0, 0, 0, None),
        (2, 2, 11, None),
        (2, 2, 13, None),
        (-2, -2, 12, None),
        (2**31 - 1, 2**31 - 1, 12, None),
        (0, 7, 0, None),
    ],
)
def test_raw_pixels_must_fit_their_size(
    vision: Server, width_px: int, height_px: int, size_bytes: int, reason: str | None
) -> None:
    raw = image_pb2.RawImage(width_px=width_px, height_px=height_px, rgb=bytes(size_bytes))
    said = refused(lambda: vision.vision.Detect(pb.DetectRequest(image=image_pb2.Image(raw=raw)), timeout=20))
    assert said.code == "INVALID_ARGUMENT"
    assert said.reason in ("INVALID_FIELD", "IMAGE_EMPTY", "IMAGE_UNREADABLE", "IMAGE_TOO_LARGE")
    assert said.field.startswith("image")


def test_40_mb_over_the_limit_is_refused_with_both_numbers(vision: Server) -> None:
    limits = vision.vision.GetServerInfo(pb.GetServerInfoRequest()).limits
    size_bytes = limits.max_image_bytes + 40_000_000
    assert size_bytes < limits.max_message_bytes
    said = refused(lambda: vision.vision.Detect(detect_request(bytes(size_bytes)), timeout=30))
    assert (said.code, said.reason) == ("INVALID_ARGUMENT", "IMAGE_TOO_LARGE")
    assert {str(size_bytes), str(limits.max_image_bytes)} <= set(said.metadata.values())
    assert said.field.startswith("image")


def test_40_mb_over_the_message_limit_is_refused_unread(vision: Server) -> None:
    limit_bytes = vision.vision.GetServerInfo(pb.GetServerInfoRequest()).limits.max_message_bytes
    content = bytes(limit_bytes + 40_000_000)
    said = refused(lambda: vision.vision.Detect(detect_request(content), timeout=30))
    assert said.code == "RESOURCE_EXHAUSTED"
    assert str(limit_bytes) in said.message
    answer = vision.web.post("/v1/vision:detect", content=content)
    assert json_refusal(answer).reason == "MESSAGE_UNREADABLE"
    assert json_refusal(answer).metadata["limit_bytes"] == str(limit_bytes)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "unknown model": ({"model": "yolo99"}, "NOT_FOUND", "MODEL_NOT_FOUND", "options.model"),
    "a path for a model": ({"model": "../../etc/passwd"}, "NOT_FOUND", "MODEL_NOT_FOUND", "options.model"),
    "a describer": ({"model": "shapes-describer"}, "INVALID_ARGUMENT", "WRONG_TASK", "options.model"),
    "NaN threshold": ({"min_confidence": math.nan}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.min_confidence"),
    "infinite threshold": ({"min_confidence": math.inf}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.min_confidence"),
    "negative threshold": ({"min_confidence": -0.1}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.min_confidence"),
    "NaN overlap": ({"iou_threshold": math.nan}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.iou_threshold"),
    "overlap over 1": ({"iou_threshold": 1.1}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.iou_threshold"),
    "no detections": ({"max_detections": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.max_detections"),
    "too many detections": ({"max_detections": 1001}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.max_detections"),
    "unknown label": ({"labels": ["star", "cat"]}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.labels"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_named(vision: Server, name: str) -> None:
    options, code, reason, field = BAD_OPTIONS[name]
    said = refused(lambda: vision.vision.Detect(detect_request(GOOD, **options), timeout=20))
    assert (said.code, said.reason) == (code, reason)
    assert said.field.partition("[")[0] == field
    answer = vision.web.post(
        "/v1/vision:detect", json=MessageToDict(detect_request(GOOD, **options), preserving_proto_field_name=True)
    )
    assert json_refusal(answer) == said


BAD_GENERATE_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN temperature": ({"temperature": math.nan}, "options.temperature"),
    "cold temperature": ({"temperature": -1}, "options.temperature"),
    "hot temperature": ({"temperature": 2.5}, "options.temperature"),
    "NaN top_p": ({"top_p": math.nan}, "options.top_p"),
    "zero top_p": ({"top_p": 0}, "options.top_p"),
    "no tokens": ({"max_new_tokens": 0}, "options.max_new_tokens"),
    "too many tokens": ({"max_new_tokens": 10_000_000}, "options.max_new_tokens"),
    "empty stop text": ({"stop": [""]}, "options.stop"),
    "too many stop texts": ({"stop": list("abcdefghi")}, "options.stop"),
}


@pytest.mark.parametrize("name", BAD_GENERATE_OPTIONS)
def test_a_bad_generate_option_is_named(vision: Server, name: str) -> None:
    options, field = BAD_GENERATE_OPTIONS[name]
    request = generate_request(GOOD, "What is this?", **options)
    said = refused(lambda: list(vision.vision.Generate(request, timeout=20)))
    assert (said.code, said.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert said.field.partition("[")[0] == field


def speaking(*roles: generation_pb2.Role.ValueType) -> list[generation_pb2.Message]:
    parts = [generation_pb2.MessagePart(text="words")]
    return [generation_pb2.Message(role=role, parts=parts) for role in roles]


SYSTEM, USER, ASSISTANT = generation_pb2.ROLE_SYSTEM, generation_pb2.ROLE_USER, generation_pb2.ROLE_ASSISTANT
BAD_CONVERSATIONS: dict[str, tuple[list[generation_pb2.Message], str]] = {
    "nothing said": ([], "messages"),
    "nobody speaks": (speaking(generation_pb2.ROLE_UNSPECIFIED), "messages[0].role"),
    "the assistant speaks last": (speaking(USER, ASSISTANT), "messages"),
    "the operator in the middle": (speaking(USER, SYSTEM, USER), "messages[1].role"),
    "no parts": ([generation_pb2.Message(role=USER)], "messages[0].parts"),
    "an empty part": (
        [generation_pb2.Message(role=USER, parts=[generation_pb2.MessagePart()])],
        "messages[0].parts[0]",
    ),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_a_bad_conversation_is_told_so(vision: Server, name: str) -> None:
    messages, field = BAD_CONVERSATIONS[name]
    said = refused(lambda: list(vision.vision.Generate(pb.GenerateRequest(messages=messages), timeout=20)))
    assert (said.code, said.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert said.field.startswith(field), said.field


def test_a_prompt_that_does_not_fit_is_refused(vision: Server) -> None:
    request = pb.GenerateRequest(messages=[question(GOOD, "What is this? " * 4000)])
    said = refused(lambda: list(vision.vision.Generate(request, timeout=30)))
    assert (said.code, said.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")


def test_a_frame_before_the_config_is_refused(vision: Server) -> None:
    frame = pb.DetectStreamRequest(frame=pb.Frame(frame_id=1, image=image_pb2.Image(content=GOOD)))
    said = refused(lambda: list(vision.vision.DetectStream(iter([frame]), timeout=20)))
    assert (said.code, said.reason) == ("INVALID_ARGUMENT", "WRONG_ORDER")


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "wrong JSON type": (b'{"options": {"min_confidence": "high"}}', "options.min_confidence"),
    "list for an object": (b'{"image": []}', "image"),
    "unknown JSON field": (b'{"image": {"url": "http://example.com/a.jpg"}}', "image.url"),
    "no base64": (b'{"image": {"content": "*?!"}}', "image.content"),
    "no JSON": (b"<detect/>", "body"),
    "no UTF-8": (b'{"image": "\xff\xfe"}', "body"),
    "deep nesting": (b'{"image":' * 5000 + b"1" + b"}" * 5000, "body"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_json_that_does_not_fit_is_named(vision: Server, name: str) -> None:
    body, field = BAD_BODIES[name]
    answer = vision.web.post("/v1/vision:detect", content=body)
    assert answer.status_code == 400
    said = json_refusal(answer)
    assert (said.code, said.reason, said.domain) == ("INVALID_ARGUMENT", "MESSAGE_UNREADABLE", "vision.ai4thai")
    assert said.field == field


def test_nan_in_json_is_no_threshold(vision: Server) -> None:
    body = {"image": {"content": base64.b64encode(GOOD).decode()}, "options": {"min_confidence": "NaN"}}
    said = json_refusal(vision.web.post("/v1/vision:detect", json=body))
    assert (said.reason, said.field) == ("INVALID_FIELD", "options.min_confidence")
    assert vision.web.post("/v1/vision:detect", content=json.dumps(body).replace('"NaN"', "NaN")).status_code == 400


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


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"POST /v1/vision:detect HTTP/1.1\r\nHost: x\r\nContent-Le", id="half a header"),
        pytest.param(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{", id="half a body"),
        pytest.param(b"PRI * HT", id="half a preface"),
    ],
)
def test_half_a_request_is_hung_up_on(either: Server, sent: bytes) -> None:
    with connect(either) as sock:
        sock.sendall(sent)
        answer = read_to_end(sock)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert either.web.get("/health/live").status_code == 200


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


def test_a_thousand_idle_connections_hold_nobody_up(either: Server, vision: Server, queue: Server) -> None:
    sockets = [connect(either) for _ in range(1000)]
    try:
        assert vision.vision.Detect(detect_request(GOOD), timeout=10).detections
        assert queue.queue.ListJobs(queue_pb.ListJobsRequest(), timeout=10) is not None
        assert either.web.get("/health").status_code == 200
        for sock in sockets:
            assert read_to_end(sock) == b""
    finally:
        for sock in sockets:
            sock.close()


def test_callers_who_leave_leave_nothing_behind(vision: Server) -> None:
    for _ in range(50):
        with connect(vision) as sock:
            body = b'{"image": {"content": "' + base64.b64encode(GOOD) + b'"}}'
            sock.sendall(b"POST /v1/vision:detect HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    wait_until("no call is left", lambda: vision.metric("ai4thai_calls_in_flight") == 0)


def detecting(*contents: bytes) -> work_pb2.Work:
    return work_pb2.Work(
        detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(content=content) for content in contents])
    )


BAD_SUBMISSIONS: dict[str, tuple[Callable[[], queue_pb.SubmitJobRequest], str]] = {
    "no work": (lambda: queue_pb.SubmitJobRequest(), "work"),
    "no images": (lambda: queue_pb.SubmitJobRequest(work=detecting()), "work.detect.images"),
    "zero bytes": (lambda: queue_pb.SubmitJobRequest(work=detecting(GOOD, b"")), "work.detect.images[1]"),
    "too large": (lambda: queue_pb.SubmitJobRequest(work=detecting(bytes(40 << 20))), "work.detect.images[0]"),
    "no question": (
        lambda: queue_pb.SubmitJobRequest(
            work=work_pb2.Work(analyze=work_pb2.AnalyzeWork(images=[work_pb2.MediaSource(content=GOOD)]))
        ),
        "work.analyze.question",
    ),
    "a bad queue": (lambda: queue_pb.SubmitJobRequest(queue="no such name!", work=detecting(GOOD)), "queue"),
    "too many attempts": (lambda: queue_pb.SubmitJobRequest(max_attempts=21, work=detecting(GOOD)), "max_attempts"),
}


@pytest.mark.parametrize("name", BAD_SUBMISSIONS)
def test_a_bad_submission_is_named(queue: Server, name: str) -> None:
    make, field = BAD_SUBMISSIONS[name]
    said = refused(lambda: queue.queue.SubmitJob(make(), timeout=20))
    assert (said.code, said.reason, said.domain) == ("INVALID_ARGUMENT", "INVALID_FIELD", "queue.ai4thai")
    assert said.field.startswith(field)


@pytest.mark.parametrize("body", [b'{"work": 7}', b'{"wrok": {}}', b'{"max_attempts": "many"}', b"["])
def test_a_bad_submission_in_json_is_named(queue: Server, body: bytes) -> None:
    answer = queue.web.post("/v1/jobs", content=body)
    assert answer.status_code == 400
    assert json_refusal(answer).reason == "MESSAGE_UNREADABLE"
    assert json_refusal(answer).field
