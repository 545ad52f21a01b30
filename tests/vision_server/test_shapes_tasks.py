"""The shipped models for masks, turned boxes, points and classes do what they are for; their truth is what it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from vision_server.shapes.agreement import PlacedPoints, mask_overlap, point_similarity, turn_degrees, turned_overlap
from vision_server.shapes.evaluate import CLASSIFIER, DETECTOR, ORIENTED, POSE, SEGMENTER
from vision_server.shapes.held_out import (
    HeldOutScene,
    foreign_scenes,
    foreign_singles,
    generator_scenes,
    generator_singles,
)
from vision_server.shapes.matching import matched
from vision_server.shapes.measure import (
    MASKS,
    NAMED_POINTS,
    TURNED_BOXES,
    Finding,
    find,
    load_yolo,
    measure_naming,
    true_things,
)
from vision_server.shapes.scenes import LABELS, Scene, Shape
from vision_server.shapes.task_truth import (
    MIRRORED_POINTS,
    POINT_NAMES,
    centre_of_area,
    mask,
    named_points,
    outline,
    turned_box,
)
from vision_server.shapes.train_tasks import RECIPES, write_architecture
from vision_server.shapes.yolo_dataset import BOXES, OUTLINES, LabelForm, label_lines
from vision_server.shapes.yolo_dataset import NAMED_POINTS as NAMED_POINTS_FORM
from vision_server.shapes.yolo_dataset import TURNED_BOXES as TURNED_BOXES_FORM

MAX_BYTES = 6_000_000
SEED = 71_000
# Few false finds and few missed ones at this confidence; a user's threshold.
CONFIDENCE = 0.4

Load = Callable[[Path], Any]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded: dict[Path, Any] = {}

    def once(weights: Path) -> Any:
        if weights not in loaded:
            loaded[weights] = load_yolo(weights)
        return loaded[weights]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("yolo")))
        yield once


@pytest.fixture(scope="module")
def scenes() -> list[HeldOutScene]:
    """Of both sources in turn."""
    pairs = zip(generator_scenes(8, SEED, detector=False), foreign_scenes(8, SEED), strict=True)
    return [scene for pair in pairs for scene in pair]


def drawn(label: str, corners: list[tuple[float, float]]) -> Shape:
    points = np.array(corners)
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return Shape(label, "red", (x0, y0, x1, y1), tuple(corners), (255, 0, 0))


def turned(shape: Shape, degrees: float) -> Shape:
    """The same turned clockwise (on a screen) around the middle of its box."""
    radians = np.radians(degrees)
    cos, sin = np.cos(radians), np.sin(radians)
    middle = np.array(shape.centre)
    points = (outline(shape) - middle) @ np.array([(cos, sin), (-sin, cos)]) + middle
    return drawn(shape.label, [(float(x), float(y)) for x, y in points])


SQUARE = drawn("square", [(10, 10), (50, 10), (50, 50), (10, 50)])
TRIANGLE = drawn("triangle", [(30, 10), (60, 70), (0, 70)])
CIRCLE = drawn("circle", [(50 + 20 * np.cos(k * np.pi / 32), 40 + 20 * np.sin(k * np.pi / 32)) for k in range(64)])


# What is true


@pytest.mark.parametrize("degrees", [-40, -12, 0, 7, 30, 44])
def test_a_turned_square_has_its_own_corners_as_turned_box(degrees: float) -> None:
    shape = turned(SQUARE, degrees)
    box = turned_box(shape)
    assert turned_overlap(box, outline(shape)) == pytest.approx(1, abs=1e-3)
    assert turn_degrees(box) == pytest.approx(degrees, abs=0.1)


def test_of_several_smallest_turned_boxes_the_most_upright_is_true() -> None:
    # An upright triangle has three of equal area, one along each side.
    box = turned_box(TRIANGLE)
    assert turn_degrees(box) == pytest.approx(0, abs=1e-3)
    assert box.min(0).tolist() == pytest.approx([0, 10], abs=1e-3)
    assert box.max(0).tolist() == pytest.approx([60, 70], abs=1e-3)
    # And of a circle's many, its box.
    assert turned_box(CIRCLE).min(0).tolist() == list(CIRCLE.box[:2])


@pytest.mark.parametrize("source", [generator_scenes(30, SEED, detector=True), foreign_scenes(30, SEED)])
def test_a_turned_box_holds_its_shape_and_is_no_larger_than_needed(source: list[HeldOutScene]) -> None:
    for shape in (shape for scene in source for shape in scene.shapes):
        box, points = turned_box(shape).astype(np.float32), outline(shape).astype(np.float32)
        inside = [cv2.pointPolygonTest(box, (float(x), float(y)), True) for x, y in points]
        assert min(inside) > -0.01
        smallest = cv2.minAreaRect(points)[1]
        # A circle's is its box; any turned one around 64 corners saves next to nothing.
        assert cv2.contourArea(box) <= smallest[0] * smallest[1] * 1.02


def test_named_points_lie_where_their_names_say() -> None:
    assert named_points(SQUARE).tolist() == pytest.approx(np.array([(30, 10), (50, 30), (30, 50), (10, 30)]))
    # A triangle balances at a third of its height, where it is two thirds as wide as its base.
    assert named_points(TRIANGLE) == pytest.approx(np.array([(30, 10), (50, 50), (30, 70), (10, 50)]), abs=1e-4)
    assert len(POINT_NAMES) == 4


@pytest.mark.parametrize("source", [generator_scenes(20, SEED, detector=True), foreign_scenes(20, SEED)])
def test_named_points_lie_on_the_outline_around_the_centre(source: list[HeldOutScene]) -> None:
    for shape in (shape for scene in source for shape in scene.shapes):
        points = outline(shape)
        x, y = centre_of_area(points)
        top, right, bottom, left = named_points(shape)
        assert top[1] < y < bottom[1]
        assert left[0] < x < right[0]
        for point in (top, right, bottom, left):
            distance = cv2.pointPolygonTest(points.astype(np.float32), (float(point[0]), float(point[1])), True)
            assert abs(distance) < 0.01


def test_named_points_mirror_as_ultralytics_is_told() -> None:
    shape = turned(drawn("triangle", [(20, 10), (70, 60), (5, 50)]), 13)
    mirrored = drawn("triangle", [(100 - x, y) for x, y in shape.polygon])
    wanted = (named_points(shape) * np.array([-1, 1]) + np.array([100, 0]))[list(MIRRORED_POINTS)]
    assert named_points(mirrored) == pytest.approx(wanted, abs=1e-3)


def test_a_mask_is_the_drawn_shape() -> None:
    covered = mask(SQUARE, 80, 60)
    assert covered.shape == (60, 80)
    assert covered[10:51, 10:51].all()
    assert covered.sum() == 41 * 41


# What is trained from


@pytest.mark.parametrize(
    ("form", "numbers"), [(BOXES, 4), (OUTLINES, None), (TURNED_BOXES_FORM, 8), (NAMED_POINTS_FORM, 4 + 4 * 3)]
)
def test_label_lines_have_what_their_task_reads(form: LabelForm, numbers: int | None) -> None:
    for scene in generator_scenes(5, SEED, detector=True):
        lines = label_lines(Scene(scene.image, scene.shapes), form)
        assert len(lines) == len(scene.shapes)
        for line, shape in zip(lines, scene.shapes, strict=True):
            label, *values = line.split()
            assert LABELS[int(label)] == shape.label
            assert len(values) == (numbers or 2 * len(shape.polygon))
            assert all(0 <= float(value) <= 1 or value == "2" for value in values)


@pytest.mark.parametrize("task", sorted(RECIPES))
def test_a_new_task_takes_all_of_the_detector_but_its_last_layer(task: str, load: Load, tmp_path: Path) -> None:
    detector = {name: tuple(values.shape) for name, values in load(DETECTOR).model.state_dict().items()}
    network = load(write_architecture(task, tmp_path))
    assert network.task == task
    own = {name: tuple(values.shape) for name, values in network.model.state_dict().items()}
    last = f"model.{11 if task == 'classify' else 23}."
    shared = {name for name in own if not name.startswith(last)}
    assert len(shared) > 200
    assert all(own[name] == detector[name] for name in shared)


# How truth and finds are compared


def test_agreements_are_one_for_the_same_and_nothing_for_what_lies_apart() -> None:
    near, far = turned_box(SQUARE), turned_box(SQUARE) + 100
    assert turned_overlap(near, near) == pytest.approx(1)
    assert turned_overlap(near, far) == 0
    assert turned_overlap(near, near + np.array([20, 0])) == pytest.approx(1 / 3, abs=1e-3)
    left, right = mask(SQUARE, 200, 200), np.roll(mask(SQUARE, 200, 200), 100, 1)
    assert mask_overlap(left, left) == 1
    assert mask_overlap(left, right) == 0
    assert mask_overlap(left & False, right & False) == 0
    true = PlacedPoints(named_points(SQUARE), 1600)
    assert point_similarity(true, true, 0.05) == 1
    # Off by a tenth of the side: exp(-0.01 / (2 * 0.53 * 0.01)).
    beside = PlacedPoints(true.points + np.array([4, 0]), 1600)
    assert point_similarity(beside, true, 0.05) == pytest.approx(np.exp(-1 / 1.06))


# What the shipped models do


@pytest.mark.parametrize("weights", [SEGMENTER, ORIENTED, POSE, CLASSIFIER])
def test_each_model_is_small_half_precise_and_holds_no_training_state(weights: Path, load: Load) -> None:
    import torch

    model = load(weights)
    assert weights.stat().st_size <= MAX_BYTES
    # Ultralytics numbers a classifier's labels by its folders' names.
    assert list(model.names.values()) == (sorted(LABELS) if weights == CLASSIFIER else list(LABELS))
    kept = torch.load(weights, map_location="cpu", weights_only=False)
    assert kept["optimizer"] is None and kept["ema"] is None
    assert next(kept["model"].parameters()).dtype == torch.float16
    assert b"torchvision" not in weights.read_bytes()  # it must load where torchvision does not
    assert model.overrides["imgsz"] == (160 if weights == CLASSIFIER else 320)


def hits(model: Any, scenes: list[HeldOutScene], finding: Finding[Any]) -> list[tuple[Shape, Any, float]]:
    """The true shape, what was found of it and how well it agrees, of all scenes; nearly all are found, and little besides."""
    right, missed, false = [], 0, 0
    for scene in scenes:
        found, truth = find(model, scene, finding, CONFIDENCE), true_things(scene, finding)
        pairs = matched(found, truth, 0.5, finding.agreement)
        missed += len(truth) - len(pairs)
        false += len(found) - len(pairs)
        right += [(scene.shapes[true], found[index][2], agreed) for index, true, agreed in pairs]
    assert missed <= 0.05 * (len(right) + missed)
    assert false <= 0.1 * (len(right) + missed)
    return right


def test_the_segmenter_finds_the_shapes_with_their_masks(load: Load, scenes: list[HeldOutScene]) -> None:
    assert load(SEGMENTER).task == "segment"
    assert np.median([agreed for _, _, agreed in hits(load(SEGMENTER), scenes, MASKS)]) >= 0.88


def test_the_turned_boxes_of_squares_have_their_turn(load: Load, scenes: list[HeldOutScene]) -> None:
    assert load(ORIENTED).task == "obb"
    found = hits(load(ORIENTED), scenes, TURNED_BOXES)
    assert np.median([agreed for _, _, agreed in found]) >= 0.85
    off = [
        # The difference of two turns is a turn as well.
        abs((turn_degrees(corners) - turn_degrees(turned_box(shape)) + 45) % 90 - 45)
        for shape, corners, _ in found
        if shape.label == "square"
    ]
    assert len(off) >= 5
    # At random it would be 22 degrees.
    assert np.median(off) <= 5


def test_the_points_lie_where_they_are_and_have_their_names(load: Load, scenes: list[HeldOutScene]) -> None:
    model = load(POSE)
    assert model.task == "pose"
    # Where Ultralytics keeps names, and whence its exports take them: by class.
    assert model.model.kpt_names == {number: list(POINT_NAMES) for number in range(len(LABELS))}
    off = []
    for shape, placed, _ in hits(model, scenes, NAMED_POINTS):
        side_px = max(shape.box[2] - shape.box[0], shape.box[3] - shape.box[1])
        off += (np.linalg.norm(placed.points - named_points(shape), axis=1) / side_px).tolist()
    assert np.median(off) <= 0.04


def test_the_classifier_names_what_a_picture_shows(load: Load) -> None:
    assert load(CLASSIFIER).task == "classify"
    for source in (generator_singles(40, SEED), foreign_singles(40, SEED)):
        assert measure_naming(load(CLASSIFIER), source)["top1"] >= 0.95
