"""Fits an image into the square that a detector was trained at, and finds the way back."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vision_server.colour import Pixels
from vision_server.images import Image

# The grey that Ultralytics pads with, in training too.
PADDING = 114


@dataclass(frozen=True, slots=True)
class Fitted:
    """`rgb` is uint8, side × side × 3; the image lies in it, `scale` times as large, from (left, top) on.

    The original's point (x, y) is at (left_px + x × scale, top_px + y × scale), however much of it was decoded; width_px and
    height_px are its own.
    """

    rgb: Pixels
    scale: float
    left_px: int
    top_px: int
    width_px: int
    height_px: int


def fit(image: Image, side_px: int) -> Fitted:
    """Letterboxes: keeps the proportions, centres, pads with grey.

    Always to the full square, so that what an image gives never depends on which others share its batch.
    """
    scale = min(side_px / image.width_px, side_px / image.height_px)
    width = max(1, round(image.width_px * scale))
    height = max(1, round(image.height_px * scale))
    rgb = _scaled(image, scale)[:height, :width]
    left, top = (side_px - width) // 2, (side_px - height) // 2
    if rgb.shape[:2] != (side_px, side_px):
        square = np.full((side_px, side_px, 3), PADDING, np.uint8)
        square[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
        rgb = square
    return Fitted(np.ascontiguousarray(rgb), scale, left, top, image.width_px, image.height_px)


def crop(image: Image, side_px: int) -> Fitted:
    """Scales the shorter side to the square and cuts the middle out: what classification models are trained with."""
    scale = side_px / min(image.width_px, image.height_px)
    left = (max(side_px, round(image.width_px * scale)) - side_px) // 2
    top = (max(side_px, round(image.height_px * scale)) - side_px) // 2
    rgb = _scaled(image, scale)
    middle = np.ascontiguousarray(rgb[top : top + side_px, left : left + side_px])
    return Fitted(middle, scale, -left, -top, image.width_px, image.height_px)


def _scaled(image: Image, scale: float) -> Pixels:
    """The original `scale` times as large, made from however much of it was decoded.

    Both axes by the same factor, not to a rounded size: that would shift boxes by up to half a pixel of the model's, and a
    reduced picture, whose last pixels may stand for fewer of the original's, by up to one.
    """
    height, width = image.rgb.shape[:2]
    factor = scale * image.reduction
    if factor == 1:
        return image.rgb
    x, y = max(factor, 1 / width), max(factor, 1 / height)  # a line of a pixel stays one
    return cv2.resize(image.rgb, None, fx=x, fy=y, interpolation=cv2.INTER_LINEAR)  # type: ignore[no-any-return]
