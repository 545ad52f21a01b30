"""Counts how well found things agree with true ones, whatever the things are: boxes, masks, points."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

Thing = TypeVar("Thing")
# How well a found thing (first) agrees with a true one: 0 not at all, 1 exactly.
Agreement = Callable[[Thing, Thing], float]


def matched(
    found: Sequence[tuple[str, float, Thing]],
    truth: Sequence[tuple[str, Thing]],
    least: float,
    agreement: Agreement[Thing],
) -> list[tuple[int, int, float]]:
    """The hits as index of the found, index of the true, agreement: surest first, same label, each true thing once.

    `found` has label, confidence, thing; `truth` has label, thing; a hit agrees by at least `least`.
    """
    free = list(range(len(truth)))
    hits = []
    for index in sorted(range(len(found)), key=lambda i: -found[i][1]):
        label, _, thing = found[index]
        candidates = [(agreement(thing, truth[t][1]), t) for t in free if truth[t][0] == label]
        best, chosen = max(candidates, default=(0.0, -1))
        if chosen >= 0 and best >= least:
            free.remove(chosen)
            hits.append((index, chosen, best))
    return hits


def average_precision(
    found: Sequence[Sequence[tuple[str, float, Thing]]],
    truths: Sequence[Sequence[tuple[str, Thing]]],
    labels: Sequence[str],
    least: float,
    agreement: Agreement[Thing],
) -> float:
    """Mean over the labels of the area under precision over recall, 101 points as COCO does it."""
    areas = []
    for label in labels:
        scored: list[tuple[float, bool]] = []
        total = 0
        for things, truth in zip(found, truths, strict=True):
            mine = [thing for thing in things if thing[0] == label]
            wanted = [thing for thing in truth if thing[0] == label]
            total += len(wanted)
            hits = {index for index, _, _ in matched(mine, wanted, least, agreement)}
            scored += [(thing[1], index in hits) for index, thing in enumerate(mine)]
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
