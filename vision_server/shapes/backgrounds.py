"""What lies behind the shapes: flat, graded, textured or cluttered surfaces."""

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vision_server.shapes.palette import hsv_to_rgb

Canvas = NDArray[np.float32]  # (height, width, 3), RGB, 0..255
AnyArray = NDArray[Any]


def flat(rng: np.random.Generator, width_px: int, height_px: int) -> Canvas:
    """White, light, pastel, grey, mid-tone or dark: what a person picks in a drawing program."""
    kind = rng.random()
    hue = rng.uniform(0, 360)
    if kind < 0.22:
        colour = (255, 255, 255)
    elif kind < 0.42:
        colour = hsv_to_rgb(hue, rng.uniform(0, 0.08), rng.uniform(0.86, 1.0))
    elif kind < 0.65:
        colour = hsv_to_rgb(hue, rng.uniform(0.06, 0.32), rng.uniform(0.82, 1.0))
    elif kind < 0.80:
        colour = hsv_to_rgb(hue, rng.uniform(0, 0.25), rng.uniform(0.3, 0.8))
    else:
        colour = hsv_to_rgb(hue, rng.uniform(0, 0.5), rng.uniform(0.0, 0.28))
    return np.full((height_px, width_px, 3), colour, np.float32)


def graded(rng: np.random.Generator, width_px: int, height_px: int) -> Canvas:
    """Four corner colours of low saturation, blended."""
    corners = rng.integers(20, 246, (2, 2, 3)).astype(np.float32)
    grey = corners.mean(2, keepdims=True)
    corners = grey + (corners - grey) * rng.uniform(0, 0.4)
    blended: Canvas = cv2.resize(corners, (width_px, height_px), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    return blended


def add_blotches(rng: np.random.Generator, canvas: Canvas) -> Canvas:
    """Brightness noise at one random scale, as on paper, plaster or cloth."""
    height_px, width_px = canvas.shape[:2]
    cells = max(2, min(width_px, height_px) // int(rng.integers(3, 16)))
    noise = rng.normal(0, rng.uniform(2, 18), (cells, cells)).astype(np.float32)
    speckled: Canvas = canvas + cv2.resize(noise, (width_px, height_px))[..., None]
    return speckled


def add_pattern(rng: np.random.Generator, canvas: Canvas) -> Canvas:
    """Faint stripes, a grid or a chequerboard."""
    height_px, width_px = canvas.shape[:2]
    period_px = rng.uniform(0.04, 0.2) * min(width_px, height_px)
    rows, columns = np.mgrid[0:height_px, 0:width_px]
    kind = rng.integers(4)
    if kind == 0:
        mask = (columns / period_px).astype(int) % 2
    elif kind == 1:
        mask = ((rows + columns) / period_px).astype(int) % 2
    elif kind == 2:
        mask = ((columns % period_px < 1.5) | (rows % period_px < 1.5)).astype(int)
    else:
        mask = ((columns / period_px).astype(int) + (rows / period_px).astype(int)) % 2
    strength = rng.uniform(6, 28) * (1 if rng.random() < 0.5 else -1)
    patterned: Canvas = (canvas + mask[..., None].astype(np.float32) * np.float32(strength)).astype(np.float32)
    return patterned


def _blob(rng: np.random.Generator, centre: AnyArray, side_px: int) -> AnyArray:
    angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(6, 12))))
    radii = rng.uniform(0.3, 1, len(angles)) * rng.uniform(0.05, 0.35) * side_px
    points = np.stack([centre[0] + radii * np.cos(angles), centre[1] + 0.45 * radii * np.sin(angles)], 1)
    return points.astype(np.int32)


def add_clutter(rng: np.random.Generator, canvas: Canvas, max_items: int) -> Canvas:
    """Lines, writing, ragged blobs and long bars: coloured things that are none of the four shapes."""
    image = np.ascontiguousarray(np.clip(canvas, 0, 255).astype(np.uint8))
    height_px, width_px = image.shape[:2]
    side_px = min(width_px, height_px)
    for _ in range(int(rng.integers(1, max_items + 1))):
        colour = rng.integers(0, 256, 3).tolist()
        points = np.stack([rng.integers(0, width_px, 5), rng.integers(0, height_px, 5)], 1).astype(np.int32)
        thickness_px = max(1, round(side_px * rng.uniform(0.003, 0.018)))
        kind = rng.random()
        if kind < 0.45:
            corner_count = int(rng.integers(2, 6))
            cv2.polylines(image, [points[:corner_count]], False, colour, thickness_px, cv2.LINE_AA)
        elif kind < 0.65:
            text = "".join(chr(rng.integers(33, 127)) for _ in range(int(rng.integers(1, 9))))
            font, scale = int(rng.integers(0, 6)), rng.uniform(0.4, 2) * side_px / 320
            cv2.putText(image, text, points[0].tolist(), font, scale, colour, thickness_px, cv2.LINE_AA)
        elif kind < 0.85:
            cv2.fillPoly(image, [_blob(rng, points[0], side_px)], colour, cv2.LINE_AA)
            if rng.random() < 0.5:
                image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.003, 0.015) * side_px).astype(np.uint8)
        else:
            length_px = int(rng.integers(side_px // 2, side_px))
            far = points[0] + [length_px, int(rng.integers(2, max(3, side_px // 9)))]
            cv2.rectangle(image, points[0].tolist(), far.tolist(), colour, -1)
    return image.astype(np.float32)


def draw_background(
    rng: np.random.Generator, width_px: int, height_px: int, *, clutter_share: float, max_clutter: int
) -> Canvas:
    """One surface; `clutter_share` of them carry up to `max_clutter` things that are not shapes."""
    if clutter_share and rng.random() < 0.03:
        return rng.integers(0, 256, (height_px, width_px, 3)).astype(np.float32)
    canvas = flat(rng, width_px, height_px) if rng.random() < 0.6 else graded(rng, width_px, height_px)
    texture = rng.random()
    if texture < 0.25:
        canvas = add_blotches(rng, canvas)
    elif texture < 0.35:
        canvas = add_pattern(rng, canvas)
    if rng.random() < clutter_share:
        canvas = add_clutter(rng, canvas, max_clutter)
    return canvas
