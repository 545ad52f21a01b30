"""What a detector might find in a drawn scene, for the describer to learn how far to trust it."""

import numpy as np

from vision_server.results import Detection
from vision_server.shapes.questions import detection
from vision_server.shapes.scenes import LABELS, Scene

# Of 500 shapes in unseen scenes the shipped detector misses 3 and names 22 twice; it imagines 16 in 200 scenes, and its
# edges are off by 0.025 of the side (standard deviation).
MISSED_SHARE = 0.02
TWICE_NAMED_SHARE = 0.06
IMAGINED_SHARE = 0.08
JITTER = 0.025


def imagine_detections(rng: np.random.Generator, scene: Scene) -> list[Detection]:
    """What a detector might find: most of the time the truth, its edges a little off.

    The shipped one makes these mistakes (numbers above): it calls a shape by two names at once, sees one in clutter, misses
    one. The describer must go on looking for itself.
    """
    height_px, width_px = scene.image.shape[:2]
    found = []
    for shape in scene.shapes:
        if rng.random() < MISSED_SHARE:
            continue
        labels = [shape.label]
        if rng.random() < TWICE_NAMED_SHARE:
            labels.append(LABELS[int(rng.integers(len(LABELS)))])
        for label in dict.fromkeys(labels):
            found.append(detection(label, 0.9, _jittered(rng, shape.box)))
    if rng.random() < IMAGINED_SHARE:
        side_px = rng.uniform(0.1, 0.4) * min(width_px, height_px)
        x0, y0 = rng.uniform(0, width_px - side_px), rng.uniform(0, height_px - side_px)
        label = LABELS[int(rng.integers(len(LABELS)))]
        found.append(detection(label, 0.3, (x0, y0, x0 + side_px, y0 + side_px)))
    return found


def _jittered(rng: np.random.Generator, box: tuple[float, float, float, float]) -> tuple[float, ...]:
    sides_px = (box[2] - box[0], box[3] - box[1]) * 2
    return tuple(edge + rng.normal(0, JITTER) * side for edge, side in zip(box, sides_px, strict=True))
