"""Draws what was found into the picture, as JPEG."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from vision_server.masks import ObjectMask
from vision_server.results import Classification, Detection, OrientedBox

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
"""Blue, green, red, as OpenCV has them."""

# Larger pictures are drawn on a reduced copy: what is sent back stays a few megabytes, and what it takes to draw is bounded.
MAX_SIDE_PX = 4096
# Masks are filled, the surest first, until they have covered the picture so many times, and so many labels are written: nobody
# could read more, and no request can make drawing last long. All the rest keep their boxes.
_MAX_FILLED_PICTURES, _MAX_LABELS = 4, 300
_FILL_OPACITY = 0.4
_JPEG_QUALITY = 90
# Noto Sans Thai has Thai and Latin letters. Other scripts come out as empty boxes.
FONT = Path(__file__).parent / "fonts" / "NotoSansThai-Medium.ttf"
_FONT_PART, _MIN_FONT_PX, _MAX_FONT_PX = 0.03, 9, 64  # of the mean of width and height
_SHOWN_CLASSES = 3
# Steps of the golden ratio around the colour circle keep neighbouring classes apart; strong and rather dark, so that boxes stand
# out on light grounds too (Ultralytics' own palette has a near-white).
_HUE_STEP = 0.618034
_SATURATION, _VALUE = 0.9, 0.75


def annotate(
    rgb: Pixels,
    detections: Sequence[Detection],
    classes: Sequence[Classification] = (),
    masks: Sequence[ObjectMask | None] = (),
    *,
    reduction: int = 1,
) -> bytes:
    """The picture (height, width, 3) with boxes, masks, keypoints, labels and confidences, drawn by Ultralytics' Annotator.

    `masks` are those of the detections, in their order; empty: none. Each pixel of `rgb` stands for `reduction` × `reduction` of
    the image's, in which everything is measured. A picture whose longer side has more than MAX_SIDE_PX is reduced to that.
    """
    shrink = min(1.0, MAX_SIDE_PX / max(rgb.shape[:2]))
    if shrink < 1:
        rgb = cv2.resize(rgb, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    scale = shrink / reduction
    from ultralytics.utils.plotting import Annotator  # brings torch

    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    _fill(bgr, detections, masks, scale)
    pen = Annotator(bgr, pil=False)
    for found in detections:
        if found.keypoints:
            points = np.array([(p.x_px * scale, p.y_px * scale, p.confidence) for p in found.keypoints])
            pen.kpts(points, radius=pen.lw + 1)
    _to_pillow(pen)
    # Least confident first, so that the surest lies on top.
    for place, found in reversed(list(enumerate(detections))):
        colour = _colour(found.class_id)
        text = _fitting(pen, _label(found)) if place < _MAX_LABELS else ""
        pen.box_label(_edges(found, scale), text, colour, _readable_on(colour))
    _write_classes(pen, classes)
    done, encoded = cv2.imencode(".jpg", pen.result(), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise RuntimeError("the annotated picture could not be encoded")
    return bytes(encoded)


def _fill(bgr: Any, detections: Sequence[Detection], masks: Sequence[ObjectMask | None], scale: float) -> None:
    """Lays each mask over the picture, half transparent, in its class's colour."""
    room = _MAX_FILLED_PICTURES * bgr.shape[0] * bgr.shape[1]
    filled = []
    for found, mask in zip(detections, masks, strict=False):
        if mask is None:
            continue
        room -= int(mask.width_px * scale) * int(mask.height_px * scale)
        if room < 0:
            break
        filled.append((mask, _colour(found.class_id)))
    for mask, colour in reversed(filled):
        left, top = int(mask.left_px * scale), int(mask.top_px * scale)
        right, bottom = round((mask.left_px + mask.width_px) * scale), round((mask.top_px + mask.height_px) * scale)
        under = bgr[top:bottom, left:right]
        if not under.size:
            continue
        inside = cv2.resize(mask.inside, under.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        mixed = np.arange(256)[:, None, None] * (1 - _FILL_OPACITY) + np.array(colour) * _FILL_OPACITY
        cv2.copyTo(cv2.LUT(under, mixed.round().astype(np.uint8)), inside, under)


def _to_pillow(pen: Any) -> None:
    """From here on Pillow draws, which knows more letters than OpenCV's ASCII.

    Not by Annotator(pil=True), which would look for its own fonts on the network.
    """
    height, width = pen.im.shape[:2]
    size_px = min(_MAX_FONT_PX, max(_MIN_FONT_PX, round((width + height) / 2 * _FONT_PART)))
    font = ImageFont.truetype(FONT, size_px)
    ascent, descent = font.getmetrics()
    # Of one height for every text, so that marks above and below fit and labels line up.
    font.getsize = lambda text: (math.ceil(font.getlength(text)), ascent + descent)  # type: ignore[attr-defined]
    pen.pil, pen.font = True, font
    pen.fromarray(pen.im)


def _label(found: Detection) -> str:
    number = "" if found.track_id is None else f"#{found.track_id} "
    return f"{number}{found.label} {found.confidence:.2f}"


def _fitting(pen: Any, text: str) -> str:
    """The text, or nothing where the picture is too small for it."""
    width, height = pen.font.getsize(text)
    return text if width < pen.im.width and height * 4 < pen.im.height else ""


def _edges(found: Detection, scale: float) -> list[Any]:
    """Left, top, right, bottom; of a turned box its four corners, the topmost first, where the label goes."""
    if found.oriented_box is None:
        box = found.box
        return [box.x_min_px * scale, box.y_min_px * scale, box.x_max_px * scale, box.y_max_px * scale]
    corners = _corners(found.oriented_box)
    first = min(range(4), key=lambda number: corners[number][::-1])
    return [[x * scale, y * scale] for x, y in corners[first:] + corners[:first]]


def _corners(turned: OrientedBox) -> list[tuple[float, float]]:
    angle = math.radians(turned.angle_degrees)
    along = math.cos(angle) * turned.width_px / 2, math.sin(angle) * turned.width_px / 2
    across = -math.sin(angle) * turned.height_px / 2, math.cos(angle) * turned.height_px / 2
    return [
        (turned.center_x_px + a * along[0] + b * across[0], turned.center_y_px + a * along[1] + b * across[1])
        for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]


def _write_classes(pen: Any, classes: Sequence[Classification]) -> None:
    """The likeliest classes of the whole picture, below each other in the top left corner."""
    for row, one in enumerate(classes[:_SHOWN_CLASSES]):
        text = _fitting(pen, f"{one.label} {one.confidence:.2f}")
        if text:
            colour = _colour(one.class_id)
            top = row * (pen.font.getsize(text)[1] + 1)
            pen.text([0, top], text, _readable_on(colour), box_color=colour)


def _colour(class_id: int) -> Colour:
    """A class's own colour."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * _HUE_STEP % 1, _SATURATION, _VALUE)
    return round(blue * 255), round(green * 255), round(red * 255)


def _readable_on(colour: Colour) -> Colour:
    """White on dark colours, black on bright ones (luminance as in BT.601)."""
    blue, green, red = colour
    return (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 128 else (255, 255, 255)
