"""What the vision server finds out and hands on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vision_server.masks import MaskNumbers


@dataclass(frozen=True, slots=True)
class Box:
    """Pixels of the image as seen; origin top left."""

    x_min_px: float
    y_min_px: float
    x_max_px: float
    y_max_px: float


@dataclass(frozen=True, slots=True)
class OrientedBox:
    """A turned rectangle; the angle is clockwise from the x axis, -90 up to 90 degrees."""

    center_x_px: float
    center_y_px: float
    width_px: float
    height_px: float
    angle_degrees: float


@dataclass(frozen=True, slots=True)
class Keypoint:
    """A named point of an object; confidence 0 to 1."""

    name: str
    x_px: float
    y_px: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Polygon:
    """The outline of an object's largest part: at least three points (x, y) in pixels, the last joins the first."""

    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask of the whole image, column after column: runs of outside and inside in turn, outside first (COCO)."""

    height_px: int
    width_px: int
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Detection:
    """One object found; confidence 0 to 1. `track_id` None: no tracker, or not followed yet."""

    label: str
    class_id: int
    confidence: float
    box: Box
    oriented_box: OrientedBox | None = None
    keypoints: tuple[Keypoint, ...] = ()
    mask: Polygon | RunLengths | None = None
    track_id: int | None = None


@dataclass(frozen=True, slots=True)
class Classification:
    """What the whole image is; all classes of a model add up to 1."""

    label: str
    class_id: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Found:
    """What a detector makes of one image: the most confident first. `masks` is what their masks can be drawn from."""

    detections: tuple[Detection, ...] = ()
    classes: tuple[Classification, ...] = ()
    inference_ms: float = 0.0
    postprocess_ms: float = 0.0
    masks: MaskNumbers | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one image went."""

    decode_ms: float
    queue_ms: float
    inference_ms: float
    postprocess_ms: float
    total_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Detections:
    """The answer about one image."""

    model: str
    model_version: str
    width_px: int
    height_px: int
    detections: tuple[Detection, ...]
    classes: tuple[Classification, ...]
    timings: Timings
    annotated_image: bytes = b""


@dataclass(frozen=True, slots=True)
class FrameDropped:
    """A frame of a stream that was not looked at, because later ones were waiting."""


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read (of those, for images) and written."""

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateTimings:
    """Where the time of one generation went."""

    queue_ms: float
    time_to_first_token_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class GenerateSummary:
    """A generation's end: its whole text and how it came about."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: GenerateTimings
    model: str


@dataclass(frozen=True, slots=True)
class Analysis:
    """The objects of an image and an answer about them."""

    detections: Detections
    answer: GenerateSummary


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """The count of a stream of frames."""

    received_count: int
    detected_count: int
    error_count: int
    dropped_count: int
    duration_s: float


class Task(StrEnum):
    """What a model is for."""

    UNKNOWN = "unknown"
    DETECT = "detect"
    SEGMENT = "segment"
    POSE = "pose"
    CLASSIFY = "classify"
    ORIENTED_BOXES = "oriented_boxes"
    GENERATE = "generate"


class ModelState(StrEnum):
    """Where a model is in its life."""

    PENDING = "pending"
    LOADING = "loading"
    WARMING_UP = "warming_up"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class Card:
    """What a loaded model says of itself."""

    version: str
    task: Task
    engine: str
    precision: str
    device: str
    labels: tuple[str, ...]
    input_size_px: int
    memory_bytes: int
    keypoint_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as callers see it; `card` is None until it is loaded."""

    name: str
    task: Task
    state: ModelState
    load_progress: float
    is_default: bool
    card: Card | None = None
    state_reason: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device; None is what it cannot tell."""

    index: int
    kind: str
    uuid: str
    name: str
    mig_profile: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    busy_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is."""

    version: str
    uptime_s: float
    models: tuple[ModelInfo, ...]
    device: str
    limits: dict[str, int]
    capabilities: tuple[str, ...]
    ready: bool
