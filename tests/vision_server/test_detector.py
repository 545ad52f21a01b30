"""The detector: boxes in the image's own pixels, the same whoever shares the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw

from vision_server.annotate import annotate
from vision_server.detector import DetectItem, Detector
from vision_server.images import Image
from vision_server.letterbox import crop, fit
from vision_server.requests import DetectOptions
from vision_server.results import Detection, Found

SHAPES = {
    # label → (outline in a unit square, colour)
    "square": ([(0, 0), (1, 0), (1, 1), (0, 1)], (40, 90, 220)),
    "triangle": ([(0.5, 0), (1, 1), (0, 1)], (40, 170, 60)),
    "circle": (
        [(0.5 + 0.5 * math.cos(t / 30 * math.tau), 0.5 + 0.5 * math.sin(t / 30 * math.tau)) for t in range(30)],
        (220, 40, 40),
    ),
}


def scene(width: int, height: int, truth: dict[str, tuple[float, float, float]]) -> Image:
    """`truth`: label → left, top, side; drawn four times as large and shrunk, so that edges are smooth."""
    large = Pillow.new("RGB", (width * 4, height * 4), (235, 235, 230))
    pen = ImageDraw.Draw(large)
    for label, (left, top, side) in truth.items():
        outline, colour = SHAPES[label]
        pen.polygon([((left + x * side) * 4, (top + y * side) * 4) for x, y in outline], fill=colour)
    return Image(np.array(large.resize((width, height), Pillow.Resampling.LANCZOS)), width, height)


TRUTH = {"square": (20.0, 30.0, 90.0), "circle": (190.0, 40.0, 80.0), "triangle": (100.0, 150.0, 70.0)}


def found(detector: Detector, *items: DetectItem) -> list[Found]:
    outcomes = detector.execute(items)
    assert all(isinstance(outcome, Found) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, Found)]


def overlap(detection: Detection, left: float, top: float, side: float) -> float:
    box = detection.box
    width = min(box.x_max_px, left + side) - max(box.x_min_px, left)
    height = min(box.y_max_px, top + side) - max(box.y_min_px, top)
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((box.x_max_px - box.x_min_px) * (box.y_max_px - box.y_min_px) + side * side - shared)


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(320, 320, 1.0), (640, 480, 1.5), (300, 900, 1.0), (1000, 700, 2.6)]
)
def test_shapes_are_found_where_they_were_drawn(detector: Detector, width: int, height: int, scale: float) -> None:
    truth = {label: tuple(value * scale for value in where) for label, where in TRUTH.items()}
    image = scene(width, height, truth)  # type: ignore[arg-type]
    [answer] = found(detector, DetectItem(detector.fit(image), DetectOptions()))
    assert sorted(one.label for one in answer.detections) == sorted(truth)
    for one in answer.detections:
        left, top, side = truth[one.label]
        assert overlap(one, left, top, side) > 0.8
        assert detector.card.labels[one.class_id] == one.label
        assert 0.25 <= one.confidence <= 1


def test_a_batch_of_n_gives_what_n_singles_give(detector: Detector) -> None:
    rng = np.random.default_rng(3)
    sizes = [(320, 320), (640, 200), (97, 411), (320, 240), (800, 800)]
    images = [scene(width, height, {"square": (5, 5, min(width, height) * 0.4)}) for width, height in sizes]
    images.append(Image(rng.integers(0, 255, (240, 320, 3), dtype=np.uint8), 320, 240))
    items = [DetectItem(detector.fit(image), DetectOptions(min_confidence=0.05)) for image in images]
    together = found(detector, *items)
    alone = [found(detector, item)[0] for item in items]
    for one, other in zip(together, alone, strict=True):
        assert [found.label for found in one.detections] == [found.label for found in other.detections]
        for mine, theirs in zip(one.detections, other.detections, strict=True):
            assert mine.confidence == pytest.approx(theirs.confidence, abs=1e-3)
            assert mine.box.x_min_px == pytest.approx(theirs.box.x_min_px, abs=0.1)
            assert mine.box.y_max_px == pytest.approx(theirs.box.y_max_px, abs=0.1)


def test_each_item_of_a_batch_has_its_own_options(detector: Detector) -> None:
    fitted = detector.fit(scene(320, 320, TRUTH))
    only_circles = detector.class_ids(("circle",))
    every, circles, one, strict = found(
        detector,
        DetectItem(fitted, DetectOptions()),
        DetectItem(fitted, DetectOptions(labels=("circle",)), only_circles),
        DetectItem(fitted, DetectOptions(max_detections=1)),
        DetectItem(fitted, DetectOptions(min_confidence=1.0)),
    )
    assert len(every.detections) == 3
    assert [detection.label for detection in circles.detections] == ["circle"]
    assert one.detections == every.detections[:1]
    assert strict.detections == ()
    confidences = [detection.confidence for detection in every.detections]
    assert confidences == sorted(confidences, reverse=True)


def test_boxes_stay_within_the_image(detector: Detector) -> None:
    image = scene(300, 120, {"square": (-20, -20, 110), "circle": (230, 50, 90)})
    [answer] = found(detector, DetectItem(detector.fit(image), DetectOptions(min_confidence=0.01)))
    assert answer.detections
    for detection in answer.detections:
        box = detection.box
        assert 0 <= box.x_min_px <= box.x_max_px <= 300
        assert 0 <= box.y_min_px <= box.y_max_px <= 120


def test_one_unreadable_item_does_not_fail_its_mates(detector: Detector) -> None:
    fitted = detector.fit(scene(320, 320, TRUTH))
    unreadable = DetectOptions(min_confidence="high")  # type: ignore[arg-type]
    outcomes = detector.execute([DetectItem(fitted, DetectOptions()), DetectItem(fitted, unreadable)])
    assert isinstance(outcomes[0], Found) and len(outcomes[0].detections) == 3
    assert isinstance(outcomes[1], Exception)


def test_the_lowest_threshold_does_not_hold_the_executor_up(detector: Detector) -> None:
    noise = Image(np.random.default_rng(0).integers(0, 255, (320, 320, 3), dtype=np.uint8), 320, 320)
    options = DetectOptions(min_confidence=0.0, iou_threshold=1.0, max_detections=1000)
    [answer] = found(detector, DetectItem(detector.fit(noise), options))
    assert len(answer.detections) <= 1000


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 2)])
def test_images_of_any_proportion_are_fitted(detector: Detector, size: tuple[int, int]) -> None:
    width, height = size
    image = Image(np.zeros((height, width, 3), np.uint8), width, height)
    side = detector.card.input_size_px
    for fitted in (fit(image, side), crop(image, side)):
        assert fitted.rgb.shape == (side, side, 3) and fitted.rgb.flags.c_contiguous
    found(detector, DetectItem(detector.fit(image), DetectOptions()))


def test_the_annotated_picture_has_the_images_size_and_its_boxes(detector: Detector) -> None:
    image = scene(320, 200, {"square": (20, 30, 90)})
    [answer] = found(detector, DetectItem(detector.fit(image), DetectOptions()))
    import io

    drawn = np.asarray(Pillow.open(io.BytesIO(annotate(image.rgb, answer.detections))).convert("RGB"))
    assert drawn.shape == image.rgb.shape
    changed = np.abs(drawn.astype(int) - image.rgb).sum(2) > 90
    assert changed[25:35, 15:115].any() and not changed[:, 220:].any()
