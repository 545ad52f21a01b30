"""Draws scenes of coloured shapes whose truth is known."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vision_server.shapes.backgrounds import Canvas, draw_background
from vision_server.shapes.palette import COLOURS, Rgb, sample_colour

LABELS = ("circle", "square", "triangle", "star")

Image = NDArray[np.uint8]  # (height, width, 3), RGB
Points = NDArray[np.float64]  # (corners, 2), x then y, pixels


@dataclass(frozen=True)
class Shape:
    """One drawn shape. `box` is x0, y0, x1, y1 in pixels, around the whole shape even where another covers it."""

    label: str
    colour: str
    box: tuple[float, float, float, float]
    polygon: tuple[tuple[float, float], ...]
    rgb: Rgb

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, x then y."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture with its shapes, sorted by the x of their box centres (left to right)."""

    image: Image
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class SceneStyle:
    """What may be drawn. Sizes are the longer side of a shape's box, as a part of the picture's shorter side."""

    min_shapes: int = 0
    max_shapes: int = 5
    min_side: float = 0.125
    max_side: float = 0.5
    clutter_share: float = 0.2
    max_clutter: int = 5
    # Two centres nearer than this (of the width) have no left and right that a reader would agree on.
    min_centre_gap: float = 0.05
    overlap_share: float = 0.2


DETECTOR_STYLE = SceneStyle(
    max_shapes=7, min_side=0.08, max_side=0.6, clutter_share=0.4, max_clutter=12, min_centre_gap=0
)
DESCRIBER_STYLE = SceneStyle()


def _turn(rng: np.random.Generator, upright_share: float, full_turn: float) -> float:
    """An angle in radians: none for most shapes people draw, else slight, else anything."""
    kind = rng.random()
    if kind < upright_share:
        return 0.0
    return float(rng.uniform(-0.35, 0.35) if kind < upright_share + 0.2 else rng.uniform(0, full_turn))


def outline(rng: np.random.Generator, label: str) -> Points:
    """The corners of one shape around the origin, at no particular size."""
    if label == "circle":
        angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], 1)
    if label == "square":
        corners, turn = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float), _turn(rng, 0.6, math.pi / 2)
    elif label == "triangle":
        slant = rng.uniform(-0.6, 0.6) if rng.random() < 0.2 else 0.0
        # Half the base for a height of 2: 1.15 is equilateral, 1.0 is the usual hand-typed polygon.
        half_base = rng.choice([1.0, 1.155, rng.uniform(0.8, 1.35)])
        corners, turn = np.array([(slant, -1), (half_base, 1), (-half_base, 1)], float), _turn(rng, 0.6, 2 * math.pi)
    else:
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.36, 0.52))
        corners = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
        turn = _turn(rng, 0.6, 2 * math.pi / 5)
    rotation = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    return np.asarray(corners @ rotation, np.float64)


def _placed(rng: np.random.Generator, label: str, side_px: float, width_px: int, height_px: int) -> Points:
    """The shape at a size and a place where its whole box lies inside the picture."""
    points = outline(rng, label)
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) * (side_px / (high - low).max())
    half = points.max(0)
    margin_px = 1.0
    centre = [
        rng.uniform(half[0] + margin_px, width_px - half[0] - margin_px),
        rng.uniform(half[1] + margin_px, height_px - half[1] - margin_px),
    ]
    return np.asarray(points + centre, np.float64)


def _box(points: Points) -> tuple[float, float, float, float]:
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return x0, y0, x1, y1


def _stands_out(canvas: Canvas, box: tuple[float, float, float, float], rgb: Rgb) -> bool:
    """Whether the colour differs enough from what is behind it to be seen."""
    x0, y0, x1, y1 = (int(edge) for edge in box)
    behind = canvas[y0 : y1 + 1, x0 : x1 + 1].mean((0, 1))
    return bool(np.abs(behind - np.array(rgb)).sum() >= 100)


def _collides(candidate: Shape, shapes: list[Shape], style: SceneStyle, width_px: int, overlapping: bool) -> bool:
    side = max(candidate.box[2] - candidate.box[0], candidate.box[3] - candidate.box[1])
    for other in shapes:
        other_side = max(other.box[2] - other.box[0], other.box[3] - other.box[1])
        dx, dy = candidate.centre[0] - other.centre[0], candidate.centre[1] - other.centre[1]
        if abs(dx) < style.min_centre_gap * width_px:
            return True
        reach = (side + other_side) / 2
        if overlapping and candidate.colour != other.colour:
            # Boxes may share up to a fifth of their reach: a covered corner, never a hidden shape.
            if max(abs(dx), abs(dy)) < 0.8 * reach:
                return True
        elif max(abs(dx), abs(dy)) < 1.03 * reach and math.hypot(dx, dy) < 1.15 * reach:
            return True
    return False


def _fill(canvas: Image, shape: Shape, rng: np.random.Generator) -> None:
    corners = [np.round(np.array(shape.polygon) * 16).astype(np.int32)]
    # Half of all drawing programs do not smooth edges.
    line: int = cv2.LINE_AA if rng.random() < 0.7 else cv2.LINE_8
    cv2.fillPoly(canvas, corners, shape.rgb, line, shift=4)
    if rng.random() < 0.2:
        darkness = rng.uniform(0, 0.6)
        edge = (20, 20, 20) if rng.random() < 0.5 else tuple(round(level * darkness) for level in shape.rgb)
        thickness_px = max(1, round(min(canvas.shape[:2]) * rng.uniform(0.002, 0.012)))
        cv2.polylines(canvas, corners, True, edge, thickness_px, line, shift=4)


def _camera(image: Image, rng: np.random.Generator) -> Image:
    """Light blur, sensor noise, JPEG: what happens between a drawing and a file."""
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (3, 3), 0).astype(np.uint8)
    if rng.random() < 0.35:
        noisy = image + rng.normal(0, rng.uniform(1, 11), image.shape)
        image = np.clip(noisy, 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))]
        _, encoded = cv2.imencode(".jpg", image[..., ::-1], quality)
        image = np.ascontiguousarray(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])
    return image


def draw_scene(rng: np.random.Generator, width_px: int, height_px: int, style: SceneStyle = DESCRIBER_STYLE) -> Scene:
    """Draw one scene. The same generator state always gives the same scene."""
    canvas = draw_background(rng, width_px, height_px, clutter_share=style.clutter_share, max_clutter=style.max_clutter)
    wanted = int(rng.integers(style.min_shapes, style.max_shapes + 1))
    overlapping = rng.random() < style.overlap_share
    largest = style.max_side if wanted <= 3 else max(style.min_side, style.max_side * 0.7)
    shapes: list[Shape] = []
    for attempt in range(80):
        if len(shapes) == wanted:
            break
        # A crowded picture gets smaller shapes, so that the wanted number is nearly always reached.
        top = max(style.min_side, largest * (1 - attempt / 100))
        side_px = math.exp(rng.uniform(math.log(style.min_side), math.log(top))) * min(width_px, height_px)
        label, colour = str(rng.choice(LABELS)), str(rng.choice(COLOURS))
        points = _placed(rng, label, side_px, width_px, height_px)
        corners = tuple((float(x), float(y)) for x, y in points)
        shape = Shape(label, colour, _box(points), corners, sample_colour(rng, colour))
        if not _collides(shape, shapes, style, width_px, overlapping) and _stands_out(canvas, shape.box, shape.rgb):
            shapes.append(shape)
    image = np.ascontiguousarray(np.clip(canvas, 0, 255).astype(np.uint8))
    for shape in shapes:
        _fill(image, shape, rng)
    return Scene(_camera(image, rng), tuple(sorted(shapes, key=lambda shape: shape.centre[0])))
