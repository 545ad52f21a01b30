"""How what a detector found is put in front of a question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vision_server.results import Box, Classification, Detection

# Some 15 tokens each: more would cost more time to read than they tell. All are counted.
MAX_POSITIONS = 20
MAX_CLASSES = 5


def ground(
    question: str,
    detections: Sequence[Detection],
    classes: Sequence[Classification] = (),
    *,
    width_px: int,
    height_px: int,
) -> str:
    """Return the question with what a detector found before it, in words that any vision-language model can read.

    Objects: how many of each label, sorted by name; then where the surest of them lie, from left to right, in whole per cent
    of the picture's width and height, which mean the same at every size that a model scales its pictures to.

        Detected objects: 2 circle, 1 star.
        Positions from left to right, in percent of width (x) and height (y): circle x 5-20, y 10-42; star x 41-60, y 0-35; …
        <question>

    Nothing found says "none", because "the detector looked and found nothing" also helps to answer. A classifier's answer is
    the most likely classes of the whole picture instead: "Image classes: star 98%, circle 2%."

    The same answer always gives the same text. Labels are the model's own words; a line break in one becomes a space.
    """
    if classes:
        return f"{_classes(classes)}\n{question}"
    lines = [counted(detection.label for detection in detections)]
    if detections:
        lines.append(_positions(detections, width_px, height_px))
    return "\n".join([*lines, question])


def counted(labels: Iterable[str]) -> str:
    """How many there are of each label, as a sentence."""
    counts = Counter(_one_line(label) for label in labels)
    return f"Detected objects: {', '.join(f'{counts[label]} {label}' for label in sorted(counts)) or 'none'}."


def _positions(detections: Sequence[Detection], width_px: int, height_px: int) -> str:
    surest = sorted(detections, key=lambda detection: -detection.confidence)[:MAX_POSITIONS]
    surest.sort(key=lambda detection: _center(detection.box))
    places = "; ".join(
        f"{_one_line(detection.label)} x {_span(detection.box.x_min_px, detection.box.x_max_px, width_px)}"
        f", y {_span(detection.box.y_min_px, detection.box.y_max_px, height_px)}"
        for detection in surest
    )
    which = f"of the {MAX_POSITIONS} surest " if len(detections) > MAX_POSITIONS else ""
    return f"Positions {which}from left to right, in percent of width (x) and height (y): {places}."


def _center(box: Box) -> tuple[float, float]:
    return box.x_min_px + box.x_max_px, box.y_min_px + box.y_max_px


def _span(from_px: float, to_px: float, whole_px: int) -> str:
    return "-".join(str(round(100 * min(1.0, max(0.0, edge_px / whole_px)))) for edge_px in (from_px, to_px))


def _classes(classes: Sequence[Classification]) -> str:
    likely = ", ".join(f"{_one_line(one.label)} {round(100 * one.confidence)}%" for one in classes[:MAX_CLASSES])
    return f"Image classes: {likely}."


def _one_line(label: str) -> str:
    return " ".join(label.split())
