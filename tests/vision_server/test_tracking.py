"""A stream's tracker by itself: what it is given, what it hands on, what it forgives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from vision_server.images import Image
from vision_server.requests import DetectOptions, Tracker
from vision_server.results import Box, Detection, OrientedBox
from vision_server.tracking import LOW_CONFIDENCE, MOTION_SIDE_PX, Tracking, sought

pytestmark = pytest.mark.usefixtures("data_dir")

both = pytest.mark.parametrize("kind", list(Tracker))


def blank(width_px: int = 320, height_px: int = 240) -> Image:
    return Image(np.full((height_px, width_px, 3), 200, np.uint8), width_px, height_px)


def textured(width_px: int, height_px: int, left_px: int = 0) -> Image:
    """A piece of one wide pattern, coarse and fine, from `left_px` on."""
    rng = np.random.default_rng(3)
    layers = [
        rng.integers(0, 128, (height_px // cell_px + 2, width_px * 2 // cell_px + 2, 3), np.uint8)
        for cell_px in (8, 64)
    ]
    coarse_and_fine = [
        Pillow.fromarray(layer).resize((width_px * 2, height_px), Pillow.Resampling.BICUBIC) for layer in layers
    ]
    wide = np.sum([np.asarray(layer) for layer in coarse_and_fine], axis=0)
    return Image(np.ascontiguousarray(wide[:, left_px : left_px + width_px], np.uint8), width_px, height_px)


def upright(x_px: float, confidence: float = 0.9, y_px: float = 50, side_px: float = 40) -> Detection:
    return Detection("star", 3, confidence, Box(x_px, y_px, x_px + side_px, y_px + side_px))


def turned(x_px: float, degrees: float) -> Detection:
    box = Box(x_px - 30, 30, x_px + 30, 90)
    return Detection("star", 3, 0.9, box, OrientedBox(x_px, 60, 60, 20, degrees))


def numbers(tracking: Tracking, *found: Detection, image: Image | None = None) -> list[int | None]:
    return [detection.track_id for detection in tracking.follow(image or blank(), found)]


@both
def test_numbers_begin_at_one_in_every_stream_and_are_never_given_twice(kind: Tracker) -> None:
    for _ in range(2):
        tracking = Tracking(kind, DetectOptions())
        assert sorted(numbers(tracking, upright(10), upright(200))) == [1, 2]  # type: ignore[type-var]
        for _ in range(40):  # longer than a lost object is remembered
            assert numbers(tracking) == []
        assert numbers(tracking, upright(10)) == [None], "seen for the first time: not followed yet"
        assert numbers(tracking, upright(10)) == [3]


@both
def test_two_streams_whose_frames_alternate_do_not_mix(kind: Tracker) -> None:
    """Ultralytics #23285: one model object that two sources share gives objects of one the numbers of the other."""
    first, second = Tracking(kind, DetectOptions()), Tracking(kind, DetectOptions())
    for step in range(20):
        assert numbers(first, upright(10 + 4 * step)) == [1]
        assert numbers(second, upright(10 + 4 * step), upright(200 - 4 * step, y_px=150)) == [1, 2]


@both
def test_a_weak_moment_does_not_end_a_track_and_is_not_answered(kind: Tracker) -> None:
    options = DetectOptions(min_confidence=0.5)
    assert sought(options).min_confidence == LOW_CONFIDENCE
    tracking = Tracking(kind, options)
    for step in range(4):
        assert numbers(tracking, upright(10 + step)) == [1]
    for step in range(4, 44):
        assert numbers(tracking, upright(10 + step, confidence=0.15)) == []
    assert numbers(tracking, upright(54)) == [1], "without the weak ones it would have been forgotten after 30 frames"


@both
def test_what_the_caller_did_not_ask_for_keeps_its_number_while_it_is_left_out(kind: Tracker) -> None:
    options = DetectOptions(max_detections=1)
    assert sought(options).max_detections > 1
    tracking = Tracking(kind, options)
    strong, weak = upright(10), upright(200, confidence=0.6)
    for _ in range(40):
        assert numbers(tracking, strong, weak) == [1]
    assert numbers(tracking, weak) == [2]


def test_what_is_weaker_than_a_tracker_looks_at_is_answered_without_a_number() -> None:
    options = DetectOptions(min_confidence=0.02)
    assert sought(options).min_confidence == 0.02
    tracking = Tracking(Tracker.BYTETRACK, options)
    assert numbers(tracking, upright(10), upright(200, confidence=0.05)) == [1, None]


@both
def test_all_but_the_number_stays_as_it_was(kind: Tracker) -> None:
    tracking = Tracking(kind, DetectOptions())
    found = (upright(10), upright(200, confidence=0.7), turned(100, 3))[:2]
    first, second = tracking.follow(blank(), found)
    assert (first.box, first.confidence, first.label) == (found[0].box, found[0].confidence, "star")
    assert second.box == found[1].box


@both
def test_oriented_boxes_are_followed_while_they_turn(kind: Tracker) -> None:
    tracking = Tracking(kind, DetectOptions())
    for step in range(40):
        degrees = (7 * step + 90) % 180 - 90  # through the jump from 90 to -90 degrees
        shift = 2 * math.sin(step / 5)
        assert numbers(tracking, turned(60 + shift, degrees), turned(220 - shift, -degrees)) == [1, 2]
    assert numbers(tracking) == []


@both
def test_bars_that_cross_are_told_apart_by_their_angles(kind: Tracker) -> None:
    tracking = Tracking(kind, DetectOptions())
    level, upright_bar = turned(100, 5), turned(100, 80)
    for step in range(10):
        if step % 2:
            assert numbers(tracking, upright_bar, level) == [2, 1]
        else:
            assert numbers(tracking, level, upright_bar) == [1, 2]


JUMP_PX, OBJECT_PX = 64, 40  # by more than its own width


def filmed_by_a_jumping_camera(tracking: Tracking, reduction: int = 1) -> list[int | None]:
    """The numbers that an object has whose whole picture, 640 × 320 pixels, jumps to and fro; decoded reduced perhaps."""
    had: list[int | None] = []
    for turn in range(8):
        camera_px = JUMP_PX * (turn % 2)
        seen = textured(640, 320, camera_px)
        image = Image(np.ascontiguousarray(seen.rgb[::reduction, ::reduction]), 640, 320, reduction)
        had += numbers(tracking, upright(300 - camera_px, y_px=150, side_px=OBJECT_PX), image=image)
    return had


@pytest.mark.parametrize(
    ("largest_side_px", "reduction"), [(MOTION_SIDE_PX, 1), (320, 1), (MOTION_SIDE_PX, 2), (160, 2)]
)
def test_botsort_makes_up_for_a_camera_that_jumps_in_pictures_of_every_scale(
    monkeypatch: pytest.MonkeyPatch, largest_side_px: int, reduction: int
) -> None:
    monkeypatch.setattr("vision_server.tracking.MOTION_SIDE_PX", largest_side_px)
    assert filmed_by_a_jumping_camera(Tracking(Tracker.BOTSORT, DetectOptions()), reduction) == [1] * 8


def test_bytetrack_does_not() -> None:
    assert None in filmed_by_a_jumping_camera(Tracking(Tracker.BYTETRACK, DetectOptions()))


def test_frames_that_change_their_size_are_followed_on() -> None:
    tracking = Tracking(Tracker.BOTSORT, DetectOptions())
    for width_px, height_px in [(320, 240), (320, 240), (200, 300), (200, 300), (1, 1)]:
        assert numbers(tracking, upright(300, y_px=150), image=textured(width_px, height_px)) == [1]
    assert filmed_by_a_jumping_camera(tracking) == [1] * 8, "the camera's motion is found again"
    for width_px, height_px in [(3000, 20), (20, 3000), (3000, 1)]:
        assert len(numbers(tracking, upright(10), image=textured(width_px, height_px))) == 1


def test_the_low_confidence_is_the_one_of_ultralytics_settings() -> None:
    from ultralytics.utils import ROOT, YAML

    for kind in Tracker:
        assert YAML.load(Path(ROOT) / "cfg" / "trackers" / f"{kind}.yaml")["track_low_thresh"] == LOW_CONFIDENCE
