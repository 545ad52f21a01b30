"""Whatever is sent is answered with a clear error that names what was wrong."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb
from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import generation_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from google.protobuf.json_format import MessageToDict

from tests.end_to_end.calling import Server, detect_request, generate_request, json_refusal, question, refused
from tests.end_to_end.pictures import encoded, foreign, png_bomb
from tests.end_to_end.unharmed import GOOD, GROWTH_BYTES, Before, detecting, memory_bytes, refuse_a_large_message

pytestmark = pytest.mark.usefixtures("served_as_before")

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
    ("width_px", "height_px", "size_bytes"),
    [(0, 0, 0), (0, 7, 0), (2, 2, 11), (2, 2, 13), (-2, -2, 12), (2**31 - 1, 2**31 - 1, 12)],
)
def test_raw_pixels_must_fit_their_size(vision: Server, width_px: int, height_px: int, size_bytes: int) -> None:
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


def test_refusing_large_messages_again_and_again_keeps_none_of_them(
    vision: Server, queue: Server, before: Before
) -> None:
    """Looked at each time: a failed call that lived on until a garbage collector comes by would be gone at the end."""
    for _ in range(7):  # together they must be more than may stay
        refuse_a_large_message(vision, queue)
        assert memory_bytes(vision) < before.vision_bytes + GROWTH_BYTES
        assert memory_bytes(queue) < before.queue_bytes + GROWTH_BYTES


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
    "number for an object": (b'{"options": 7}', "options"),
    "empty list for an object": (b'{"options": []}', "options"),
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
