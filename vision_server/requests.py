"""What callers ask for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A file's bytes, not looked into yet; `field` says where in the request it stood."""

    content: bytes
    field: str = "image"

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes."""
        return len(self.content)


@dataclass(frozen=True, slots=True)
class RawPixels:
    """Bare pixels: red, green, blue, row by row; their number is not checked yet."""

    rgb: bytes
    width_px: int
    height_px: int
    field: str = "image"

    @property
    def size_bytes(self) -> int:
        """Bytes that they take."""
        return len(self.rgb)


ImageSource = EncodedImage | RawPixels


class Priority(IntEnum):
    """Whose turn it is first; who waits long enough moves up."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


class MaskForm(StrEnum):
    """How masks are written: the outline of the largest part, or every pixel by run lengths."""

    POLYGON = "polygon"
    RLE = "rle"


@dataclass(frozen=True, slots=True)
class DetectOptions:
    """How to detect; ranges are those of detection.proto. Empty `labels`: all. `masks` None: none."""

    model: str = ""
    min_confidence: float = 0.25
    iou_threshold: float = 0.7
    max_detections: int = 300
    labels: tuple[str, ...] = ()
    annotate: bool = False
    masks: MaskForm | None = None


class Tracker(StrEnum):
    """Which of Ultralytics' trackers numbers the objects of a stream; the values are its names."""

    BYTETRACK = "bytetrack"
    BOTSORT = "botsort"


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How to serve a stream; no `tracker`: none. `drop_oldest`: waiting frames give way to later ones, else the sender waits."""

    detect: DetectOptions
    max_in_flight: int
    tracker: Tracker | None = None
    drop_oldest: bool = False
    priority: Priority = Priority.STANDARD


@dataclass(frozen=True, slots=True)
class Frame:
    """One image of a stream; `frame_id` is the caller's own number."""

    frame_id: int
    image: ImageSource


class Role(StrEnum):
    """Who speaks; the values are those of chat templates."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: texts and pictures in order."""

    role: Role
    parts: tuple[str | ImageSource, ...]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to generate; ranges are those of generation.proto. `seed` None: a new one each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
