"""How well a found mask, turned box or set of named points agrees with the true one: 0 not at all, 1 exactly."""

from dataclasses import dataclass

import numpy as np

from vision_server.shapes.scenes import Points
from vision_server.shapes.task_truth import Mask

# COCO measures a body by the area it covers; Ultralytics takes this part of its box for that.
COVERED_PART = 0.53


@dataclass(frozen=True)
class PlacedPoints:
    """Named points in their order, (points, 2), with the area of the box around the shape, all in pixels."""

    points: Points
    box_area: float


def mask_overlap(first: Mask, second: Mask) -> float:
    """Intersection over union of two masks of one size."""
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 0.0


def turned_overlap(first: Points, second: Points) -> float:
    """Intersection over union of two convex outlines, such as turned boxes, (corners, 2) each.

    cv2.intersectConvexConvex is wrong where edges nearly lie on each other (OpenCV 5: 0.04 for a box and itself), hence
    the clipping here.
    """
    one, other = _ordered(first), _ordered(second)
    shared = one
    for start, end in zip(other, np.roll(other, -1, 0), strict=True):
        shared = _cut(shared, start, end)
    shared_area = abs(_area(shared))
    union = abs(_area(one)) + abs(_area(other)) - shared_area
    return shared_area / union if union > 0 else 0.0


def _area(points: Points) -> float:
    """Positive when the corners go from x towards y."""
    x, y = points[:, 0], points[:, 1]
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def _ordered(points: Points) -> Points:
    exact = points.astype(np.float64)
    return exact if _area(exact) >= 0 else exact[::-1]


def _cut(points: Points, start: Points, end: Points) -> Points:
    """What of a convex outline lies on the inner side of a line (Sutherland and Hodgman)."""
    along = end - start
    inside = along[0] * (points[:, 1] - start[1]) - along[1] * (points[:, 0] - start[0])
    kept = []
    for index in range(len(points)):
        before, here = inside[index - 1], inside[index]
        if (before < 0) != (here < 0):
            kept.append(points[index - 1] + (points[index] - points[index - 1]) * before / (before - here))
        if here >= 0:
            kept.append(points[index])
    return np.array(kept).reshape(-1, 2)


def point_similarity(found: PlacedPoints, true: PlacedPoints, sigma: float) -> float:
    """COCO's object keypoint similarity: the mean over the points of exp(-distance² / (2 · area · (2 · sigma)²)).

    COCO's sigmas go from 0.025 for a person's eyes to 0.107 for the hips.
    """
    squares = ((found.points - true.points) ** 2).sum(1)
    return float(np.exp(-squares / (2 * COVERED_PART * true.box_area * (2 * sigma) ** 2)).mean())


def turn_degrees(corners: Points) -> float:
    """By how much a turned box is turned; a quarter turn looks the same, so between -45 and 45."""
    (x0, y0), (x1, y1) = corners[0], corners[1]
    return float((np.degrees(np.arctan2(y1 - y0, x1 - x0)) + 45) % 90 - 45)
