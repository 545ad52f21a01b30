"""Reads a detector's raw numbers: candidates, overlaps, and the way back to the image's pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vision_server.engines.engine import Numbers, Traits
from vision_server.letterbox import Fitted
from vision_server.masks import MaskNumbers
from vision_server.overlaps import keep_turned, keep_upright
from vision_server.results import Box, Card, Classification, Detection, Found, Keypoint, OrientedBox, Task

if TYPE_CHECKING:
    from vision_server.detector import DetectItem

Floats = NDArray[np.float32]

# Names of the 17 keypoints that COCO defines, in its order; for models with as many that name none themselves.
COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip

# With a confidence of 0 every anchor is a candidate; more than these, the weakest, are not compared with each other, so that
# one caller's options cannot hold up the executor. Turned boxes are compared all with all: a thousand take 0.1 s on a slow core.
MAX_CANDIDATES = 3000
MAX_TURNED_CANDIDATES = 1000


class Readout:
    """One batch's numbers; each item is read with its own options, as if it were alone.

    `numbers` is what an engine gives for the batch. Nothing that read() returns refers to it: the engine may write its next
    batch into the same memory.
    """

    def __init__(self, card: Card, numbers: Numbers, traits: Traits, items: Sequence[DetectItem]) -> None:
        self._card = card
        self._items = items
        self._prototypes = numbers[1] if len(numbers) > 1 else None
        # Such models suppress overlaps themselves: their numbers are finished rows.
        self._finished = traits.end2end
        self._keypoint_shape = traits.kpt_shape
        rows = numbers[0]
        self._numbers: list[Floats] | Floats
        if _is_on_accelerator(rows) and card.task is not Task.CLASSIFY and not self._finished:
            self._numbers = _fetch_candidates(rows, len(card.labels), [item.options.min_confidence for item in items])
        else:
            self._numbers = _as_array(rows)

    def read(self, index: int) -> Found:
        """The objects, or the classes, of one image of the batch: the most confident first; its times are left at 0."""
        item, numbers = self._items[index], self._numbers[index]
        if self._card.task is Task.CLASSIFY:
            return Found(classes=self._classes(numbers.reshape(-1), item))
        rows = self._finished_rows(numbers, item) if self._finished else self._surviving_rows(numbers, item)
        if not len(rows.confidences):
            return Found()
        if self._card.task is Task.ORIENTED_BOXES:
            return Found(self._turned(rows, item.fitted))
        return Found(self._upright(rows, item.fitted), masks=self._mask_numbers(index, rows, item))

    def _surviving_rows(self, numbers: Floats, item: DetectItem) -> _Rows:
        """Of (4 + classes + extras) × anchors the surest ones, overlaps suppressed."""
        options = item.options
        first_extra = 4 + len(self._card.labels)
        best = numbers[4:first_extra].max(0)
        near = np.flatnonzero(best >= options.min_confidence)
        found, confidences = numbers[:, near], best[near]
        class_ids = found[4:first_extra].argmax(0)
        rotated = self._card.task is Task.ORIENTED_BOXES
        limit = MAX_TURNED_CANDIDATES if rotated else MAX_CANDIDATES
        if item.class_ids is not None or len(near) > limit:
            chosen = np.arange(len(near)) if item.class_ids is None else np.isin(class_ids, item.class_ids).nonzero()[0]
            if len(chosen) > limit:
                chosen = chosen[np.argsort(-confidences[chosen], kind="stable")[:limit]]
            found, confidences, class_ids = found[:, chosen], confidences[chosen], class_ids[chosen]
        boxes, extras = found[:4].T, found[first_extra:].T
        if not len(boxes):
            kept = []
        elif rotated:
            kept = keep_turned(boxes, extras[:, -1], confidences, class_ids, options.iou_threshold)
        else:
            kept = keep_upright(boxes, confidences, class_ids, options.iou_threshold)
        kept = kept[: options.max_detections]
        boxes = boxes[kept]
        if not rotated:
            half = boxes[:, 2:] / 2
            boxes = np.concatenate((boxes[:, :2] - half, boxes[:, :2] + half), 1)
        return _Rows(boxes, confidences[kept], class_ids[kept], extras[kept])

    def _finished_rows(self, numbers: Floats, item: DetectItem) -> _Rows:
        wanted = numbers[:, 4] >= item.options.min_confidence
        if item.class_ids is not None:
            wanted &= np.isin(numbers[:, 5], item.class_ids)
        rows = numbers[wanted][: item.options.max_detections]
        return _Rows(rows[:, :4], rows[:, 4], rows[:, 5].astype(int), rows[:, 6:])

    def _classes(self, scores: Floats, item: DetectItem) -> tuple[Classification, ...]:
        numbers = np.argsort(-scores, kind="stable")
        if item.class_ids is not None:
            numbers = numbers[np.isin(numbers, item.class_ids)]
        best = numbers[: item.options.max_detections]
        labels = self._card.labels
        return tuple(
            Classification(labels[number], number, confidence)
            for number, confidence in zip(best.tolist(), scores[best].tolist(), strict=True)
        )

    def _upright(self, rows: _Rows, fitted: Fitted) -> tuple[Detection, ...]:
        labels = self._card.labels
        points: Sequence[tuple[Keypoint, ...]] = [()] * len(rows.boxes)
        if self._card.task is Task.POSE:
            points = self._keypoints(rows.extras, fitted)
        return tuple(
            Detection(labels[class_id], class_id, confidence, Box(*box), keypoints=named)
            for class_id, confidence, box, named in zip(
                rows.class_ids.tolist(), rows.certain(), _to_image(rows.boxes, fitted), points, strict=True
            )
        )

    def _keypoints(self, values: Floats, fitted: Fitted) -> list[tuple[Keypoint, ...]]:
        count, width = self._keypoint_shape
        names = self._card.keypoint_names
        if len(names) != count:
            names = COCO_KEYPOINTS if count == len(COCO_KEYPOINTS) else tuple(str(number) for number in range(count))
        points = values.reshape(-1, width)
        # A model that does not tell how sure it is of its points is taken to be.
        sure = np.minimum(points[:, 2], 1).tolist() if width > 2 else [1.0] * len(points)
        named = [
            Keypoint(name, x, y, seen)
            for name, (x, y), seen in zip(names * len(values), _to_image(points[:, :2], fitted), sure, strict=True)
        ]
        return [tuple(named[first : first + count]) for first in range(0, len(named), count)]

    def _turned(self, rows: _Rows, fitted: Fitted) -> tuple[Detection, ...]:
        found = []
        for (x, y, width, height), angle, class_id, confidence in zip(
            rows.boxes.tolist(), rows.extras[:, -1].tolist(), rows.class_ids.tolist(), rows.certain(), strict=True
        ):
            center_x, center_y = (x - fitted.left_px) / fitted.scale, (y - fitted.top_px) / fitted.scale
            width_px, height_px = width / fitted.scale, height / fitted.scale
            half_x = (abs(width_px * math.cos(angle)) + abs(height_px * math.sin(angle))) / 2
            half_y = (abs(width_px * math.sin(angle)) + abs(height_px * math.cos(angle))) / 2
            # The same rectangle is meant by every half turn; the contract's range is -90 up to 90 degrees.
            degrees = (math.degrees(angle) + 90) % 180 - 90
            box = Box(
                _within(center_x - half_x, fitted.width_px),
                _within(center_y - half_y, fitted.height_px),
                _within(center_x + half_x, fitted.width_px),
                _within(center_y + half_y, fitted.height_px),
            )
            oriented = OrientedBox(center_x, center_y, width_px, height_px, degrees)
            found.append(Detection(self._card.labels[class_id], class_id, confidence, box, oriented))
        return tuple(found)

    def _mask_numbers(self, index: int, rows: _Rows, item: DetectItem) -> MaskNumbers | None:
        # A drawing shows masks even where the answer does not write them.
        wanted = item.options.masks or item.options.annotate
        if self._card.task is not Task.SEGMENT or self._prototypes is None or not wanted:
            return None
        fitted = item.fitted
        return MaskNumbers(
            coefficients=rows.extras.copy(),
            prototypes=_as_array(self._prototypes[index]).copy(),
            side_px=fitted.rgb.shape[0],
            scale=fitted.scale,
            left_px=fitted.left_px,
            top_px=fitted.top_px,
        )


class _Rows(NamedTuple):
    """Objects in the model's pixels, the surest first.

    `boxes` is n × 4: left, top, right, bottom; of turned boxes centre x, centre y, width, height. `extras` is what the task adds:
    mask coefficients, keypoints, the angle.
    """

    boxes: Floats
    confidences: Floats
    class_ids: NDArray[np.intp]
    extras: Floats

    def certain(self) -> list[float]:
        """The confidences, whatever rounding in half precision has made of a 1."""
        return np.minimum(self.confidences, 1).tolist()  # type: ignore[no-any-return]


def _is_on_accelerator(values: Any) -> bool:
    return not isinstance(values, np.ndarray) and values.device.type != "cpu"


def _as_array(values: Any) -> Floats:
    """A tensor's or array's numbers in 32 bits, in this process's memory; no copy where they are that already."""
    if not isinstance(values, np.ndarray):
        values = values.float().cpu().numpy()
    return np.asarray(values, np.float32)


def _fetch_candidates(rows: Any, class_count: int, min_confidences: list[float]) -> list[Floats]:
    """Of each image of the batch the anchors that reach its threshold, copied from the accelerator all at once.

    `rows` is a tensor, images × (4 + classes + extras) × anchors: megabytes an image, of which a few columns matter.
    """
    import torch

    floors = torch.tensor(min_confidences, device=rows.device)
    images, anchors = (rows[:, 4 : 4 + class_count].amax(1) >= floors[:, None]).nonzero(as_tuple=True)
    columns = torch.column_stack((images, rows[images, :, anchors].float())).cpu().numpy()
    ends = np.searchsorted(columns[:, 0], np.arange(1, len(min_confidences)))
    return [part[:, 1:].T for part in np.split(columns, ends)]


def _to_image(places: Floats, fitted: Fitted) -> list[list[float]]:
    """Rows of x, y, x, y … from the model's pixels to the image's, within the image."""
    pairs = places.shape[1] // 2
    shift = np.array((fitted.left_px, fitted.top_px) * pairs, np.float32)
    edges = np.array((fitted.width_px, fitted.height_px) * pairs, np.float32)
    return np.minimum(np.maximum((places - shift) / np.float32(fitted.scale), 0), edges).tolist()  # type: ignore[no-any-return]


def _within(value: float, edge: float) -> float:
    return min(float(edge), max(0.0, value))
