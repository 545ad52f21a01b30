"""Boxes match the truth of unseen scenes, whatever file the picture comes in."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from ai4thai.vision.v1 import detection_pb2, device_service_pb2, image_pb2, model_service_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from PIL import Image, ImageChops

from tests.end_to_end.calling import Server, detect_request
from tests.end_to_end.pictures import (
    Agreement,
    Picture,
    as_raw,
    assert_all_found,
    encoded,
    foreign,
    found,
    jpeg,
    turned_jpeg,
    unseen,
)
from vision_server.shapes.scenes import LABELS

SCENES = 16


def as_file(form: str, **how: object) -> Callable[[Image.Image], image_pb2.Image]:
    return lambda image: image_pb2.Image(content=encoded(image, form, **how))


FORMS: dict[str, Callable[[Image.Image], image_pb2.Image]] = {
    "JPEG": as_file("JPEG", quality=90),
    "PNG": as_file("PNG"),
    "WebP": as_file("WEBP", quality=90),
    "BMP": as_file("BMP"),
    "TIFF": as_file("TIFF"),
    "raw RGB": as_raw,
    "JPEG turned by EXIF": lambda image: image_pb2.Image(content=turned_jpeg(image, 6)),
}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_match_the_truth_of_unseen_scenes(vision: Server, form: str) -> None:
    agreement = Agreement()
    for picture in unseen(SCENES):
        answer = vision.vision.Detect(pb.DetectRequest(image=FORMS[form](picture.image)), timeout=30)
        assert (answer.width_px, answer.height_px) == picture.image.size
        agreement.add(answer.detections, picture.truth)
    assert agreement.true_count > 2 * SCENES
    assert agreement.recall >= 0.95, agreement
    assert agreement.precision >= 0.9, agreement


@pytest.fixture(scope="module")
def clear(vision: Server) -> Picture:
    """A scene of four shapes of two labels or more, all of which are found."""
    for index in range(100, 130):
        picture = foreign(index, 4, 4)
        if len({shape.label for shape in picture.shapes}) >= 2 and picture.image.width != picture.image.height:
            assert_all_found(vision.vision.Detect(detect_request(jpeg(picture.image))).detections, picture)
            return picture
    raise AssertionError("no scene fits")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_in_the_picture_as_it_is_seen(vision: Server, clear: Picture, orientation: int) -> None:
    content = turned_jpeg(clear.image, orientation)
    stored = Image.open(io.BytesIO(content)).size
    assert stored == (clear.image.size if orientation < 5 else clear.image.size[::-1])
    answer = vision.vision.Detect(detect_request(content))
    assert (answer.width_px, answer.height_px) == clear.image.size
    assert_all_found(answer.detections, clear)


@pytest.mark.parametrize(
    "converted",
    [
        pytest.param(lambda image: encoded(image.convert("L"), "JPEG"), id="grey JPEG"),
        pytest.param(lambda image: encoded(image.convert("RGBA"), "PNG"), id="PNG with alpha"),
        pytest.param(lambda image: encoded(image.quantize(64), "PNG"), id="PNG with a palette"),
        pytest.param(lambda image: encoded(image.convert("CMYK"), "JPEG"), id="CMYK JPEG"),
        pytest.param(lambda image: encoded(image, "GIF"), id="GIF"),
        pytest.param(lambda image: encoded(image, "JPEG", progressive=True), id="progressive JPEG"),
        pytest.param(lambda image: encoded(image, "WEBP", lossless=True), id="lossless WebP"),
    ],
)
def test_other_kinds_of_file_are_read_too(
    vision: Server, clear: Picture, converted: Callable[[Image.Image], bytes]
) -> None:
    # Of this size a JPEG is decoded whole, as bare pixels are: the model sees the same of both.
    picture = clear.fitted(600)
    content = converted(picture.image)
    answer = vision.vision.Detect(detect_request(content))
    assert (answer.width_px, answer.height_px) == picture.image.size
    # Whatever a shape without its colours looks like to the model: the pixels are those that any other reader sees.
    pixels = as_raw(Image.open(io.BytesIO(content)))
    boxes, wanted = found(answer.detections), found(vision.vision.Detect(pb.DetectRequest(image=pixels)).detections)
    assert wanted
    assert [label for label, _, _ in boxes] == [label for label, _, _ in wanted]
    for (_, _, box), (_, _, other) in zip(boxes, wanted, strict=True):
        assert box == pytest.approx(other, abs=3)


def test_an_answer_says_who_gave_it_and_where_the_time_went(vision: Server, clear: Picture) -> None:
    answer = vision.vision.Detect(detect_request(jpeg(clear.image)))
    assert answer.model == "shapes-detector"
    assert answer.model_version
    confidences = [detection.confidence for detection in answer.detections]
    assert confidences == sorted(confidences, reverse=True)
    for detection in answer.detections:
        assert LABELS[detection.class_id] == detection.label
        assert 0 <= detection.box.x_min_px < detection.box.x_max_px <= clear.image.width
        assert 0 <= detection.box.y_min_px < detection.box.y_max_px <= clear.image.height
    times = answer.timings
    assert times.batch_size >= 1
    assert 0 < times.inference_ms <= times.total_ms
    assert 0 < times.decode_ms <= times.total_ms
    assert not answer.annotated_image


def test_min_confidence_leaves_out_what_is_less_sure(vision: Server, clear: Picture) -> None:
    content = jpeg(clear.image)
    everything = vision.vision.Detect(detect_request(content, min_confidence=0.01)).detections
    limit = sorted(detection.confidence for detection in everything)[len(everything) // 2]
    kept = vision.vision.Detect(detect_request(content, min_confidence=limit)).detections
    assert [d.confidence for d in kept] == [d.confidence for d in everything if d.confidence >= limit]
    assert 0 < len(kept) < len(everything)


def test_labels_are_a_filter(vision: Server, clear: Picture) -> None:
    wanted = clear.shapes[0].label
    answer = vision.vision.Detect(detect_request(jpeg(clear.image), labels=[wanted]))
    assert [d.label for d in answer.detections] == [s.label for s in clear.shapes if s.label == wanted]


def test_max_detections_keeps_the_surest(vision: Server, clear: Picture) -> None:
    content = jpeg(clear.image)
    everything = vision.vision.Detect(detect_request(content)).detections
    kept = vision.vision.Detect(detect_request(content, max_detections=2)).detections
    assert list(kept) == list(everything[:2])


@pytest.mark.parametrize("orientation", [1, 6])
def test_annotate_draws_into_the_picture_as_it_is_seen(vision: Server, clear: Picture, orientation: int) -> None:
    answer = vision.vision.Detect(detect_request(turned_jpeg(clear.image, orientation), annotate=True))
    drawn = Image.open(io.BytesIO(answer.annotated_image))
    assert drawn.format == "JPEG"
    assert drawn.size == clear.image.size
    assert not drawn.getexif().get(0x0112, 0) > 1
    # Something was drawn on every shape's edge, and nearly nothing elsewhere.
    difference = ImageChops.difference(drawn.convert("RGB"), clear.image).convert("L").point(lambda v: 255 * (v > 60))
    for shape in clear.shapes:
        x0, y0, x1, y1 = (round(edge) for edge in shape.box)
        assert difference.crop((x0 - 4, y0 - 4, x1 + 4, y1 + 4)).getbbox()
    assert sum(difference.histogram()[128:]) < 0.2 * drawn.width * drawn.height


def test_what_is_found_does_not_depend_on_who_looks_at_the_picture(vision: Server, clear: Picture) -> None:
    # A JPEG that is decoded small for the model, and whole for whoever draws on it or asks about it.
    content = jpeg(clear.fitted(1280).image)
    plain = vision.vision.Detect(detect_request(content)).detections
    drawn = vision.vision.Detect(detect_request(content, annotate=True))
    request = pb.AnalyzeRequest(image=image_pb2.Image(content=content), question="How many shapes are there?")
    assert list(plain) == list(drawn.detections) == list(vision.vision.Analyze(request).detection.detections)
    assert Image.open(io.BytesIO(drawn.annotated_image)).width == drawn.width_px


def test_an_empty_scene_has_no_boxes(vision: Server) -> None:
    blank = Image.new("RGB", (640, 480), "#f5f5f5")
    assert not vision.vision.Detect(detect_request(jpeg(blank))).detections


def test_a_model_that_does_not_segment_answers_no_masks(vision: Server, clear: Picture) -> None:
    content = jpeg(clear.image)
    asked = vision.vision.Detect(detect_request(content, masks=True, mask_form=detection_pb2.MASK_FORM_RLE)).detections
    assert found(asked) == found(vision.vision.Detect(detect_request(content)).detections)
    assert not any(one.HasField("mask") for one in asked)


def test_models_and_devices_tell_of_themselves(vision: Server) -> None:
    listed = vision.models.ListModels(model_service_pb2.ListModelsRequest()).models
    # What else is shipped is listed too, unloaded.
    models = {model.name: model for model in listed if model.state != model_service_pb2.MODEL_STATE_UNLOADED}
    assert set(models) == {"shapes-detector", "shapes-describer"}
    detector, describer = models["shapes-detector"], models["shapes-describer"]
    assert (detector.task, describer.task) == (model_service_pb2.TASK_DETECT, model_service_pb2.TASK_GENERATE)
    assert tuple(detector.labels) == LABELS
    assert detector.input_size_px == 320
    for model in models.values():
        assert model.state == model_service_pb2.MODEL_STATE_READY
        assert model.load_progress == 1
        assert model.is_default
        assert model.memory_bytes > 100_000
        one = vision.models.GetModel(model_service_pb2.GetModelRequest(name=model.name)).model
        assert one.version == model.version
    devices = vision.devices.ListDevices(device_service_pb2.ListDevicesRequest()).devices
    assert devices
    assert all(device.name and 0 < device.memory_used_bytes < device.memory_total_bytes for device in devices)
    assert all(0 <= device.busy_ratio <= 1 for device in devices)
