"""What a detector's numbers become: the same objects as Ultralytics finds in them, in the image's own pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.end_to_end.pictures import generated
from vision_server import torchvision_ops
from vision_server.detector import DetectItem, Detector
from vision_server.engines.engine import Traits
from vision_server.images import Image
from vision_server.letterbox import Fitted
from vision_server.readout import COCO_KEYPOINTS, MAX_CANDIDATES, MAX_TURNED_CANDIDATES, Readout, _fetch_candidates
from vision_server.requests import DetectOptions, MaskForm
from vision_server.results import Card, Detection, Found, Task
from vision_server.weights import SHIPPED

LABELS = ("circle", "square", "triangle")
SIDE_PX = 64
AS_IT_IS = Fitted(np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8), 1.0, 0, 0, SIDE_PX, SIDE_PX)


def card(task: Task, labels: tuple[str, ...] = LABELS, keypoint_names: tuple[str, ...] = ()) -> Card:
    return Card("1", task, "pytorch", "fp32", "cpu", labels, SIDE_PX, 0, keypoint_names)


def read(
    task: Task,
    numbers: Any,
    options: DetectOptions = DetectOptions(),  # noqa: B008  # frozen
    class_ids: tuple[int, ...] | None = None,
    fitted: Fitted = AS_IT_IS,
    keypoint_names: tuple[str, ...] = (),
    **traits: Any,
) -> Found:
    """The reading of a batch of one; `numbers` is what the engine gave, without its prototypes."""
    told = Traits(task.value, LABELS, **traits)
    return Readout(
        card(task, keypoint_names=keypoint_names), [numbers], told, [DetectItem(fitted, options, class_ids)]
    ).read(0)


def rows(*candidates: tuple[float, ...]) -> Any:
    """Numbers of one image: each candidate is centre x, centre y, width, height, a score for each label, then extras."""
    return np.array(candidates, np.float32).T[None].copy()


def placed(found: Found) -> list[tuple[str, float, tuple[float, ...]]]:
    return [
        (d.label, d.confidence, (d.box.x_min_px, d.box.y_min_px, d.box.x_max_px, d.box.y_max_px))
        for d in found.detections
    ]


@st.composite
def candidates(draw: st.DrawFn) -> Any:
    """A few dozen boxes close to each other; no two equally sure, sides are whole pixels."""
    count = draw(st.integers(7, 40))  # Ultralytics takes six columns for finished rows
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    numbers = np.zeros((1, 4 + len(LABELS), count), np.float32)
    numbers[0, :2] = rng.integers(20, 40, (2, count))
    numbers[0, 2:4] = 2 * rng.integers(2, 14, (2, count))
    scores = rng.permutation(count * len(LABELS)).reshape(len(LABELS), count)
    numbers[0, 4:] = (scores + 1) / (count * len(LABELS) + 2)
    return numbers


@given(
    numbers=candidates(),
    # No score is exactly as large, where Ultralytics leaves out and we do not; and no overlap, where rounding would decide.
    min_confidence=st.sampled_from([0.0, 0.1003, 0.2503, 0.5003, 0.9003]),
    iou_threshold=st.sampled_from([0.0, 0.3001, 0.5003, 0.7001, 1.0]),
    max_detections=st.integers(1, 20),
    class_ids=st.none() | st.lists(st.integers(0, 2), min_size=1, unique=True).map(tuple),
    as_tensor=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_same_objects_stay_as_after_ultralytics_suppression(
    numbers: Any,
    min_confidence: float,
    iou_threshold: float,
    max_detections: int,
    class_ids: tuple[int, ...] | None,
    as_tensor: bool,
) -> None:
    torchvision_ops.install()
    from ultralytics.utils.nms import non_max_suppression

    wanted = non_max_suppression(
        torch.from_numpy(numbers.copy()),
        min_confidence,
        iou_threshold,
        classes=list(class_ids) if class_ids else None,
        max_det=max_detections,
        nc=len(LABELS),
    )[0]
    options = DetectOptions("", min_confidence, iou_threshold, max_detections)
    found = read(Task.DETECT, torch.from_numpy(numbers) if as_tensor else numbers, options, class_ids)
    assert [d.confidence for d in found.detections] == pytest.approx(wanted[:, 4].tolist())
    assert [d.class_id for d in found.detections] == wanted[:, 5].tolist()
    for one, box in zip(found.detections, wanted[:, :4].clamp(0, SIDE_PX).tolist(), strict=True):
        assert [one.box.x_min_px, one.box.y_min_px, one.box.x_max_px, one.box.y_max_px] == pytest.approx(box)


@given(numbers=candidates(), seed=st.integers(0, 2**32), iou_threshold=st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=50, deadline=None)
def test_turned_objects_stay_as_after_ultralytics_suppression(numbers: Any, seed: int, iou_threshold: float) -> None:
    torchvision_ops.install()
    from ultralytics.utils.nms import non_max_suppression

    angles = np.random.default_rng(seed).uniform(-np.pi / 4, 3 * np.pi / 4, (1, 1, numbers.shape[2])).astype(np.float32)
    numbers = np.concatenate((numbers, angles), 1)
    wanted = non_max_suppression(torch.from_numpy(numbers.copy()), 0.1, iou_threshold, nc=len(LABELS), rotated=True)[0]
    found = read(Task.ORIENTED_BOXES, numbers, DetectOptions("", 0.1, iou_threshold)).detections
    assert [d.confidence for d in found] == pytest.approx(wanted[:, 4].tolist())
    for one, (x, y, width, height, *_, angle) in zip(found, wanted.tolist(), strict=True):
        turned = one.oriented_box
        assert turned is not None
        assert [turned.center_x_px, turned.center_y_px, turned.width_px, turned.height_px] == [x, y, width, height]
        assert -90 <= turned.angle_degrees < 90
        assert math.sin(math.radians(turned.angle_degrees) - angle) == pytest.approx(0, abs=1e-5)
        assert 0 <= one.box.x_min_px <= one.box.x_max_px <= SIDE_PX
        assert 0 <= one.box.y_min_px <= one.box.y_max_px <= SIDE_PX


@given(
    numbers=st.lists(candidates(), min_size=1, max_size=4),
    floors=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4),
)
@settings(max_examples=50, deadline=None)
def test_fetching_only_candidates_from_an_accelerator_changes_nothing(numbers: list[Any], floors: list[float]) -> None:
    """On a GPU each image's columns are chosen there; here the same code runs on the CPU's tensors."""
    count = max(image.shape[2] for image in numbers)
    batch = np.zeros((len(numbers), 4 + len(LABELS), count), np.float32)
    for image, place in zip(numbers, batch, strict=True):
        place[:, : image.shape[2]] = image[0]
    fetched = _fetch_candidates(torch.from_numpy(batch), len(LABELS), floors[: len(batch)])
    assert len(fetched) == len(batch)
    for columns, whole, floor in zip(fetched, batch, floors, strict=False):
        options = DetectOptions(min_confidence=floor)
        assert read(Task.DETECT, columns[None], options) == read(Task.DETECT, whole[None], options)


def test_confidence_equal_to_the_threshold_is_enough() -> None:
    numbers = rows((10, 10, 8, 8, 0.25, 0, 0), (40, 40, 8, 8, 0, 0.2499999, 0))
    assert placed(read(Task.DETECT, numbers, DetectOptions(min_confidence=0.25))) == [("circle", 0.25, (6, 6, 14, 14))]


def test_the_lowest_threshold_and_the_loosest_overlap_are_bounded() -> None:
    count = 3 * MAX_CANDIDATES
    rng = np.random.default_rng(1)
    numbers = np.concatenate((rng.uniform(10, 50, (1, 4, count)), rng.random((1, 4, count))), 1).astype(np.float32)
    loose = DetectOptions(min_confidence=0.0, iou_threshold=1.0, max_detections=MAX_CANDIDATES * 2)
    found = read(Task.DETECT, numbers, loose).detections
    assert len(found) == MAX_CANDIDATES
    best = np.sort(numbers[0, 4:7].max(0))[::-1]
    assert [d.confidence for d in found] == pytest.approx(best[:MAX_CANDIDATES].tolist())
    assert len(read(Task.ORIENTED_BOXES, numbers, loose).detections) <= MAX_TURNED_CANDIDATES


def test_places_lead_back_through_the_letterbox_and_stay_within_the_image() -> None:
    # 200 × 100 pixels at 0.32 of their size: 64 × 32, with 16 rows of padding above.
    fitted = Fitted(AS_IT_IS.rgb, 0.32, 0, 16, 200, 100)
    numbers = rows((32, 32, 16, 16, 0.9, 0, 0), (2, 2, 40, 40, 0, 0.8, 0))
    first, second = placed(read(Task.DETECT, numbers, fitted=fitted))
    assert first == ("circle", pytest.approx(0.9), pytest.approx((75, 25, 125, 75)))
    assert second == ("square", pytest.approx(0.8), pytest.approx((0, 0, 68.75, 18.75)))


@pytest.mark.parametrize(
    ("count", "told", "names"),
    [
        (4, ("top", "right", "bottom", "left"), ("top", "right", "bottom", "left")),
        (17, (), COCO_KEYPOINTS),
        (3, (), ("0", "1", "2")),
        (2, ("only one",), ("0", "1")),
    ],
)
def test_keypoints_have_the_models_names_or_cocos_or_numbers(
    count: int, told: tuple[str, ...], names: tuple[str, ...]
) -> None:
    points = [value for number in range(count) for value in (10.0 + number, 200.0, 0.5)]
    found = read(
        Task.POSE,
        rows((32, 32, 16, 16, 0.9, 0, 0, *points)),
        fitted=Fitted(AS_IT_IS.rgb, 0.5, 0, 0, 128, 128),
        keypoint_names=told,
        kpt_shape=(count, 3),
    )
    [one] = found.detections
    assert tuple(point.name for point in one.keypoints) == names
    assert [(p.x_px, p.y_px, p.confidence) for p in one.keypoints] == [(20 + 2 * n, 128, 0.5) for n in range(count)]


def test_keypoints_without_a_visibility_are_sure() -> None:
    found = read(Task.POSE, rows((32, 32, 16, 16, 0.9, 0, 0, 1, 2, 3, 4)), kpt_shape=(2, 2))
    assert [(p.x_px, p.y_px, p.confidence) for p in found.detections[0].keypoints] == [(1, 2, 1), (3, 4, 1)]


def test_classes_come_best_first_as_many_as_asked_for() -> None:
    scores = np.array([[0.2, 0.5, 0.3]], np.float32)
    # A class is no detection: min_confidence leaves none out. Masks mean nothing here.
    every = read(Task.CLASSIFY, scores, DetectOptions(min_confidence=0.9, masks=MaskForm.RLE))
    assert not every.detections and every.masks is None
    assert [(c.label, c.class_id) for c in every.classes] == [("square", 1), ("triangle", 2), ("circle", 0)]
    assert [c.confidence for c in every.classes] == pytest.approx([0.5, 0.3, 0.2])
    assert read(Task.CLASSIFY, torch.from_numpy(scores)).classes == every.classes
    assert read(Task.CLASSIFY, scores, DetectOptions(max_detections=2)).classes == every.classes[:2]
    assert read(Task.CLASSIFY, scores, class_ids=(0, 2)).classes == every.classes[1:]


def test_a_model_that_suppresses_overlaps_itself_is_only_filtered() -> None:
    finished = np.array([[(4, 4, 24, 24, 0.9, 1), (4, 4, 24, 24, 0.8, 1), (8, 8, 28, 28, 0.3, 2)]], np.float32)
    found = read(Task.DETECT, finished, end2end=True)
    assert [label for label, _, _ in placed(found)] == ["square", "square", "triangle"]
    assert placed(found)[0][2] == (4, 4, 24, 24)
    assert len(read(Task.DETECT, finished, DetectOptions(min_confidence=0.5), end2end=True).detections) == 2
    assert len(read(Task.DETECT, finished, DetectOptions(max_detections=1), end2end=True).detections) == 1
    assert [label for label, _, _ in placed(read(Task.DETECT, finished, class_ids=(2,), end2end=True))] == ["triangle"]


def test_an_engine_may_write_over_its_numbers_once_they_are_read() -> None:
    numbers = rows((32, 32, 30, 30, 0.9, 0, 0, 1.0, 2.0))
    prototypes = np.ones((1, 2, 16, 16), np.float32)
    item = DetectItem(AS_IT_IS, DetectOptions(masks=MaskForm.POLYGON))
    found = Readout(card(Task.SEGMENT), [numbers, prototypes], Traits("segment", LABELS), [item]).read(0)
    before = placed(found)
    numbers[:], prototypes[:] = 7, 7
    assert found.masks is not None
    assert placed(found) == before
    assert found.masks.coefficients.tolist() == [[1, 2]] and (found.masks.prototypes == 1).all()


def test_masks_are_prepared_only_for_who_wants_them() -> None:
    numbers, prototypes = rows((32, 32, 30, 30, 0.9, 0, 0, 1, 2)), np.ones((1, 2, 16, 16), np.float32)
    for options, wanted in ((DetectOptions(), False), (DetectOptions(annotate=True), True)):
        readout = Readout(
            card(Task.SEGMENT), [numbers, prototypes], Traits("segment", LABELS), [DetectItem(AS_IT_IS, options)]
        )
        assert (readout.read(0).masks is not None) == wanted


def shipped(name: str) -> Detector:
    detector = Detector(SHIPPED[name], "cpu", engine="pytorch")
    detector.load()
    return detector


def compared(data_dir: Path, name: str, compare: Callable[[Found, Any], int]) -> None:
    """Reads some scenes with a shipped model and with Ultralytics' own predict(); together they must show something."""
    torchvision_ops.install()
    from ultralytics import YOLO

    detector, reference = shipped(name), YOLO(SHIPPED[name])
    seen = 0
    for index in range(6):
        rgb = np.array(generated(40 + index).image.convert("RGB"))
        [found] = detector.execute([DetectItem(detector.fit(Image(rgb, rgb.shape[1], rgb.shape[0])), DetectOptions())])
        assert isinstance(found, Found)
        # rect=False: the full square, as we always have it.
        [said] = reference.predict(
            rgb[..., ::-1], imgsz=detector.card.input_size_px, rect=False, conf=0.25, iou=0.7, verbose=False
        )
        seen += compare(found, said)
    assert seen >= 6


def assert_boxes(found: tuple[Detection, ...], said: Any) -> int:
    assert [d.class_id for d in found] == said.cls.int().tolist()
    assert [d.confidence for d in found] == pytest.approx(said.conf.tolist(), abs=0.01)
    for one, box in zip(found, said.xyxy.tolist(), strict=True):
        assert [one.box.x_min_px, one.box.y_min_px, one.box.x_max_px, one.box.y_max_px] == pytest.approx(box, abs=1.0)
    return len(found)


def test_boxes_are_those_of_ultralytics_predict(data_dir: Path) -> None:
    compared(data_dir, "shapes-detector", lambda found, said: assert_boxes(found.detections, said.boxes))


def test_keypoints_are_those_of_ultralytics_predict(data_dir: Path) -> None:
    def compare(found: Found, said: Any) -> int:
        for one, points in zip(found.detections, said.keypoints.data.tolist(), strict=True):
            assert [(p.x_px, p.y_px) for p in one.keypoints] == [pytest.approx(point[:2], abs=1.0) for point in points]
            assert [p.confidence for p in one.keypoints] == pytest.approx([p[2] for p in points], abs=0.02)
        return assert_boxes(found.detections, said.boxes)

    compared(data_dir, "shapes-pose", compare)


def test_oriented_boxes_are_those_of_ultralytics_predict(data_dir: Path) -> None:
    def compare(found: Found, said: Any) -> int:
        for one, (x, y, width, height, angle) in zip(found.detections, said.obb.xywhr.tolist(), strict=True):
            turned = one.oriented_box
            assert turned is not None
            assert (turned.center_x_px, turned.center_y_px) == pytest.approx((x, y), abs=1.0)
            difference = math.radians(turned.angle_degrees) - angle
            # Ultralytics swaps the sides and takes a quarter turn off where that makes the angle smaller.
            swapped = abs(math.sin(difference)) > 0.5
            assert math.sin(2 * difference) == pytest.approx(0, abs=0.05)
            sides = (turned.height_px, turned.width_px) if swapped else (turned.width_px, turned.height_px)
            assert sides == pytest.approx((width, height), abs=1.0)
        return len(found.detections)

    compared(data_dir, "shapes-oriented", compare)


def test_classes_are_those_of_ultralytics_predict(data_dir: Path) -> None:
    def compare(found: Found, said: Any) -> int:
        assert found.classes[0].class_id == said.probs.top1
        assert found.classes[0].confidence == pytest.approx(float(said.probs.top1conf), abs=0.1)
        assert sum(one.confidence for one in found.classes) == pytest.approx(1, abs=1e-3)
        return 1

    compared(data_dir, "shapes-classifier", compare)
