"""How well found boxes agree with true ones."""

from collections.abc import Sequence

import numpy as np

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
    free = list(range(len(truth)))
    hits = []
    for index in sorted(range(len(found)), key=lambda i: -found[i][1]):
        label, _, box = found[index]
        candidates = [(overlap(box, truth[t][1]), t) for t in free if truth[t][0] == label]
        best, chosen = max(candidates, default=(0.0, -1))
        if best >= least_overlap:
            free.remove(chosen)
            hits.append(index)
    return hits


def average_precision(
    found: Sequence[Sequence[Found]], truths: Sequence[Sequence[Truth]], labels: Sequence[str], least_overlap: float
) -> float:
    """Mean over the labels of the area under precision over recall, 101 points as COCO does it."""
    areas = []
    for label in labels:
        scored: list[tuple[float, bool]] = []
        total = 0
        for boxes, truth in zip(found, truths, strict=True):
            mine = [box for box in boxes if box[0] == label]
            wanted = [box for box in truth if box[0] == label]
            total += len(wanted)
            hits = set(matched_boxes(mine, wanted, least_overlap))
            scored += [(box[1], index in hits) for index, box in enumerate(mine)]
        if not total:
            continue
        scored.sort(key=lambda pair: -pair[0])
        right = np.cumsum([hit for _, hit in scored]) if scored else np.zeros(0)
        recall = right / total
        precision = right / np.arange(1, len(scored) + 1)
        # Precision at a recall is the best precision at that recall or beyond.
        best_beyond = np.maximum.accumulate(precision[::-1])[::-1]
        points = [
            float(best_beyond[np.searchsorted(recall, level)]) if len(recall) and level <= recall[-1] else 0.0
            for level in np.linspace(0, 1, 101)
        ]
        areas.append(float(np.mean(points)))
    return float(np.mean(areas))
