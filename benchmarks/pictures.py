"""The pictures that both sides of the benchmark detect in: drawn scenes as JPEG, always the same."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from vision_server.shapes.scenes import draw_scene

COUNT = 32
SIDE_PX = 640


def pictures() -> list[NDArray[np.uint8]]:
    """JPEG files of SIDE_PX × SIDE_PX pixels, as bytes in arrays."""
    rng = np.random.default_rng(20_260)
    found = []
    for _ in range(COUNT):
        scene = draw_scene(rng, SIDE_PX, SIDE_PX)
        done, encoded = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        assert done
        found.append(encoded)
    return found
