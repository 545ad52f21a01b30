"""Requests are checked and named by their field before anything works on them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from ai4thai.vision.v1 import (
    detection_pb2,
    device_service_pb2,
    generation_pb2,
    image_pb2,
    model_service_pb2,
    vision_service_pb2,
)
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import Code, ServiceError
from vision_server import wire
from vision_server.requests import (
    DetectOptions,
    EncodedImage,
    GenerateOptions,
    MaskForm,
    Priority,
    RawPixels,
    Role,
    Tracker,
)
from vision_server.results import (
    Box,
    Card,
    Detection,
    Detections,
    DeviceInfo,
    FinishReason,
    GenerateSummary,
    GenerateTimings,
    ModelInfo,
    ModelState,
    Task,
    Timings,
    Usage,
)
from vision_server.settings import VisionSettings

SETTINGS = VisionSettings()
NAN = math.nan
user = generation_pb2.ROLE_USER


def refusal(read: Any, *arguments: Any) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        read(*arguments)
    return refused.value


def says(text: str, role: int = user) -> generation_pb2.Message:
    return generation_pb2.Message(role=role, parts=[generation_pb2.MessagePart(text=text)])  # type: ignore[arg-type]


def test_what_is_left_out_takes_the_defaults() -> None:
    assert wire.read_detect_options(detection_pb2.DetectOptions()) == DetectOptions()
    assert wire.read_generate_options(generation_pb2.GenerateOptions(), SETTINGS) == GenerateOptions()


def test_a_zero_that_was_sent_is_a_value() -> None:
    options = wire.read_detect_options(detection_pb2.DetectOptions(min_confidence=0, iou_threshold=0))
    assert (options.min_confidence, options.iou_threshold) == (0, 0)
    assert wire.read_generate_options(generation_pb2.GenerateOptions(seed=0), SETTINGS).seed == 0


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"min_confidence": NAN}, "min_confidence"),
        ({"min_confidence": -0.1}, "min_confidence"),
        ({"min_confidence": math.inf}, "min_confidence"),
        ({"iou_threshold": 1.5}, "iou_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"max_detections": 1001}, "max_detections"),
    ],
)
def test_bad_detect_options_are_named(values: dict[str, float], field: str) -> None:
    error = refusal(wire.read_detect_options, detection_pb2.DetectOptions(**values), "config.options")  # type: ignore[arg-type]
    assert (error.code, error.reason, error.field) == (
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        f"config.options.{field}",
    )


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": NAN}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1_000_000}, "max_new_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 9}, "stop"),
    ],
)
def test_bad_generate_options_are_named(values: dict[str, Any], field: str) -> None:
    error = refusal(wire.read_generate_options, generation_pb2.GenerateOptions(**values), SETTINGS)
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, f"options.{field}")


@given(st.floats(width=32, allow_nan=True, allow_infinity=True))
def test_any_float_is_taken_or_refused_by_its_range(value: float) -> None:
    options = detection_pb2.DetectOptions(min_confidence=value)
    if 0 <= value <= 1:
        assert wire.read_detect_options(options).min_confidence == pytest.approx(value)
    else:
        assert refusal(wire.read_detect_options, options).field == "options.min_confidence"


def test_masks_are_asked_for_in_a_form() -> None:
    assert wire.read_detect_options(detection_pb2.DetectOptions(mask_form=detection_pb2.MASK_FORM_RLE)).masks is None
    for form, read in (
        (detection_pb2.MASK_FORM_UNSPECIFIED, MaskForm.POLYGON),
        (detection_pb2.MASK_FORM_POLYGON, MaskForm.POLYGON),
        (detection_pb2.MASK_FORM_RLE, MaskForm.RLE),
    ):
        assert wire.read_detect_options(detection_pb2.DetectOptions(masks=True, mask_form=form)).masks is read
    unknown = detection_pb2.DetectOptions(mask_form=9)  # type: ignore[arg-type]
    assert refusal(wire.read_detect_options, unknown).field == "options.mask_form"


def test_the_priority_is_the_requests_else_the_calls_else_standard() -> None:
    asked = detection_pb2.PRIORITY_BATCH
    silent = detection_pb2.PRIORITY_UNSPECIFIED
    assert wire.read_priority(asked, "interactive") is Priority.BATCH
    assert wire.read_priority(silent, " Interactive ") is Priority.INTERACTIVE
    assert wire.read_priority(silent, None) is Priority.STANDARD
    assert refusal(wire.read_priority, silent, "urgent").field == "x-priority"
    assert refusal(wire.read_priority, 9, None).field == "priority"


def test_a_streams_config_says_how_it_is_followed_and_what_gives_way() -> None:
    pb = vision_service_pb2
    config = pb.StreamConfig(tracker=pb.TRACKER_BOTSORT, overflow=pb.OVERFLOW_DROP_OLDEST, max_in_flight=3)
    read = wire.read_stream_config(config, SETTINGS, "batch")
    assert (read.tracker, read.drop_oldest, read.max_in_flight) == (Tracker.BOTSORT, True, 3)
    assert read.priority is Priority.BATCH
    plain = wire.read_stream_config(pb.StreamConfig(), SETTINGS)
    assert (plain.tracker, plain.drop_oldest, plain.max_in_flight) == (None, False, SETTINGS.max_stream_in_flight)
    assert refusal(wire.read_stream_config, pb.StreamConfig(tracker=9), SETTINGS).field == "config.tracker"  # type: ignore[arg-type]
    assert refusal(wire.read_stream_config, pb.StreamConfig(overflow=9), SETTINGS).field == "config.overflow"  # type: ignore[arg-type]


@pytest.mark.parametrize("aliases", [[""], ["../up"], ["a b"], ["x" * 65], [str(n) for n in range(9)]])
def test_aliases_are_names_and_few(aliases: list[str]) -> None:
    request = model_service_pb2.LoadModelRequest(name="m", aliases=aliases)
    assert refusal(wire.read_aliases, request).field == "aliases"


def test_the_interval_between_devices_is_bounded() -> None:
    request = device_service_pb2.WatchDevicesRequest
    assert wire.read_interval_s(request()) == 1.0
    assert wire.read_interval_s(request(interval=Duration(seconds=2, nanos=500_000_000))) == 2.5
    for interval in (Duration(), Duration(seconds=-1), Duration(seconds=4000)):
        assert refusal(wire.read_interval_s, request(interval=interval)).field == "interval"


@pytest.mark.parametrize("in_flight", [-1, SETTINGS.max_stream_in_flight + 1])
def test_too_many_frames_in_flight_are_refused(in_flight: int) -> None:
    config = vision_service_pb2.StreamConfig(max_in_flight=in_flight)
    assert refusal(wire.read_stream_config, config, SETTINGS).field == "config.max_in_flight"


def test_images_are_read_from_either_source() -> None:
    assert wire.read_image(image_pb2.Image(content=b"x")) == EncodedImage(b"x", "image")
    raw = image_pb2.Image(raw=image_pb2.RawImage(width_px=1, height_px=1, rgb=b"abc"))
    assert wire.read_image(raw, "frame.image") == RawPixels(b"abc", 1, 1, "frame.image")
    for none in (image_pb2.Image(), image_pb2.Image(content=b"")):
        assert refusal(wire.read_image, none).reason == "IMAGE_EMPTY"


def test_a_conversation_is_read_in_order() -> None:
    messages = [says("be brief", generation_pb2.ROLE_SYSTEM), says("hello")]
    messages[1].parts.append(generation_pb2.MessagePart(image=image_pb2.Image(content=b"x")))
    turns = wire.read_messages(messages, SETTINGS)
    assert [turn.role for turn in turns] == [Role.SYSTEM, Role.USER]
    assert turns[1].parts == ("hello", EncodedImage(b"x", "messages[1].parts[1].image"))


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([says("x", generation_pb2.ROLE_UNSPECIFIED)], "messages[0].role"),
        ([says("x", 99)], "messages[0].role"),
        ([says("x"), says("y", generation_pb2.ROLE_SYSTEM), says("z")], "messages[1].role"),
        ([says("x"), says("y", generation_pb2.ROLE_ASSISTANT)], "messages[1].role"),
        ([generation_pb2.Message(role=user)], "messages[0].parts"),
        ([generation_pb2.Message(role=user, parts=[generation_pb2.MessagePart()])], "messages[0].parts[0]"),
        ([says("x" * (SETTINGS.max_text_bytes + 1))], "messages"),
    ],
)
def test_bad_conversations_are_named(messages: list[generation_pb2.Message], field: str) -> None:
    error = refusal(wire.read_messages, messages, SETTINGS)
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, field)


def test_only_the_user_shows_pictures_and_not_too_many() -> None:
    part = generation_pb2.MessagePart(image=image_pb2.Image(content=b"x"))
    assistant = generation_pb2.Message(role=generation_pb2.ROLE_ASSISTANT, parts=[part])
    assert refusal(wire.read_messages, [assistant, says("x")], SETTINGS).field == "messages[0].parts[0].image"
    many = generation_pb2.Message(role=user, parts=[part] * (SETTINGS.max_images_per_request + 1))
    assert refusal(wire.read_messages, [many], SETTINGS).field == "messages"


def test_an_answer_is_written_whole() -> None:
    found = Detection("circle", 0, 0.5, Box(1, 2, 3, 4))
    answer = Detections("m", "v", 10, 20, (found,), (), Timings(1, 2, 3, 4, 10, 5), b"jpeg")
    written = wire.write_detections(answer)
    assert (written.model, written.width_px, written.height_px, written.annotated_image) == ("m", 10, 20, b"jpeg")
    assert written.detections[0].box.y_max_px == 4
    assert not written.detections[0].HasField("track_id")
    assert not written.detections[0].HasField("oriented_box")
    assert written.timings.batch_size == 5


def test_every_state_task_and_finish_reason_has_its_number() -> None:
    for state in ModelState:
        info = ModelInfo("m", Task.UNKNOWN, state, 0.0, False)
        name = model_service_pb2.ModelState.Name(wire.write_model(info).state)
        assert name == f"MODEL_STATE_{state.name}"
    for task in Task:
        card = Card("v", task, "e", "fp32", "cpu", (), 0, 0)
        written = wire.write_model(ModelInfo("m", task, ModelState.READY, 1.0, True, card))
        assert (written.task == 0) == (task is Task.UNKNOWN)
    for reason in FinishReason:
        summary = GenerateSummary("t", reason, Usage(1, 2, 3), GenerateTimings(1, 2, 3), "m")
        assert wire.write_generated(summary).summary.finish_reason != 0


def test_what_a_device_cannot_tell_is_absent() -> None:
    device = wire.write_device(DeviceInfo(0, "cuda", "u", "n", "1g.10gb", 1, 2))
    for name in ("utilization", "temperature_celsius", "power_watts"):
        assert not device.HasField(name)  # type: ignore[arg-type]
