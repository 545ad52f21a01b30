"""What is true of a shape beyond its box: its turned box, its mask, its named points."""

import cv2
import numpy as np
from numpy.typing import NDArray

from vision_server.shapes.scenes import Points, Shape

Mask = NDArray[np.bool_]  # (height, width)

# Where a vertical and a horizontal line through the centre of area leave the shape. Unlike the outermost points of the
# outline, these are one point each for every shape (an upright square has no topmost point), and move steadily as it turns.
POINT_NAMES = ("top", "right", "bottom", "left")
# In a mirror left is right.
MIRRORED_POINTS = (0, 3, 2, 1)

# Turned boxes whose areas differ by less than this part count as equally small.
SAME_AREA = 0.01


def outline(shape: Shape) -> Points:
    """The corners of the shape, (corners, 2), x then y, in pixels."""
    return np.array(shape.polygon, np.float64)


def turned_box(shape: Shape) -> Points:
    """The four corners of the smallest turned rectangle around the shape, in order along its edge, in pixels.

    Circles, stars and all triangles with acute angles have several smallest ones: the most upright is the truth, because a
    model can learn that, and could not learn which of several a library happens to name. A circle's is its box.
    """
    points = outline(shape)
    if shape.label == "circle":
        x0, y0, x1, y1 = shape.box
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    hull = cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)
    along = np.roll(hull, -1, 0) - hull
    # A rectangle is the same after a quarter turn: its turn is between -45 and 45 degrees. An eighth turn away counts as -45.
    turns = (np.arctan2(along[:, 1], along[:, 0]) + np.pi / 4) % (np.pi / 2) - np.pi / 4
    areas, boxes = [], []
    for turn in turns:
        cos, sin = np.cos(turn), np.sin(turn)
        axes = np.array([(cos, sin), (-sin, cos)])
        low, high = (hull @ axes.T).min(0), (hull @ axes.T).max(0)
        areas.append(float(np.prod(high - low)))
        boxes.append(np.array([low, (high[0], low[1]), high, (low[0], high[1])]) @ axes)
    smallest = np.array(areas) <= min(areas) * (1 + SAME_AREA)
    best = int(np.argmin(np.where(smallest, np.abs(turns), np.inf)))
    return np.asarray(boxes[best], np.float64)


def mask(shape: Shape, width_px: int, height_px: int) -> Mask:
    """The whole shape, also where another covers it, as the box has it."""
    drawn = np.zeros((height_px, width_px), np.uint8)
    cv2.fillPoly(drawn, [np.round(outline(shape) * 16).astype(np.int32)], (1,), cv2.LINE_8, shift=4)
    return drawn.astype(bool)


def centre_of_area(points: Points) -> tuple[float, float]:
    """Where a cut-out of the outline would balance, x then y."""
    moments = cv2.moments(points.astype(np.float32))
    return moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]


def _crossings(points: Points, axis: int, at: float) -> NDArray[np.float64]:
    """Where the outline meets the line on which coordinate `axis` is `at`: the other coordinate, smallest first."""
    here, there = points, np.roll(points, -1, 0)
    first, last = here[:, axis] - at, there[:, axis] - at
    met = (first * last <= 0) & (first != last)
    part = first[met] / (first[met] - last[met])
    other = 1 - axis
    return np.sort(here[met, other] + part * (there[met, other] - here[met, other]))


def named_points(shape: Shape) -> Points:
    """The points of POINT_NAMES in that order, (4, 2), in pixels, also where another shape covers them."""
    points = outline(shape)
    x, y = centre_of_area(points)
    vertical, horizontal = _crossings(points, 0, x), _crossings(points, 1, y)
    return np.array([(x, vertical[0]), (horizontal[-1], y), (x, vertical[-1]), (horizontal[0], y)])
