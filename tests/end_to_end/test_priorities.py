"""Who is urgent finds room where others are told to come back, whichever way it is said."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from ai4thai.vision.v1 import detection_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from PIL import Image

from tests.end_to_end.calling import Server, detect_request, refused
from tests.end_to_end.conftest import wait_until_ready
from tests.end_to_end.pictures import Picture, jpeg
from tests.processes import ServerProcess

ROOM = 4
HELD = 3  # what is left is for INTERACTIVE and, rounded up, STANDARD: BATCH may fill three quarters


@pytest.fixture(scope="module")
def nearly_full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with room for four images, three of which are taken by large ones again and again."""
    env = {
        "AI4THAI_DATA_DIR": str(tmp_path_factory.mktemp("nearly-full")),
        "VISION_SERVICE_PORT": "0",
        "VISION_DESCRIBER": "",
        "VISION_MAX_QUEUED_IMAGES": str(ROOM),
    }
    with ServerProcess("vision_server", env=env) as process:
        wait_until_ready(process)
        server = Server(process)
        yield server
        server.close()


@pytest.fixture(scope="module")
def large() -> bytes:
    """A JPEG that takes seconds to decode and to draw on."""
    return jpeg(Image.effect_noise((1500, 1500), 60).convert("RGB").resize((6000, 6000)))


def by_field(server: Server, content: bytes, priority: str) -> None:
    request = detect_request(content)
    request.priority = detection_pb2.Priority.Value(f"PRIORITY_{priority.upper()}")
    server.vision.Detect(request)


def by_metadata(server: Server, content: bytes, priority: str) -> None:
    server.vision.Detect(detect_request(content), metadata=(("x-priority", priority),))


def by_header(server: Server, content: bytes, priority: str) -> None:
    body = {"image": {"content": base64.b64encode(content).decode()}}
    answer = server.web.post("/v1/vision:detect", content=json.dumps(body), headers={"x-priority": priority})
    if answer.status_code == 429:
        raise Full
    assert answer.status_code == 200, answer.text


class Full(Exception):
    """HTTP's RESOURCE_EXHAUSTED."""


def hold(server: Server, large: bytes) -> list[Any]:
    """The calls that take three places; made anew where the first of them ends before the last one is in."""
    for _ in range(5):
        held = [server.vision.Detect.future(detect_request(large, annotate=True)) for _ in range(HELD)]
        while not any(call.done() for call in held):
            if server.metric("ai4thai_admitted_images") == HELD:
                return held
            time.sleep(0.02)
        for call in held:
            call.result(timeout=60)
    raise AssertionError("three large pictures were never in at once")


@pytest.mark.parametrize("say", [by_field, by_metadata, by_header])
def test_batch_is_refused_where_interactive_is_let_in(
    nearly_full: Server, large: bytes, picture: Picture, say: Callable[[Server, bytes, str], None]
) -> None:
    # Given a server with one place left,
    held = hold(nearly_full, large)
    content = jpeg(picture.image)
    # when a caller that can wait comes, it is told to come back; one that somebody waits for is let in.
    with pytest.raises((grpc.RpcError, Full)) as told:
        say(nearly_full, content, "batch")
    error: Any = told.value
    assert isinstance(error, Full) or error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    say(nearly_full, content, "interactive")
    for call in held:
        call.result(timeout=60)


def test_an_unknown_priority_is_told_so(vision: Server, picture: Picture) -> None:
    request = detect_request(jpeg(picture.image))
    said = refused(lambda: vision.vision.Detect(request, metadata=(("x-priority", "urgent"),)))
    assert (said.code, said.field) == ("INVALID_ARGUMENT", "x-priority")
    config = pb.DetectStreamRequest(config=pb.StreamConfig())
    said = refused(lambda: list(vision.vision.DetectStream(iter([config]), metadata=(("x-priority", "urgent"),))))
    assert (said.code, said.field) == ("INVALID_ARGUMENT", "x-priority")
    for word in ("urgent", "dringend é".encode().decode("latin-1")):
        answer = vision.web.post(
            "/v1/vision:detect",
            content=json.dumps({"image": {"content": base64.b64encode(jpeg(picture.image)).decode()}}),
            headers={"x-priority": word.encode("latin-1")},
        )
        assert answer.status_code == 400
        assert "x-priority" in answer.json()["error"]["message"]
