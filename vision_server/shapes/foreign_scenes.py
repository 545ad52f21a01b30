"""Draws test scenes in plain Pillow, by another hand than the generator that trains the models.

Nothing here is shared with scenes.py but the names of shapes and colours: other colours, other polygons, other
sizes, other files. What holds here holds for pictures a person draws in a few lines of their own.
"""

import io
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

PURE_COLOURS = {
    "red": ["#ff0000", "#dc143c", "#e03030", "#cc0000", "#d32f2f"],
    "green": ["#008000", "#00ff00", "#228b22", "#32cd32", "#10a040"],
    "blue": ["#0000ff", "#1e3cdc", "#4169e1", "#1565c0", "#0033cc"],
    "yellow": ["#ffff00", "#ffd700", "#ffeb3b", "#f5dc28"],
    "purple": ["#800080", "#a020f0", "#9400d3", "#7b1fa2", "#8a2be2"],
    "orange": ["#ffa500", "#ff8c00", "#f58220", "#ff9800"],
}
LIGHT = ["#ffffff", "#ffffff", "#f5f5f5", "#fafafa", "#fffaf0", "#e6f2ff", "#fdeef4", "#eafaea", "#f5f5dc", "#e0e0e0"]
DARK = ["#000000", "#202020", "#1a1a2e", "#2b2b2b"]
SIZES = [(640, 480), (800, 600), (320, 240), (1280, 720), (480, 640), (512, 512), (600, 800), (1024, 768)]
SHAPE_NAMES = ["circle", "square", "triangle", "star"]


@dataclass(frozen=True)
class ForeignShape:
    """A drawn shape; the box is x0, y0, x1, y1 in pixels, the polygon its corners, x then y (64 for a circle)."""

    label: str
    colour: str
    box: tuple[float, float, float, float]
    polygon: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ForeignScene:
    """A picture with its shapes, left to right."""

    image: Image.Image
    shapes: tuple[ForeignShape, ...]


def _corners(draw: random.Random, label: str, cx: float, cy: float, half: float) -> list[tuple[float, float]]:
    if label == "triangle":
        if draw.random() < 0.5:
            return [(cx, cy - half), (cx + half, cy + half), (cx - half, cy + half)]
        reach = half / math.cos(math.pi / 6)
        return [
            (cx + reach * math.sin(k * 2 * math.pi / 3), cy - reach * math.cos(k * 2 * math.pi / 3)) for k in range(3)
        ]
    if label == "star":
        inner = draw.choice([0.382, 0.4, 0.45, 0.5])
        return [
            (
                cx + half * (1 if k % 2 == 0 else inner) * math.sin(k * math.pi / 5),
                cy - half * (1 if k % 2 == 0 else inner) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ]
    return [(cx - half, cy - half), (cx + half, cy - half), (cx + half, cy + half), (cx - half, cy + half)]


def _turned(corners: list[tuple[float, float]], cx: float, cy: float, degrees: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(cx + (x - cx) * cos - (y - cy) * sin, cy + (x - cx) * sin + (y - cy) * cos) for x, y in corners]


def _places(draw: random.Random, wanted: int, width: int, height: int) -> list[tuple[float, float, float]]:
    """Centres and half sides of up to `wanted` shapes that do not touch and are clearly left or right of each other."""
    short = min(width, height)
    places: list[tuple[float, float, float]] = []
    for _ in range(300):
        if len(places) == wanted:
            break
        half = short * draw.uniform(0.07, 0.24 if wanted <= 2 else 0.17)
        # Room for a turned square: its corner reaches 1.42 half sides.
        reach = 1.42 * half + 2
        cx, cy = draw.uniform(reach, width - reach), draw.uniform(reach, height - reach)
        clear = all(
            math.hypot(cx - x, cy - y) > 1.42 * (half + other) and abs(cx - x) > 0.05 * width for x, y, other in places
        )
        if clear:
            places.append((cx, cy, half))
    return places


def _paint(
    draw: random.Random,
    canvas: ImageDraw.ImageDraw,
    label: str,
    place: tuple[float, float, float],
    scale: int,
    fill: str,
) -> tuple[tuple[float, float, float, float], list[tuple[float, float]]]:
    cx, cy, half = place
    edge = "#202020" if draw.random() < 0.2 else None
    line = max(1, round(half / 20)) * scale
    if label == "circle":
        box = (cx - half, cy - half, cx + half, cy + half)
        canvas.ellipse([value * scale for value in box], fill=fill, outline=edge, width=line if edge else 0)
        turns = [k * math.pi / 32 for k in range(64)]
        return box, [(cx + half * math.cos(turn), cy + half * math.sin(turn)) for turn in turns]
    corners = _corners(draw, label, cx, cy, half)
    if draw.random() < 0.25:
        corners = _turned(corners, cx, cy, draw.uniform(-25, 25))
    scaled = [(x * scale, y * scale) for x, y in corners]
    canvas.polygon(scaled, fill=fill, outline=edge, width=line if edge else 1)
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    return (min(xs), min(ys), max(xs), max(ys)), corners


def draw_foreign_scene(seed: int, max_shapes: int = 5, min_shapes: int = 1) -> ForeignScene:
    """One flat scene; every other one without smoothed edges, three of four through JPEG."""
    draw = random.Random(seed)
    width, height = draw.choice(SIZES)
    scale = draw.choice([1, 3])  # drawn three times too large and shrunk: Pillow's way to smooth edges
    ground = draw.choice(LIGHT if draw.random() < 0.8 else DARK)
    image = Image.new("RGB", (width * scale, height * scale), ground)
    canvas = ImageDraw.Draw(image)
    shapes = []
    for place in _places(draw, draw.randint(min_shapes, max_shapes), width, height):
        label, colour = draw.choice(SHAPE_NAMES), draw.choice(list(PURE_COLOURS))
        # Navy on black or yellow on cream would test the eye, not the model.
        if ground in DARK and colour in ("blue", "purple"):
            colour = "yellow"
        fill = draw.choice(PURE_COLOURS[colour])
        box, corners = _paint(draw, canvas, label, place, scale, fill)
        shapes.append(ForeignShape(label, colour, box, tuple(corners)))
    if scale > 1:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if draw.random() < 0.75:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=draw.randint(75, 95))
        image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    shapes.sort(key=lambda shape: shape.box[0] + shape.box[2])
    return ForeignScene(image, tuple(shapes))
