"""How well found boxes agree with true ones."""

from collections.abc import Sequence

from vision_server.shapes.matching import matched

Box = tuple[float, ...]  # x0, y0, x1, y1
Found = tuple[str, float, Box]  # label, confidence, box
Truth = tuple[str, Box]


def overlap(first: Box, second: Box) -> float:
    """Intersection over union."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


def matched_boxes(found: Sequence[Found], truth: Sequence[Truth], least_overlap: float) -> list[int]:
    """Indices of the found boxes that hit a true box of their label, surest first, each true box once."""
    return [index for index, _, _ in matched(found, truth, least_overlap, overlap)]
