"""Writes drawn scenes as the files that Ultralytics trains from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from vision_server.shapes.scenes import DETECTOR_STYLE, LABELS, Points, Scene, SceneStyle, Shape, draw_scene
from vision_server.shapes.task_truth import MIRRORED_POINTS, POINT_NAMES, named_points, outline, turned_box

IMAGE_SIDE_PX = 320
LONG_SIDES_TO_SHORT = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 2, 16 / 9)

# One shape, small to filling, cut from a picture as a person would cut it.
CLASSIFIER_SIDE_PX = 160
CLASSIFIER_STYLE = SceneStyle(min_shapes=1, max_shapes=1, min_side=0.25, max_side=0.95, clutter_share=0.3)

# How far off a point may be (COCO's hips have 0.107): half right at 0.17 of the shape's side. Ultralytics' default for points
# of unknown kind, 0.25, would call one half right that lies 0.43 of the side away.
POINT_SIGMA = 0.1

# Points of the shape's truth, (points, 2) in pixels, for one task.
TruthPoints = Callable[[Shape], Points]


@dataclass(frozen=True)
class Amounts:
    """How many scenes, from which seed; validation scenes come from another one."""

    train_scenes: int
    val_scenes: int
    seed: int

    def splits(self) -> tuple[tuple[str, int, int], ...]:
        """Name, count and seed of each split."""
        return ("train", self.train_scenes, self.seed), ("val", self.val_scenes, self.seed + 1_000)


@dataclass(frozen=True)
class LabelForm:
    """What a line of a task's label file says after the class: the box, some points, or both."""

    points: TruthPoints | None = None
    with_box: bool = True
    # A third number for every point: 2 is "visible".
    with_visibility: bool = False
    description: Mapping[str, object] = field(default_factory=dict)


BOXES = LabelForm()
OUTLINES = LabelForm(points=outline, with_box=False)
TURNED_BOXES = LabelForm(points=turned_box, with_box=False)
NAMED_POINTS = LabelForm(
    points=named_points,
    with_visibility=True,
    description={
        "kpt_shape": [len(POINT_NAMES), 3],
        "flip_idx": list(MIRRORED_POINTS),
        "kpt_oks_sigmas": [POINT_SIGMA] * len(POINT_NAMES),
        # Ultralytics keeps names for each class; ours are the same for all.
        "kpt_names": {number: list(POINT_NAMES) for number in range(len(LABELS))},
    },
)


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene whose longer side is the models' input side, square, landscape or portrait."""
    short_px = round(IMAGE_SIDE_PX / LONG_SIDES_TO_SHORT[rng.integers(len(LONG_SIDES_TO_SHORT))])
    landscape = rng.random() < 0.6
    size = (IMAGE_SIDE_PX, short_px) if landscape else (short_px, IMAGE_SIDE_PX)
    return draw_scene(rng, *size, DETECTOR_STYLE)


def single_shape_scene(rng: np.random.Generator, side_px: int = CLASSIFIER_SIDE_PX) -> Scene:
    """A square picture of exactly one shape."""
    while True:
        scene = draw_scene(rng, side_px, side_px, CLASSIFIER_STYLE)
        if scene.shapes:  # a shape too like its ground is not drawn
            return scene


def label_lines(scene: Scene, form: LabelForm) -> list[str]:
    """The scene in YOLO's text form: class, then numbers as parts of the picture's width and height."""
    height_px, width_px = scene.image.shape[:2]
    lines = []
    for shape in scene.shapes:
        numbers: list[str] = []
        if form.with_box:
            x0, y0, x1, y1 = shape.box
            centre_x, centre_y = shape.centre
            parts = (centre_x / width_px, centre_y / height_px, (x1 - x0) / width_px, (y1 - y0) / height_px)
            numbers += [f"{part:.5f}" for part in parts]
        for x, y in form.points(shape) if form.points else ():
            # A turned box may reach out of the picture, which label files may not.
            numbers += [f"{min(max(x / width_px, 0), 1):.5f}", f"{min(max(y / height_px, 0), 1):.5f}"]
            numbers += ["2"] if form.with_visibility else []
        lines.append(" ".join([str(LABELS.index(shape.label)), *numbers]))
    return lines


def _write_jpeg(path: Path, scene: Scene, rng: np.random.Generator) -> None:
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(65, 97))]
    cv2.imwrite(str(path), scene.image[..., ::-1], quality)


def write_scenes(folder: Path, amounts: Amounts, form: LabelForm) -> Path:
    """Draw into images/<split> and labels/<split>; returns the dataset's yaml."""
    for split, count, seed in amounts.splits():
        rng = np.random.default_rng(seed)
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            scene = training_scene(rng)
            _write_jpeg(images / f"{index:05d}.jpg", scene, rng)
            (labels / f"{index:05d}.txt").write_text("\n".join(label_lines(scene, form)))
    description = {
        "path": str(folder.resolve()),
        "train": "images/train",
        "val": "images/val",
        "names": dict(enumerate(LABELS)),
        **form.description,
    }
    written = folder / "shapes.yaml"
    written.write_text("".join(f"{key}: {value}\n" for key, value in description.items()))
    return written


def write_single_shapes(folder: Path, amounts: Amounts) -> Path:
    """Draw into <split>/<label>; returns the folder, which is the dataset of a classifier."""
    for split, count, seed in amounts.splits():
        rng = np.random.default_rng(seed)
        for label in LABELS:
            (folder / split / label).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            scene = single_shape_scene(rng)
            _write_jpeg(folder / split / scene.shapes[0].label / f"{index:05d}.jpg", scene, rng)
    return folder
