"""Reads a detector's raw numbers: candidates, overlaps, and the way back to the image's pixels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from ultralytics.utils.nms import non_max_suppression

from vision_server.letterbox import Fitted
from vision_server.results import Box, Card, Classification, Detection, Keypoint, OrientedBox, Task

if TYPE_CHECKING:
    import torch

    from vision_server.detector import DetectItem

# Names of the 17 keypoints that COCO defines, in its order; models with another number have numbered ones.
COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip


# With a confidence of 0 every anchor is a candidate; more than these, the weakest, are not compared with each other, so that
# one caller's options cannot hold up the executor.
MAX_CANDIDATES = 3000


class Readout:
    """One batch's numbers; each item is read with its own thresholds, as if it were alone."""

    def __init__(self, card: Card, numbers: Any, backend: Any) -> None:
        self._card = card
        first = numbers[0] if isinstance(numbers, list | tuple) else numbers
        # A segmenter's prototypes and a training head's maps come along; boxes need only the first.
        self._numbers: torch.Tensor = first[0] if isinstance(first, list | tuple) else first
        self._end_to_end = bool(getattr(backend, "end2end", False))
        self._keypoint_shape = tuple(getattr(backend, "kpt_shape", None) or ())

    def read(self, index: int, item: DetectItem) -> tuple[tuple[Detection, ...], tuple[Classification, ...]]:
        """The objects, or the classes, of one image of the batch: the most confident first."""
        if self._card.task is Task.CLASSIFY:
            return (), self._classes(self._numbers[index], item)
        rotated = self._card.task is Task.ORIENTED_BOXES
        rows = non_max_suppression(
            self._numbers[index : index + 1],
            # It leaves out what equals the threshold; the contract does not.
            conf_thres=_just_below(item.options.min_confidence),
            iou_thres=item.options.iou_threshold,
            classes=list(item.class_ids) if item.class_ids is not None else None,
            max_det=item.options.max_detections,
            max_nms=MAX_CANDIDATES,
            nc=len(self._card.labels),
            rotated=rotated,
            end2end=self._end_to_end,
        )[0]
        turn = self._oriented if rotated else self._upright
        found = [turn(row, item.fitted) for row in rows.float().cpu().tolist()]
        # Confidences come sorted; equal ones keep the order of the model's anchors.
        return tuple(found), ()

    def _classes(self, row: torch.Tensor, item: DetectItem) -> tuple[Classification, ...]:
        scores = row.float().cpu().flatten().tolist()
        allowed = range(len(scores)) if item.class_ids is None else item.class_ids
        best = sorted(allowed, key=lambda number: -scores[number])[: item.options.max_detections]
        return tuple(Classification(self._card.labels[number], number, scores[number]) for number in best)

    def _upright(self, row: list[float], fitted: Fitted) -> Detection:
        class_id = int(row[5])
        return Detection(
            label=self._card.labels[class_id],
            class_id=class_id,
            confidence=min(1.0, max(0.0, row[4])),
            box=Box(_x(row[0], fitted), _y(row[1], fitted), _x(row[2], fitted), _y(row[3], fitted)),
            keypoints=self._keypoints(row[6:], fitted) if self._card.task is Task.POSE else (),
        )

    def _keypoints(self, values: list[float], fitted: Fitted) -> tuple[Keypoint, ...]:
        count, width = self._keypoint_shape
        points = []
        for number in range(count):
            x, y, *sure = values[number * width : (number + 1) * width]
            name = COCO_KEYPOINTS[number] if count == len(COCO_KEYPOINTS) else str(number)
            points.append(Keypoint(name, _x(x, fitted), _y(y, fitted), sure[0] if sure else 1.0))
        return tuple(points)

    def _oriented(self, row: list[float], fitted: Fitted) -> Detection:
        x, y, width, height, confidence, class_number, angle = row[:7]
        center_x, center_y = (x - fitted.left_px) / fitted.scale, (y - fitted.top_px) / fitted.scale
        width, height = width / fitted.scale, height / fitted.scale
        # The same rectangle is meant by every half turn; the contract's range is -90 up to 90 degrees.
        degrees = (math.degrees(angle) + 90) % 180 - 90
        half_x = (abs(width * math.cos(angle)) + abs(height * math.sin(angle))) / 2
        half_y = (abs(width * math.sin(angle)) + abs(height * math.cos(angle))) / 2
        return Detection(
            label=self._card.labels[int(class_number)],
            class_id=int(class_number),
            confidence=min(1.0, max(0.0, confidence)),
            box=Box(
                max(0.0, center_x - half_x),
                max(0.0, center_y - half_y),
                min(float(fitted.width_px), center_x + half_x),
                min(float(fitted.height_px), center_y + half_y),
            ),
            oriented_box=OrientedBox(center_x, center_y, width, height, degrees),
        )


def _just_below(confidence: float) -> float:
    return max(0.0, float(np.nextafter(np.float32(confidence), np.float32(-1))))


def _x(value: float, fitted: Fitted) -> float:
    return min(float(fitted.width_px), max(0.0, (value - fitted.left_px) / fitted.scale))


def _y(value: float, fitted: Fitted) -> float:
    return min(float(fitted.height_px), max(0.0, (value - fitted.top_px) / fitted.scale))
