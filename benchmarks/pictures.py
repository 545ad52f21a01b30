"""The pictures that all sides of the benchmarks detect in: drawn scenes as JPEG, always the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np

from vision_server.shapes.scenes import draw_scene

COUNT = 32
SIDE_PX = 640


@cache
def pictures(side_px: int = SIDE_PX, count: int = COUNT) -> Sequence[bytes]:
    """JPEG files of `side_px` × `side_px` pixels."""
    rng = np.random.default_rng(20_260)
    found = []
    for _ in range(count):
        scene = draw_scene(rng, side_px, side_px)
        done, encoded = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        assert done
        found.append(encoded.tobytes())
    return found
