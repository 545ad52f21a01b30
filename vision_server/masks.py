"""Draws the pixels of objects from a segmenter's numbers, and writes them as outlines or run lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from vision_server.requests import MaskForm
from vision_server.results import Box, Detection, Polygon, RunLengths

Floats = NDArray[np.float32]

# A mask is drawn pixel by pixel up to this size, about 256 × 256, then on a grid of so many cells over its box: the model itself
# sees an object at a quarter of its input (160 × 160 for a whole picture at 640), so a finer grid costs time and tells nothing.
MAX_CELLS = 1 << 16
# The runs, and the points, of all masks of an answer together: the masks of the least confident objects beyond are left out.
# Ordinary pictures have a few thousand; a thousand objects across a picture of 50 megapixels would have 17 million runs. So
# many take the event loop about 0.1 s to write.
MAX_RUNS, MAX_POINTS = 500_000, 100_000
# An outline may leave the cells' edges by so many cells: two thirds of the corners of its staircase go, 0.1 % of its area.
_OUTLINE_TOLERANCE_CELLS = 0.6


@dataclass(frozen=True, slots=True)
class MaskNumbers:
    """What the masks of one image are made of, until somebody has time to draw them.

    `coefficients` is objects × parts, in the order of the image's detections; `prototypes` is parts × height × width and covers
    the model's square of `side_px`, in which the image lies `scale` times as large from (left, top) on.
    """

    coefficients: Floats
    prototypes: Floats
    side_px: int
    scale: float
    left_px: int
    top_px: int


@dataclass(frozen=True, slots=True)
class ObjectMask:
    """An object's pixels: `inside` is rows × columns of 0 and 1, a grid over the rectangle of whole pixels of the image."""

    left_px: int
    top_px: int
    width_px: int
    height_px: int
    inside: NDArray[np.uint8]


def draw_masks(
    numbers: MaskNumbers, found: Sequence[Detection], wanted: Sequence[Detection]
) -> list[ObjectMask | None]:
    """The mask of each of `wanted`, cut to its box; None where nothing of it is inside.

    `found` is what the numbers belong to; `wanted` has its boxes, perhaps fewer and in another order, as a tracker leaves them.
    """
    # Height first: then each row of a cut-out is one small product of matrices, without copying the cut-out.
    prototypes = numbers.prototypes.transpose(1, 0, 2)
    places = {id(one.box): place for place, one in enumerate(found)}
    return [
        _draw(numbers, prototypes, numbers.coefficients[places[id(one.box)]], one.box)
        if id(one.box) in places
        else None
        for one in wanted
    ]


def with_masks(
    detections: Sequence[Detection],
    masks: Sequence[ObjectMask | None],
    form: MaskForm,
    width_px: int,
    height_px: int,
) -> tuple[Detection, ...]:
    """The detections with their masks written; an object without any, or beyond MAX_RUNS or MAX_POINTS, stays as it is."""
    written = []
    runs = points = 0
    for found, mask in zip(detections, masks, strict=True):
        if mask is not None and form is MaskForm.POLYGON and points < MAX_POINTS:
            polygon = outline(mask)
            points += len(polygon.points)
            written.append(replace(found, mask=polygon))
        elif mask is not None and form is MaskForm.RLE and runs + 2 * mask.width_px <= MAX_RUNS:
            lengths = run_lengths(mask, width_px, height_px)  # two runs a column, unless it has holes or parts
            runs += len(lengths.counts)
            written.append(replace(found, mask=lengths))
        else:
            written.append(found)
    return tuple(written)


def outline(mask: ObjectMask) -> Polygon:
    """The outline of the largest part."""
    contours, _ = cv2.findContours(mask.inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # As many cells as the contour and what it encloses have: its area is measured between the cells' middles.
    largest = max(contours, key=lambda contour: cv2.contourArea(contour) + cv2.arcLength(contour, True) / 2)
    cells = largest[:, 0]
    low, high = cells.min(0), cells.max(0)
    points = cv2.approxPolyDP(largest, _OUTLINE_TOLERANCE_CELLS, True)[:, 0].astype(np.float64)
    if len(points) < 3 or (high == low).any():
        # A line of cells encloses nothing between their middles; their corners do.
        corners = cells[:, None] + np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
        points = cv2.convexHull(corners.reshape(-1, 1, 2).astype(np.int32))[:, 0].astype(np.float64)
    else:
        # OpenCV's contour runs through the middles of the outermost cells: pulled out to run around them.
        points = low + (points - low) * ((high + 1 - low) / (high - low))
    rows, columns = mask.inside.shape
    points *= (mask.width_px / columns, mask.height_px / rows)
    points += (mask.left_px, mask.top_px)
    return Polygon(tuple((x, y) for x, y in points.tolist()))


def run_lengths(mask: ObjectMask, width_px: int, height_px: int) -> RunLengths:
    """The mask as runs over an image of this size, column after column; made from the cut-out alone."""
    rows, columns = mask.inside.shape
    # Column after column, each with a cell of outside above and below, so that every run begins and ends within its column.
    closed = np.zeros((columns, rows + 2), np.uint8)
    closed[:, 1:-1] = mask.inside.T
    flat = closed.reshape(-1)
    column, edge = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), rows + 2)
    column, begin, end = column[::2], edge[::2], edge[1::2]
    if rows != mask.height_px:
        begin, end = _scaled(begin, rows, mask.height_px), _scaled(end, rows, mask.height_px)
    if columns != mask.width_px:
        # Each column of pixels repeats the runs of its column of cells.
        cells = np.arange(mask.width_px) * columns // mask.width_px
        count = np.bincount(column, minlength=columns)
        first = (np.cumsum(count) - count)[cells]
        count = count[cells]
        run = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        column, begin, end = np.repeat(np.arange(mask.width_px), count), begin[run], end[run]
    above = (column + mask.left_px) * height_px + mask.top_px
    borders = np.empty(2 * len(above) + 2, np.int64)
    borders[0], borders[-1] = 0, width_px * height_px
    borders[1:-1:2], borders[2:-1:2] = above + begin, above + end
    counts = np.diff(borders)
    # Where one column ends inside and the next begins inside, no run of outside lies between: both are one.
    joined = np.flatnonzero(counts[2:-1:2] == 0) * 2 + 2
    if len(joined):
        counts = np.diff(np.delete(borders, np.concatenate((joined, joined + 1))))
    return RunLengths(height_px, width_px, tuple(counts.tolist() if counts[-1] else counts[:-1].tolist()))


def _draw(numbers: MaskNumbers, prototypes: Floats, coefficients: Floats, box: Box) -> ObjectMask | None:
    # The pixels whose left and top edges lie in the box, as Ultralytics cuts masks.
    left, top = math.ceil(box.x_min_px), math.ceil(box.y_min_px)
    width, height = math.ceil(box.x_max_px) - left, math.ceil(box.y_max_px) - top
    if width < 1 or height < 1:
        return None
    shrink = min(1.0, math.sqrt(MAX_CELLS / (width * height)))
    columns, rows = max(1, round(width * shrink)), max(1, round(height * shrink))
    # From cells to prototypes: both are measured from the middle of their first cell. x' = x * step_x + first_x.
    per_px_x = numbers.scale * prototypes.shape[2] / numbers.side_px
    per_px_y = numbers.scale * prototypes.shape[0] / numbers.side_px
    step_x, step_y = width / columns * per_px_x, height / rows * per_px_y
    first_x = left * per_px_x + numbers.left_px * prototypes.shape[2] / numbers.side_px + step_x / 2 - 0.5
    first_y = top * per_px_y + numbers.top_px * prototypes.shape[0] / numbers.side_px + step_y / 2 - 0.5
    near_x = _neighbours(first_x, step_x, columns, prototypes.shape[2])
    near_y = _neighbours(first_y, step_y, rows, prototypes.shape[0])
    part = np.matmul(coefficients, prototypes[near_y, :, near_x])
    to_part = np.array([[step_x, 0, first_x - near_x.start], [0, step_y, first_y - near_y.start]])
    drawn = cv2.warpAffine(
        part,
        to_part,
        (columns, rows),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    inside = (drawn > 0).view(np.uint8)
    return ObjectMask(left, top, width, height, inside) if inside.any() else None


def _neighbours(first: float, step: float, count: int, size: int) -> slice:
    """The prototypes' cells that an interpolation from `first` on touches."""
    low = min(max(0, math.floor(first)), size - 1)
    return slice(low, min(size, max(low, math.floor(first + step * (count - 1)) + 1) + 1))


def _scaled(edges: NDArray[np.intp], cells: int, size_px: int) -> NDArray[np.intp]:
    """Edges between cells as edges between pixels."""
    return (edges * size_px * 2 + cells) // (2 * cells)
