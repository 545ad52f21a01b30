"""What the vision server answers, as plain frozen values.

Coordinates are pixels of the image as seen (EXIF applied), from its top left corner; confidences go from 0 to 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ai4thai.errors import AI4ThaiError


@dataclass(frozen=True)
class Box:
    """A rectangle with sides parallel to the image's."""

    x_min_px: float
    y_min_px: float
    x_max_px: float
    y_max_px: float

    @property
    def width_px(self) -> float:
        """From the left edge to the right one."""
        return self.x_max_px - self.x_min_px

    @property
    def height_px(self) -> float:
        """From the top edge to the bottom one."""
        return self.y_max_px - self.y_min_px

    @property
    def area_px(self) -> float:
        """Width times height, in square pixels."""
        return self.width_px * self.height_px


@dataclass(frozen=True)
class OrientedBox:
    """A turned rectangle: the angle turns the width side clockwise from the x axis, in degrees."""

    center_x_px: float
    center_y_px: float
    width_px: float
    height_px: float
    angle_degrees: float


@dataclass(frozen=True)
class Keypoint:
    """A named point of an object."""

    name: str
    x_px: float
    y_px: float
    confidence: float


@dataclass(frozen=True)
class Polygon:
    """The outline of an object's largest part, as points (x, y) in pixels; the last joins the first."""

    points: tuple[tuple[float, float], ...]

    @property
    def area_px(self) -> float:
        """What the outline encloses, in square pixels."""
        shifted = (*self.points[1:], *self.points[:1])
        return (
            abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(self.points, shifted, strict=True))) / 2
        )


@dataclass(frozen=True)
class RunLengths:
    """A mask of the whole image, column after column: runs of outside and inside in turn, outside first (COCO's RLE)."""

    height_px: int
    width_px: int
    counts: tuple[int, ...]

    @property
    def area_px(self) -> int:
        """How many pixels are inside."""
        return sum(self.counts[1::2])

    def to_array(self) -> Any:
        """The mask as a NumPy array of bool, height x width. Raises ImportError without NumPy."""
        import numpy as np

        inside = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(inside, self.counts).reshape(self.width_px, self.height_px).T


@dataclass(frozen=True)
class Detection:
    """One object found. `track_id` is None without a tracker; `oriented_box`, `keypoints` and `mask` depend on the model."""

    label: str
    class_id: int
    confidence: float
    box: Box
    oriented_box: OrientedBox | None = None
    keypoints: tuple[Keypoint, ...] = ()
    mask: Polygon | RunLengths | None = None
    track_id: int | None = None


@dataclass(frozen=True)
class Classification:
    """What a classification model says of the whole image."""

    label: str
    class_id: int
    confidence: float


@dataclass(frozen=True)
class Timings:
    """Where the time of one image went; `batch_size` images shared the forward pass."""

    decode_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0
    postprocess_ms: float = 0.0
    total_ms: float = 0.0
    batch_size: int = 0


@dataclass(frozen=True)
class DetectResult:
    """The objects in one image, the most confident first.

    `classes` is for classification models; `annotated_image` is a JPEG, empty unless `annotate=True` was asked for.
    """

    model: str
    model_version: str
    width_px: int
    height_px: int
    detections: tuple[Detection, ...]
    classes: tuple[Classification, ...] = ()
    annotated_image: bytes = field(default=b"", repr=False)
    timings: Timings = field(default_factory=Timings)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture with the boxes drawn in, as JPEG; returns its path.

        Raises:
            ValueError: the picture was not asked for, or the path has another format's ending.
        """
        if not self.annotated_image:
            raise ValueError("This result has no picture in it. Ask for one with detect(..., annotate=True).")
        target = jpeg_path(path)
        target.write_bytes(self.annotated_image)
        return target


def jpeg_path(path: str | os.PathLike[str]) -> Path:
    """A path that a JPEG may be written to.

    Raises:
        ValueError: it has another format's ending.
    """
    target = Path(path)
    if target.suffix.lower() not in (".jpg", ".jpeg", ""):
        raise ValueError(f"The picture is a JPEG: call it {target.with_suffix('.jpg').name}, not {target.name}.")
    return target


@dataclass(frozen=True)
class FrameResult:
    """What became of one image of a stream: exactly one of `detection`, `error`, `dropped`.

    `frame_id` counts the images from 0, in the order they were sent.
    """

    frame_id: int
    detection: DetectResult | None = None
    error: AI4ThaiError | None = None
    dropped: bool = False


@dataclass(frozen=True)
class StreamSummary:
    """The server's count of a stream; `duration_s` from its config to its last result."""

    received_count: int
    detected_count: int
    error_count: int
    dropped_count: int
    duration_s: float


class FinishReason(StrEnum):
    """Why a text ended."""

    UNSPECIFIED = "UNSPECIFIED"
    STOP = "STOP"
    LENGTH = "LENGTH"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class Usage:
    """Tokens read (those of images among them) and written."""

    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class TextTimings:
    """Where the time of one text went, from the request on."""

    queue_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A whole text and how it came about; `model` is empty within an Analysis, which doesn't say."""

    text: str
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timings: TextTimings = field(default_factory=TextTimings)
    model: str = ""


@dataclass(frozen=True)
class Analysis:
    """The objects in an image, and an answer about them."""

    detection: DetectResult
    answer: Answer

    @property
    def text(self) -> str:
        """The answer's words."""
        return self.answer.text


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
