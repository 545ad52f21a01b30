"""Objects keep their numbers through a stream, whatever else the server does meanwhile; each stream numbers its own."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai4thai import VisionClient
from ai4thai.cli import app
from ai4thai.vision.v1 import detection_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from tests.end_to_end.calling import Server, detect_request, refused
from tests.end_to_end.conftest import wait_until_ready
from tests.end_to_end.pictures import found, jpeg
from tests.processes import ServerProcess

WIDTH_PX, HEIGHT_PX = 480, 360
FRAMES = 30
# The square leaves to the left while the triangle enters from the right.
LAST_OF_SQUARE, FIRST_OF_TRIANGLE = 12, 18

TRACKERS = pytest.mark.parametrize("tracker", [pb.TRACKER_BYTETRACK, pb.TRACKER_BOTSORT], ids=["bytetrack", "botsort"])


@dataclass(frozen=True)
class Shot:
    """One frame of a film: a JPEG, and where each shape is in it: left, top, right, bottom in pixels."""

    content: bytes
    boxes: dict[str, tuple[float, float, float, float]]


def corners(label: str, left: float, top: float, side: float) -> list[tuple[float, float]]:
    if label == "triangle":
        return [(left + side / 2, top), (left + side, top + side), (left, top + side)]
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.4, 1.0) * side / 2
    middle_x, middle_y = left + side / 2, top + side / 2
    return [
        (middle_x + radius * np.cos(turn), middle_y + radius * np.sin(turn))
        for radius, turn in zip(radii, turns, strict=True)
    ]


def draw(canvas: Image.Image, label: str, left: float, top: float, side: float, colour: str) -> None:
    pen = ImageDraw.Draw(canvas)
    if label == "circle":
        pen.ellipse((left, top, left + side, top + side), fill=colour)
    elif label == "square":
        pen.rectangle((left, top, left + side, top + side), fill=colour)
    else:
        pen.polygon(corners(label, left, top, side), fill=colour)


@cache
def ground() -> Image.Image:
    """Light, softly patterned, larger than a frame: what a camera's motion can be seen by."""
    cells = np.random.default_rng(1).integers(170, 256, (70, 90, 3), np.uint8)
    return Image.fromarray(cells).resize((WIDTH_PX + 200, HEIGHT_PX + 200), Image.Resampling.BICUBIC)


@cache
def film(*, faster: float = 1.0, jump_px: int = 0) -> tuple[Shot, ...]:
    """A circle and a star that pass each other, a square that leaves, a triangle that comes; by `jump_px` the camera jumps."""
    shots = []
    for number in range(FRAMES):
        camera_px = jump_px * (number % 2)
        moved = number * faster
        canvas = ground().crop((camera_px, 0, camera_px + WIDTH_PX, HEIGHT_PX))
        places = {"circle": (30 + 6 * moved, 30.0, 64.0, "red"), "star": (370 - 6 * moved, 250.0, 72.0, "purple")}
        if number <= LAST_OF_SQUARE:
            places["square"] = (70 - 2 * moved, 150.0, 60.0, "blue")
        if number >= FIRST_OF_TRIANGLE:
            places["triangle"] = (400 - 4 * (moved - FIRST_OF_TRIANGLE * faster), 130.0, 66.0, "green")
        boxes = {}
        for label, (left, top, side, colour) in places.items():
            draw(canvas, label, left - camera_px, top, side, colour)
            boxes[label] = (left - camera_px, top, left - camera_px + side, top + side)
        shots.append(Shot(jpeg(canvas), boxes))
    return tuple(shots)


def config(**fields: Any) -> pb.DetectStreamRequest:
    return pb.DetectStreamRequest(config=pb.StreamConfig(**fields))


def frame(number: int, content: bytes) -> pb.DetectStreamRequest:
    return pb.DetectStreamRequest(frame=pb.Frame(frame_id=number, image=image_pb2.Image(content=content)))


def played(vision: Server, shots: Sequence[Shot], **fields: Any) -> list[pb.FrameResult]:
    """The results of a stream of the film's frames."""
    requests = [config(**fields), *(frame(number, shot.content) for number, shot in enumerate(shots))]
    *responses, last = vision.vision.DetectStream(iter(requests), timeout=100)
    assert last.WhichOneof("message") == "summary"
    return [response.result for response in responses]


def close(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes share most of what they cover."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return False
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (both - width * height) > 0.5


def numbers_by_shape(results: Sequence[pb.FrameResult], shots: Sequence[Shot]) -> dict[str, list[int | None]]:
    """For each shape of the film the numbers that it had, frame after frame; frames in which it was not found are left out."""
    numbers: dict[str, list[int | None]] = {}
    for result, shot in zip(results, shots, strict=True):
        for detection, (_, _, box) in zip(result.detection.detections, found(result.detection.detections), strict=True):
            label = next((label for label, place in shot.boxes.items() if close(box, place)), None)
            if label is not None:
                numbers.setdefault(label, []).append(detection.track_id if detection.HasField("track_id") else None)
    return numbers


def assert_followed(results: Sequence[pb.FrameResult], shots: Sequence[Shot]) -> None:
    """Each shape was found nearly always, under one number of its own; who came later got a later one."""
    numbers = numbers_by_shape(results, shots)
    kept = {}
    for label in ("circle", "star", "square", "triangle"):
        seen = numbers[label]
        assert len(seen) >= 0.8 * sum(label in shot.boxes for shot in shots), (label, seen)
        # An object that comes is followed from its second frame on.
        assert None not in seen[1:], (label, seen)
        of_its_own = set(seen) - {None}
        assert len(of_its_own) == 1, (label, seen)
        kept[label] = of_its_own.pop()
    assert sorted(kept[label] or 0 for label in ("circle", "star", "square")) == [1, 2, 3]
    assert (kept["triangle"] or 0) > 3


@TRACKERS
def test_shapes_that_move_leave_and_come_keep_their_numbers(vision: Server, tracker: pb.Tracker.ValueType) -> None:
    assert_followed(played(vision, film(), tracker=tracker), film())


def test_without_a_tracker_nothing_is_numbered(vision: Server) -> None:
    for result in played(vision, film()[:3]):
        assert result.detection.detections
        assert not any(detection.HasField("track_id") for detection in result.detection.detections)


def test_botsort_makes_up_for_a_camera_that_jumps(vision: Server) -> None:
    """Between two frames everything jumps by most of its own width: by motion alone nothing could be recognised."""
    shots = film(jump_px=52)
    steady = numbers_by_shape(played(vision, shots, tracker=pb.TRACKER_BOTSORT), shots)
    lost = numbers_by_shape(played(vision, shots, tracker=pb.TRACKER_BYTETRACK), shots)
    for label in ("circle", "star"):
        assert len(set(steady[label])) == 1, steady[label]
        assert None in lost[label], lost[label]


@TRACKERS
def test_two_cameras_of_one_model_number_their_own_objects_ultralytics_13107_22483(
    vision: Server, tracker: pb.Tracker.ValueType
) -> None:
    """One model, many cameras, batched together: each stream answers what it answers alone, frame by frame."""
    films = [film(faster=1.0), film(faster=0.6)]
    alone = [numbers_by_shape(played(vision, shots, tracker=tracker), shots) for shots in films]
    with ThreadPoolExecutor(4) as callers:
        together = list(callers.map(lambda shots: played(vision, shots, tracker=tracker), films * 2))
    for stream, results in enumerate(together):
        assert numbers_by_shape(results, films[stream % 2]) == alone[stream % 2]
        assert_followed(results, films[stream % 2])


def test_a_tracked_stream_is_not_disturbed_by_single_calls_ultralytics_23285(vision: Server) -> None:
    """There, a second caller of the model object made the first one's tracker go blind."""
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            vision.vision.Detect(detect_request(film()[0].content, min_confidence=0.9), timeout=60)

    caller = threading.Thread(target=others)
    caller.start()
    try:
        results = played(vision, film(), tracker=pb.TRACKER_BYTETRACK)
    finally:
        over.set()
        caller.join()
    assert_followed(results, film())


def test_bad_frames_between_do_not_disturb_the_numbers(vision: Server) -> None:
    shots = list(film())
    requests = [config(tracker=pb.TRACKER_BYTETRACK)]
    for number, shot in enumerate(shots):
        requests.append(frame(number, shot.content))
        if number % 5 == 2:
            requests.append(frame(1000 + number, b"no image"))
    *responses, last = vision.vision.DetectStream(iter(requests), timeout=100)
    results = [response.result for response in responses]
    assert [result.frame_id for result in results if result.WhichOneof("outcome") == "error"] == [
        1002,
        1007,
        1012,
        1017,
        1022,
        1027,
    ]
    assert_followed([result for result in results if result.WhichOneof("outcome") == "detection"], shots)
    assert (last.summary.detected_count, last.summary.error_count) == (FRAMES, 6)


def test_dropped_frames_cost_no_numbers(vision: Server) -> None:
    """Three frames are on their way and one is worked on at once: what is still looked at keeps its numbers."""
    shots = film()
    fields: dict[str, Any] = {"tracker": pb.TRACKER_BYTETRACK, "overflow": pb.OVERFLOW_DROP_OLDEST, "max_in_flight": 1}
    answered = threading.Semaphore(3)

    def camera() -> Iterator[pb.DetectStreamRequest]:
        yield config(**fields)
        for number in range(FRAMES):
            assert answered.acquire(timeout=30)
            yield frame(number, shots[number].content)

    results = []
    for response in vision.vision.DetectStream(camera(), timeout=60):
        answered.release()
        if response.WhichOneof("message") == "result":
            results.append(response.result)
    looked_at = [result for result in results if result.WhichOneof("outcome") == "detection"]
    assert FRAMES // 4 <= len(looked_at) < FRAMES
    numbers = numbers_by_shape(looked_at, [shots[result.frame_id] for result in looked_at])
    for label in ("circle", "star"):
        assert len(set(numbers[label])) == 1, numbers[label]


@TRACKERS
def test_only_what_the_caller_asked_for_is_answered(vision: Server, tracker: pb.Tracker.ValueType) -> None:
    """The tracker looks at weaker boxes too; they are not answered."""
    options = detection_pb2.DetectOptions(min_confidence=0.6, max_detections=2, labels=["circle", "star"])
    plain = played(vision, film()[:8], options=options)
    for result, untracked in zip(played(vision, film()[:8], options=options, tracker=tracker), plain, strict=True):
        assert len(result.detection.detections) <= 2
        assert [(d.label, d.confidence, d.box) for d in result.detection.detections] == [
            (d.label, d.confidence, d.box) for d in untracked.detection.detections
        ]


def test_the_numbers_are_drawn_into_the_picture(vision: Server) -> None:
    options = detection_pb2.DetectOptions(annotate=True)
    (tracked,) = played(vision, film()[:1], options=options, tracker=pb.TRACKER_BYTETRACK)
    (plain,) = played(vision, film()[:1], options=options)
    with_numbers, without = (
        np.asarray(Image.open(io.BytesIO(result.detection.annotated_image))).astype(int) for result in (tracked, plain)
    )
    assert with_numbers.shape == without.shape == (HEIGHT_PX, WIDTH_PX, 3)
    differs = np.abs(with_numbers - without).max(2) > 60
    assert differs.any(), "the labels are longer by the numbers"
    # Nothing but labels differs: they are on the boxes' upper edges.
    rows = np.flatnonzero(differs.any(1))
    assert {"circle": 30, "star": 250, "square": 150}.keys() <= film()[0].boxes.keys()
    assert all(any(abs(row - top) < 45 for top in (30, 250, 150)) for row in rows)


def test_the_client_follows_objects_and_the_command_line_counts_and_draws_them(vision: Server, tmp_path: Path) -> None:
    shots = film()
    with (
        VisionClient(vision.address) as client,
        client.detect_stream([shot.content for shot in shots], tracker="botsort", overflow="block") as stream,
    ):
        results = list(stream)
    circles = {d.track_id for r in results if r.detection for d in r.detection.detections if d.label == "circle"}
    assert len(circles) == 1
    assert stream.summary.detected_count == FRAMES

    folder, drawn = tmp_path / "film", tmp_path / "drawn"
    folder.mkdir()
    for number, shot in enumerate(shots[:10]):
        (folder / f"{number:02d}.jpg").write_bytes(shot.content)
    arguments = ["stream", folder, "--tracker", "bytetrack", "--save-dir", drawn, "--vision", vision.address]
    said = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    assert "10 images answered" in said.stdout
    assert "followed: circle, square, star" in said.stdout
    assert len(list(drawn.glob("*.jpg"))) == 10

    arguments += ["--json", "--drop-oldest", "--max-in-flight", "1"]
    lines = CliRunner().invoke(app, [str(argument) for argument in arguments]).stdout.splitlines()
    *images, last = [json.loads(line) for line in lines]
    assert [line["frame_id"] for line in images] == list(range(10))
    assert last["summary"]["dropped_count"] == sum(line["dropped"] for line in images)


def test_a_tracker_that_does_not_exist_is_refused_before_anything_is_sent(vision: Server) -> None:
    with VisionClient(vision.address) as client, pytest.raises(ValueError, match="bytetrack, botsort"):
        client.detect_stream([], tracker="sort")


@pytest.fixture(scope="module")
def other_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own whose models turn boxes, classify and segment."""
    env = {
        "AI4THAI_DATA_DIR": str(tmp_path_factory.mktemp("other")),
        "VISION_SERVICE_PORT": "0",
        "VISION_DETECTOR": "shapes-oriented,shapes-classifier,shapes-segmenter",
        "VISION_DESCRIBER": "",
    }
    with ServerProcess("vision_server", env=env) as process:
        wait_until_ready(process)
        server = Server(process)
        yield server
        server.close()


@TRACKERS
def test_oriented_boxes_are_followed(other_tasks: Server, tracker: pb.Tracker.ValueType) -> None:
    results = played(other_tasks, film(), tracker=tracker)
    assert all(d.HasField("oriented_box") for result in results for d in result.detection.detections)
    numbers = numbers_by_shape(results, film())
    for label in ("circle", "star"):
        assert len(numbers[label]) >= 0.8 * FRAMES
        assert len(set(numbers[label])) == 1, numbers[label]


def test_a_model_that_finds_no_objects_cannot_be_tracked(other_tasks: Server) -> None:
    options = detection_pb2.DetectOptions(model="shapes-classifier")
    said = refused(lambda: played(other_tasks, film()[:1], options=options, tracker=pb.TRACKER_BYTETRACK))
    assert (said.code, said.reason, said.field) == ("INVALID_ARGUMENT", "INVALID_FIELD", "config.tracker")
    assert "shapes-classifier" in said.message
    (result,) = played(other_tasks, film()[:1], options=options)
    assert result.detection.classes


def test_masks_stay_with_the_objects_that_are_followed(other_tasks: Server) -> None:
    """Of the weak boxes that only the tracker looks at nothing is left, and every object has its own mask."""
    options = detection_pb2.DetectOptions(model="shapes-segmenter", masks=True)
    plain = played(other_tasks, film()[:4], options=options)
    tracked = played(other_tasks, film()[:4], options=options, tracker=pb.TRACKER_BYTETRACK)
    for result, untracked in zip(tracked, plain, strict=True):
        assert len(result.detection.detections) >= 3
        for one, other in zip(result.detection.detections, untracked.detection.detections, strict=True):
            assert one.mask.polygon.points
            assert (one.box, one.mask) == (other.box, other.mask)
            assert one.track_id
