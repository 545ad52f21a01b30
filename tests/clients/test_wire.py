from __future__ import annotations

import subprocess
import sys
from typing import Any, get_type_hints

import ai4thai
import pytest
from ai4thai import job_results, options, queue_answers, results, server_info, wire
from ai4thai.queue.v1 import job_pb2
from ai4thai.results import Detection, DetectResult
from ai4thai.vision.v1 import detection_pb2, generation_pb2, model_service_pb2, vision_service_pb2
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
words = st.text(max_size=20)
ints = st.integers(0, 2**31 - 1)

boxes = st.builds(results.Box, floats, floats, floats, floats)
detections = st.builds(
    Detection,
    label=words,
    class_id=ints,
    confidence=floats,
    box=boxes,
    oriented_box=st.none() | st.builds(results.OrientedBox, floats, floats, floats, floats, floats),
    keypoints=st.lists(st.builds(results.Keypoint, words, floats, floats, floats), max_size=3).map(tuple),
    mask=st.none()
    | st.builds(results.Polygon, st.lists(st.tuples(floats, floats), max_size=5).map(tuple))
    | st.builds(results.RunLengths, ints, ints, st.lists(ints, max_size=5).map(tuple)),
    track_id=st.none() | st.integers(-(2**63), 2**63 - 1),
)


def mask_as_proto(mask: results.Polygon | results.RunLengths | None) -> detection_pb2.Mask | None:
    if isinstance(mask, results.Polygon):
        points = [detection_pb2.Point(x_px=x, y_px=y) for x, y in mask.points]
        return detection_pb2.Mask(polygon=detection_pb2.Polygon(points=points))
    return detection_pb2.Mask(rle=detection_pb2.RunLengths(**vars(mask))) if mask else None


def as_proto(result: DetectResult) -> vision_service_pb2.DetectResponse:
    """The same values as the server writes them, field by field."""
    return vision_service_pb2.DetectResponse(
        model=result.model,
        width_px=result.width_px,
        height_px=result.height_px,
        detections=[
            detection_pb2.Detection(
                label=item.label,
                class_id=item.class_id,
                confidence=item.confidence,
                box=detection_pb2.Box(**vars(item.box)),
                oriented_box=detection_pb2.OrientedBox(**vars(item.oriented_box)) if item.oriented_box else None,
                keypoints=[detection_pb2.Keypoint(**vars(point)) for point in item.keypoints],
                mask=mask_as_proto(item.mask),
                track_id=item.track_id,
            )
            for item in result.detections
        ],
        annotated_image=result.annotated_image,
        timings=detection_pb2.Timings(**vars(result.timings)),
    )


@given(
    st.builds(
        DetectResult,
        model=words,
        model_version=st.just(""),
        width_px=ints,
        height_px=ints,
        detections=st.lists(detections, max_size=4).map(tuple),
        classes=st.just(()),
        annotated_image=st.binary(max_size=10),
        timings=st.builds(results.Timings, floats, floats, floats, floats, floats, ints),
    )
)
def test_a_detection_comes_back_as_it_was(result: DetectResult) -> None:
    bytes_on_the_wire = as_proto(result).SerializeToString()
    assert wire.read_detect(vision_service_pb2.DetectResponse.FromString(bytes_on_the_wire)) == result


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "model": words,
            "min_confidence": st.none() | floats,
            "iou_threshold": st.none() | floats,
            "max_detections": st.none() | ints,
            "labels": st.lists(words, max_size=3),
            "annotate": st.booleans(),
        },
    )
)
def test_only_what_was_given_is_sent(given_options: Any) -> None:
    message = wire.write_detect_options(given_options)

    for name in ("min_confidence", "iou_threshold", "max_detections"):
        value = given_options.get(name)
        assert message.HasField(name) == (value is not None)
        assert value is None or getattr(message, name) == value
    assert list(message.labels) == given_options.get("labels", [])


def test_options_have_the_contracts_names() -> None:
    contract = set(detection_pb2.DetectOptions.DESCRIPTOR.fields_by_name)
    assert set(get_type_hints(options.DetectOptions)) == contract
    contract = set(vision_service_pb2.StreamConfig.DESCRIPTOR.fields_by_name) - {"options"}
    assert set(get_type_hints(options.StreamOptions)) - set(get_type_hints(options.DetectOptions)) == contract
    contract = set(generation_pb2.GenerateOptions.DESCRIPTOR.fields_by_name)
    assert set(get_type_hints(options.TextOptions)) - {"model"} == contract


def test_words_are_sent_as_the_contracts_values() -> None:
    asked = wire.write_detect_options({"masks": True, "mask_form": "RLE"})
    assert (asked.masks, asked.mask_form) == (True, detection_pb2.MASK_FORM_RLE)
    config = wire.write_stream_config(
        {"model": "m", "tracker": "ByteTrack", "overflow": "drop_oldest", "priority": "batch", "max_in_flight": 3}
    ).config
    assert (config.options.model, config.max_in_flight) == ("m", 3)
    assert config.tracker == vision_service_pb2.TRACKER_BYTETRACK
    assert config.overflow == vision_service_pb2.OVERFLOW_DROP_OLDEST
    assert config.priority == detection_pb2.PRIORITY_BATCH
    assert wire.write_detect(b"image", {}, "Interactive").priority == detection_pb2.PRIORITY_INTERACTIVE
    assert wire.write_analyze(b"image", "?", {}, {}, "batch").priority == detection_pb2.PRIORITY_BATCH
    assert wire.write_generate([], {}, "batch").priority == detection_pb2.PRIORITY_BATCH
    assert wire.write_generate([], {}).priority == detection_pb2.PRIORITY_UNSPECIFIED


@pytest.mark.parametrize("name", ["tracker", "overflow", "priority", "mask_form"])
def test_other_words_are_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"'vague' is none of [a-z]+, [a-z]+"):
        wire.write_stream_config({name: "vague"})  # type: ignore[misc]


def test_masks_tell_their_area_and_become_arrays() -> None:
    square = results.Polygon(((1, 1), (4, 1), (4, 3), (1, 3)))
    assert square.area_px == 6
    lengths = results.RunLengths(height_px=3, width_px=4, counts=(4, 2, 1, 2, 3))
    assert lengths.area_px == 4
    assert lengths.to_array().tolist() == [
        [False, False, False, False],
        [False, True, True, False],
        [False, True, True, False],
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (job_results.JobState, job_pb2.JobState, "JOB_STATE_"),
        (job_results.Priority, job_pb2.Priority, "PRIORITY_"),
        (results.FinishReason, generation_pb2.FinishReason, "FINISH_REASON_"),
        (server_info.Task, model_service_pb2.Task, "TASK_"),
        (server_info.ModelState, model_service_pb2.ModelState, "MODEL_STATE_"),
    ],
)
def test_enums_have_the_contracts_values(ours: Any, theirs: Any, prefix: str) -> None:
    assert {prefix + value for value in ours} == set(theirs.keys())
    assert [wire.read_value(ours, theirs, number) for number in theirs.values()] == [
        ours(name.removeprefix(prefix))
        for name in theirs.keys()  # noqa: SIM118 (it is no mapping)
    ]


def test_a_value_that_a_later_server_has_added_is_unspecified() -> None:
    job = queue_answers.read_job(job_pb2.Job(job_id="job-1", state=99, priority=99))
    assert (job.state, job.priority) == ("UNSPECIFIED", "UNSPECIFIED") and not job.state.is_end
    model = wire.read_model(model_service_pb2.Model(name="a", task=99, state=99))
    assert (model.task, model.state) == ("UNSPECIFIED", "UNSPECIFIED")


@given(st.integers(0, 2**31), st.integers(0, 999))
def test_times_are_in_utc_to_the_millisecond(seconds: int, millis: int) -> None:
    job = job_pb2.Job(job_id="job-1", state=job_pb2.JOB_STATE_RUNNING)
    job.create_time.FromMilliseconds(seconds * 1000 + millis)

    read = queue_answers.read_job(job)

    assert read.create_time is not None and read.create_time.utcoffset() is not None
    assert round(read.create_time.timestamp() * 1000) == seconds * 1000 + millis
    assert read.end_time is None


def test_a_result_of_a_kind_not_known_yet_is_none() -> None:
    job = json_format.ParseDict({"job_id": "job-1", "state": "JOB_STATE_SUCCEEDED", "result": {}}, job_pb2.Job())
    assert queue_answers.read_job(job).result is None


def test_what_the_package_exports_is_there() -> None:
    for name in ai4thai.__all__:
        assert getattr(ai4thai, name).__name__ == name
    assert set(ai4thai.__all__) <= set(dir(ai4thai))
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = ai4thai.Nonsense


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ai4thai.vision.v1.vision_service_pb2", ["ai4thai.vision_client", "typer", "rich", "numpy"]),
        ("from ai4thai import VisionClient, QueueClient", ["typer", "rich", "numpy", "PIL", "httpx"]),
        ("import ai4thai.cli", ["serving", "vision_server", "queue_server", "torch", "numpy", "PIL", "cv2"]),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, absent: list[str]) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
