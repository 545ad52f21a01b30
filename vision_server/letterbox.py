"""Fits an image into the square that a detector was trained at, and finds the way back."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vision_server.images import Image, Pixels

# The grey that Ultralytics pads with, in training too.
PADDING = 114


@dataclass(frozen=True, slots=True)
class Fitted:
    """`rgb` is uint8, side × side × 3; the image lies in it, `scale` times as large, from (left, top) on."""

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
    rgb = image.rgb
    if (width, height) != (image.width_px, image.height_px):
        rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LINEAR)
    left, top = (side_px - width) // 2, (side_px - height) // 2
    if (width, height) != (side_px, side_px):
        square = np.full((side_px, side_px, 3), PADDING, np.uint8)
        square[top : top + height, left : left + width] = rgb
        rgb = square
    return Fitted(rgb, scale, left, top, image.width_px, image.height_px)


def crop(image: Image, side_px: int) -> Fitted:
    """Scales the shorter side to the square and cuts the middle out: what classification models are trained with."""
    scale = side_px / min(image.width_px, image.height_px)
    width = max(side_px, round(image.width_px * scale))
    height = max(side_px, round(image.height_px * scale))
    rgb = cv2.resize(image.rgb, (width, height), interpolation=cv2.INTER_LINEAR)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    middle = np.ascontiguousarray(rgb[top : top + side_px, left : left + side_px])
    return Fitted(middle, scale, -left, -top, image.width_px, image.height_px)
