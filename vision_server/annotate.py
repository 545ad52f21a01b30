"""Draws what was found into the picture, as JPEG."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vision_server.results import Detection

_JPEG_QUALITY = 90
# Steps of the golden ratio around the colour circle keep neighbouring classes apart; strong and rather dark, so that boxes stand
# out on light grounds too (Ultralytics' own palette has a near-white).
_HUE_STEP = 0.618034
_SATURATION, _VALUE = 0.9, 0.75


def annotate(rgb: NDArray[np.uint8], detections: Sequence[Detection]) -> bytes:
    """The picture (height, width, 3) with boxes, labels and confidences, drawn by Ultralytics' Annotator."""
    import cv2
    from ultralytics.utils.plotting import Annotator

    # Least confident first, so that the surest lies on top. Annotator draws on BGR, as OpenCV encodes.
    drawing = Annotator(np.ascontiguousarray(rgb[..., ::-1]), pil=False)
    for found in reversed(detections):
        box = found.box
        drawing.box_label(
            [box.x_min_px, box.y_min_px, box.x_max_px, box.y_max_px],
            f"{found.label} {found.confidence:.2f}",
            color=_colour(found.class_id),
        )
    done, encoded = cv2.imencode(".jpg", drawing.result(), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise RuntimeError("the annotated picture could not be encoded")
    return bytes(encoded)


def _colour(class_id: int) -> tuple[int, int, int]:
    """A class's own colour, as blue, green, red."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * _HUE_STEP % 1, _SATURATION, _VALUE)
    return round(blue * 255), round(green * 255), round(red * 255)
