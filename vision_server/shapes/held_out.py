"""Scenes that no model was trained on, from two sources, with the truth for every task."""

from dataclasses import dataclass, replace

import numpy as np

from vision_server.shapes.foreign_scenes import draw_foreign_scene
from vision_server.shapes.scenes import DESCRIBER_STYLE, DETECTOR_STYLE, Image, Shape, draw_scene
from vision_server.shapes.yolo_dataset import single_shape_scene

# Far from every training seed.
HELD_OUT_SEED = 900_001
SIZES_PX = ((640, 480), (320, 320), (800, 600), (480, 640), (640, 360), (320, 240))
# What a person leaves around a shape when cutting it out, as a part of its longer side.
MARGINS = (0.05, 0.8)
SINGLE_SIDE_PX = 240


@dataclass(frozen=True)
class HeldOutScene:
    """A picture with its truth, whoever drew it; task_truth.py tells masks, turned boxes and points of its shapes."""

    image: Image  # RGB
    shapes: tuple[Shape, ...]


def generator_scenes(count: int, seed: int, *, detector: bool) -> list[HeldOutScene]:
    """Unseen scenes of the training generator, at the sizes people send; `detector`: in the style the detector knows."""
    rng = np.random.default_rng(seed)
    style = DETECTOR_STYLE if detector else DESCRIBER_STYLE
    scenes = []
    for index in range(count):
        scene = draw_scene(rng, *SIZES_PX[index % len(SIZES_PX)], style)
        scenes.append(HeldOutScene(scene.image, scene.shapes))
    return scenes


def foreign_scenes(count: int, seed: int, max_shapes: int = 5) -> list[HeldOutScene]:
    """Scenes drawn in plain Pillow by foreign_scenes.py."""
    scenes = []
    for index in range(count):
        foreign = draw_foreign_scene(seed + index, max_shapes)
        shapes = tuple(Shape(s.label, s.colour, s.box, s.polygon, (0, 0, 0)) for s in foreign.shapes)
        scenes.append(HeldOutScene(np.asarray(foreign.image, np.uint8), shapes))
    return scenes


def generator_singles(count: int, seed: int) -> list[HeldOutScene]:
    """Square pictures of one shape by the training generator, for a classifier."""
    rng = np.random.default_rng(seed)
    drawn = [single_shape_scene(rng, SINGLE_SIDE_PX) for _ in range(count)]
    return [HeldOutScene(scene.image, scene.shapes) for scene in drawn]


def foreign_singles(count: int, seed: int) -> list[HeldOutScene]:
    """Square pieces of foreign scenes of one shape, for a classifier."""
    rng = np.random.default_rng(seed)
    return [cut_out(scene, rng) for scene in foreign_scenes(count, seed, max_shapes=1)]


def cut_out(scene: HeldOutScene, rng: np.random.Generator) -> HeldOutScene:
    """The square around the first shape with a margin, as far as the picture goes."""
    shape = scene.shapes[0]
    x0, y0, x1, y1 = shape.box
    half = max(x1 - x0, y1 - y0) * (0.5 + rng.uniform(*MARGINS))
    height_px, width_px = scene.image.shape[:2]
    left, top = max(0, round(shape.centre[0] - half)), max(0, round(shape.centre[1] - half))
    right, bottom = min(width_px, round(shape.centre[0] + half)), min(height_px, round(shape.centre[1] + half))
    piece = np.ascontiguousarray(scene.image[top:bottom, left:right])
    return HeldOutScene(piece, (_moved(shape, left, top),))


def _moved(shape: Shape, left_px: float, top_px: float) -> Shape:
    box = (shape.box[0] - left_px, shape.box[1] - top_px, shape.box[2] - left_px, shape.box[3] - top_px)
    return replace(shape, box=box, polygon=tuple((x - left_px, y - top_px) for x, y in shape.polygon))
