from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ai4thai import (
    Cancelled,
    DeadlineExceeded,
    Health,
    InvalidInput,
    Message,
    ServerFault,
    VisionClient,
)
from ai4thai.results import FinishReason, FrameResult
from ai4thai.vision.v1 import detection_pb2
from PIL import Image

from tests.clients.fake_servers import BROKEN, FakeServer, FakeVision


def test_detect_sends_a_file_and_reads_the_objects(vision: VisionClient, fake_vision: FakeVision, image: Path) -> None:
    result = vision.detect(image, min_confidence=0.5, labels=["star"])

    [found] = result.detections
    assert (found.label, found.confidence, found.box.width_px, found.box.area_px) == ("star", 0.75, 40, 2400)
    assert (result.width_px, result.timings.total_ms, result.model) == (320, 12.5, "fake-detector")
    request = fake_vision.script.requests["Detect"]
    assert request.image.content == image.read_bytes()
    assert request.options.min_confidence == 0.5 and list(request.options.labels) == ["star"]
    assert not request.options.HasField("iou_threshold")  # the server's default holds


@pytest.mark.parametrize("kind", ["str", "bytes", "bytearray"])
def test_detect_takes_paths_and_bytes(vision: VisionClient, fake_vision: FakeVision, image: Path, kind: str) -> None:
    given = {"str": str(image), "bytes": image.read_bytes(), "bytearray": bytearray(image.read_bytes())}[kind]

    vision.detect(given)

    assert fake_vision.script.requests["Detect"].image.content == image.read_bytes()


def test_detect_takes_arrays_and_pillow_images_as_raw_pixels(vision: VisionClient, fake_vision: FakeVision) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)

    for given in (pixels, Image.fromarray(pixels), pixels[:, :, ::-1][:, :, ::-1]):
        vision.detect(given)
        raw = fake_vision.script.requests["Detect"].image.raw
        assert (raw.width_px, raw.height_px, raw.rgb) == (3, 2, pixels.tobytes())


def test_a_pillow_image_is_turned_as_its_exif_says(vision: VisionClient, fake_vision: FakeVision) -> None:
    photo = Image.new("RGB", (30, 20))
    photo.getexif()[274] = 6  # the camera was turned by 90 degrees

    vision.detect(photo)

    raw = fake_vision.script.requests["Detect"].image.raw
    assert (raw.width_px, raw.height_px) == (20, 30)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (np.zeros((4, 4), np.uint8), ValueError, r"shape \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), ValueError, "float32"),
        (7, TypeError, "not int"),
        (Path("nowhere.jpg"), FileNotFoundError, "nowhere.jpg"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_sent(
    vision: VisionClient, fake_vision: FakeVision, given: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        vision.detect(given)  # type: ignore[arg-type]
    assert fake_vision.script.calls == []


def test_misspelt_options_are_refused(vision: VisionClient, image: Path) -> None:
    with pytest.raises(TypeError, match="min_confidance"):
        vision.detect(image, min_confidance=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"\['star'\]"):
        vision.detect(image, labels="star")


def test_a_bad_image_is_an_error_with_its_field(vision: VisionClient) -> None:
    with pytest.raises(InvalidInput, match="no image") as caught:
        vision.detect(BROKEN)

    assert caught.value.reason == "IMAGE_UNREADABLE"
    assert [violation.field for violation in caught.value.field_violations] == ["image.content"]


def test_the_annotated_picture_is_saved(vision: VisionClient, image: Path, tmp_path: Path) -> None:
    target = vision.detect(image, annotate=True).save(tmp_path / "drawn.jpg")

    assert target.read_bytes() == b"\xff\xd8 drawn"
    with pytest.raises(ValueError, match="annotate=True"):
        vision.detect(image).save(tmp_path / "other.jpg")


def test_a_stream_answers_in_order_and_a_bad_image_is_one_result(vision: VisionClient) -> None:
    images = [b"first", BROKEN, b"third"]

    with vision.detect_stream(images, max_in_flight=2) as stream:
        results = list(stream)

    assert [result.frame_id for result in results] == [0, 1, 2]
    assert [result.detection is not None for result in results] == [True, False, True]
    assert isinstance(results[1].error, InvalidInput)
    assert (stream.summary.received_count, stream.summary.error_count, stream.summary.duration_s) == (3, 1, 1.0)


def test_a_failing_image_source_is_raised_after_the_results_before_it(vision: VisionClient) -> None:
    def camera() -> Iterator[bytes]:
        yield b"first"
        raise RuntimeError("the camera is unplugged")

    results: list[FrameResult] = []
    with pytest.raises(RuntimeError, match="unplugged"), vision.detect_stream(camera()) as stream:
        results.extend(stream)

    assert len(results) == 1


def test_a_stream_that_is_left_ends(vision: VisionClient) -> None:
    def camera() -> Iterator[bytes]:
        while True:
            yield b"picture"

    with vision.detect_stream(camera()) as stream:
        assert next(stream).frame_id == 0

    under_way = sum(1 for _ in stream)  # would not end if the stream went on
    assert under_way < 10_000
    with pytest.raises(Cancelled):
        _ = stream.summary


def test_text_comes_in_pieces_that_join_to_the_whole(
    vision: VisionClient, fake_vision: FakeVision, image: Path
) -> None:
    with vision.ask(str(image), "มีดาวกี่ดวง", max_new_tokens=7) as stream:
        pieces = list(stream)

    assert pieces == list(FakeVision.pieces)
    assert stream.text == "".join(pieces)
    assert stream.summary.finish_reason is FinishReason.STOP
    assert stream.summary.usage.completion_tokens == 3
    request = fake_vision.script.requests["Generate"]
    [turn] = request.messages
    assert turn.parts[0].image.content == image.read_bytes()
    assert turn.parts[1].text == "มีดาวกี่ดวง"
    assert request.options.max_new_tokens == 7


def test_the_whole_text_can_be_had_at_once(vision: VisionClient, image: Path) -> None:
    assert vision.ask(image, "ในภาพมีอะไรบ้าง").text == "มีดาวหนึ่งดวง"


def test_conversations_have_roles(vision: VisionClient, fake_vision: FakeVision, image: Path) -> None:
    stream = vision.generate(
        [
            Message("system", "Be brief."),
            Message("user", [image, "What?"]),
            Message("assistant", "A star."),
            Message("user", "Sure?"),
        ],
        priority="batch",
    )
    assert stream.text

    assert fake_vision.script.requests["Generate"].priority == detection_pb2.PRIORITY_BATCH
    turns = fake_vision.script.requests["Generate"].messages
    assert [turn.role for turn in turns] == [1, 2, 3, 2]
    with pytest.raises(ValueError, match="'boss'"):
        vision.generate([Message("boss", "Go!")])


def test_leaving_a_text_stops_the_server(vision: VisionClient, fake_vision: FakeVision, image: Path) -> None:
    with vision.ask(image, "forever") as stream:
        assert next(stream) == "more "

    assert fake_vision.left.wait(10)
    with pytest.raises(Cancelled):
        _ = stream.text


def test_a_text_without_its_end_is_an_error(vision: VisionClient, image: Path) -> None:
    with pytest.raises(ServerFault, match="without its summary"):
        _ = vision.ask(image, "abrupt").text


def test_a_deadline_that_passes_is_said_plainly(vision: VisionClient, image: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="did not answer in time"):
        for _ in vision.ask(image, "forever", timeout_s=0.3):
            pass


def test_analyze_gives_objects_and_words(vision: VisionClient, fake_vision: FakeVision, image: Path) -> None:
    result = vision.analyze(image, "How many?", detect={"min_confidence": 0.4}, text={"temperature": 0.5})

    assert (result.text, result.answer.finish_reason) == ("One star.", FinishReason.LENGTH)
    assert result.detection.detections[0].label == "star"
    request = fake_vision.script.requests["Analyze"]
    assert request.detect_options.min_confidence == pytest.approx(0.4)
    assert request.generate_options.temperature == 0.5


def test_the_server_tells_of_itself(vision: VisionClient) -> None:
    assert (vision.info().version, vision.info().ready) == ("9.9", True)
    [model] = vision.list_models()
    assert (model.name, model.task, model.state, model.labels) == ("fake-detector", "DETECT", "READY", ("star",))
    [device] = vision.devices()
    assert (device.name, device.utilization) == ("A fake CPU", None)  # what it can't tell is no false 0


def test_health_has_an_answer_for_every_service(vision: VisionClient, vision_server: FakeServer) -> None:
    assert vision.health() is Health.SERVING
    assert vision.health("model/nobody") is Health.UNKNOWN_SERVICE
    vision_server.report("ai4thai.vision.v1.VisionService", serving=False)
    assert vision.health("ai4thai.vision.v1.VisionService") is Health.NOT_SERVING
