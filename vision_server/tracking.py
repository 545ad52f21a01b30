"""Numbers the objects of one stream, by Ultralytics' ByteTrack or BoT-SORT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vision_server.colour import Pixels
from vision_server.images import Image
from vision_server.requests import DetectOptions, Tracker
from vision_server.results import Detection

# What both trackers' settings call `track_low_thresh`: boxes down to here keep an object's track going through a weak moment.
LOW_CONFIDENCE = 0.1
# The tracker sees so many objects also when the caller wants fewer: else the weakest would come and go, and lose their numbers.
MIN_OBJECTS = 300
# BoT-SORT looks for the camera's motion in a picture of at most this side, in pixels: of a 4K frame in a quarter of the time.
MOTION_SIDE_PX = 1280


def sought(options: DetectOptions) -> DetectOptions:
    """What the detector has to look for, so that a tracker can follow what the caller asked for."""
    return replace(
        options,
        min_confidence=min(options.min_confidence, LOW_CONFIDENCE),
        max_detections=max(options.max_detections, MIN_OBJECTS),
    )


class Tracking:
    """One stream's tracker; numbers begin at 1 and are never given twice.

    An object gets its number when it has been seen in two frames running, in a stream's first frame at once.
    """

    def __init__(self, kind: Tracker, options: DetectOptions) -> None:
        """`options` are the caller's own; the detections that come are those of sought(options)."""
        self._kind = kind
        self._options = options
        self._tracker: Any = None
        self._motion_shape: tuple[int, ...] = ()

    def follow(self, image: Image, detections: Sequence[Detection]) -> tuple[Detection, ...]:
        """The caller's detections with their numbers.

        Blocks, and wants the frames in their order: one call after the other, from any thread.
        """
        if self._tracker is None:
            self._tracker = _make(self._kind)
        picture, scale = self._motion_picture(image) if self._kind is Tracker.BOTSORT else (None, 1.0)
        # One row an object that is followed and was seen in this frame: …, number, confidence, class, index.
        rows = self._tracker.update(_boxes(detections, scale), picture)
        numbers = {int(row[-1]): int(row[-4]) for row in rows}
        wanted = [
            replace(found, track_id=numbers.get(index))
            for index, found in enumerate(detections)
            if found.confidence >= self._options.min_confidence
        ]
        return tuple(wanted[: self._options.max_detections])

    def _motion_picture(self, image: Image) -> tuple[Pixels, float]:
        """The image in grey, height × width × 1, and how many of its pixels are one of the image's."""
        grey = cv2.cvtColor(image.rgb, cv2.COLOR_RGB2GRAY)
        height, width = grey.shape
        shrink = min(1.0, MOTION_SIDE_PX / max(width, height))
        if shrink < 1:
            size = max(2, round(width * shrink)), max(2, round(height * shrink))
            grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        if grey.shape != self._motion_shape:
            # It compares with the frame before; of another size it would fail, and go on failing.
            self._tracker.gmc.reset_params()
            self._motion_shape = grey.shape
        return grey[..., np.newaxis], shrink / image.reduction


class _Boxes:
    """What Ultralytics' trackers ask of their own `Boxes`, by NumPy: floats, one row an object.

    `xywh` is centre x and y, width, height, in pixels.
    """

    def __init__(self, rows: npt.NDArray[np.float32], conf: npt.NDArray[np.float32], cls: npt.NDArray[np.float32]):
        self.rows, self.conf, self.cls = rows, conf, cls

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, wanted: npt.NDArray[np.bool_]) -> _Boxes:
        return type(self)(self.rows[wanted], self.conf[wanted], self.cls[wanted])

    @property
    def xywh(self) -> npt.NDArray[np.float32]:
        return self.rows[:, :4]

    @property
    def xyxy(self) -> npt.NDArray[np.float32]:
        middle, half = self.rows[:, :2], self.rows[:, 2:4] / 2
        return np.concatenate([middle - half, middle + half], axis=1)


class _TurnedBoxes(_Boxes):
    """Rows with an angle in radians; the trackers look whether there is an `xywhr`."""

    @property
    def xywhr(self) -> npt.NDArray[np.float32]:
        return self.rows


def _boxes(detections: Sequence[Detection], scale: float) -> _Boxes:
    turned = bool(detections) and detections[0].oriented_box is not None
    rows = np.array([_row(found) for found in detections], np.float32).reshape(-1, 5 if turned else 4)
    rows[:, :4] *= scale
    conf = np.array([found.confidence for found in detections], np.float32)
    cls = np.array([found.class_id for found in detections], np.float32)
    return (_TurnedBoxes if turned else _Boxes)(rows, conf, cls)


def _row(found: Detection) -> tuple[float, ...]:
    if (turned := found.oriented_box) is not None:
        angle = math.radians(turned.angle_degrees)
        return turned.center_x_px, turned.center_y_px, turned.width_px, turned.height_px, angle
    box = found.box
    width, height = box.x_max_px - box.x_min_px, box.y_max_px - box.y_min_px
    return box.x_min_px + width / 2, box.y_min_px + height / 2, width, height


def _make(kind: Tracker) -> Any:
    """A tracker with the settings that Ultralytics gives it."""
    from ultralytics.trackers.bot_sort import BOTSORT
    from ultralytics.trackers.byte_tracker import BYTETracker
    from ultralytics.utils import ROOT, YAML, IterableSimpleNamespace

    settings = IterableSimpleNamespace(**YAML.load(Path(ROOT) / "cfg" / "trackers" / f"{kind}.yaml"))
    return (BYTETracker if kind is Tracker.BYTETRACK else BOTSORT)(settings)
