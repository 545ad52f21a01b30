"""The keyword arguments that several calls share, each with its meaning, its range and what absence means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypedDict

from ai4thai.image_input import ImageInput
from ai4thai.job_results import Media
from ai4thai.results import Role


class DetectOptions(TypedDict, total=False):
    """How to detect; what is left out is the server's default."""

    model: str
    """The detector's name. Empty: the server's default detector."""
    min_confidence: float | None
    """Weaker detections are left out; 0 to 1, default 0.25."""
    iou_threshold: float | None
    """Of two boxes of a class that overlap by more, the weaker is left out; 0 to 1, default 0.7."""
    max_detections: int | None
    """At most so many, the most confident; 1 to 1000, default 300."""
    labels: Sequence[str]
    """Only these labels. Empty: all."""
    annotate: bool
    """Also answer the picture with the boxes drawn in. Default False."""
    masks: bool
    """Also answer the objects' masks, of models that segment. Default False."""
    mask_form: str
    """How masks are written: `polygon` (default) or `rle`."""


class StreamOptions(DetectOptions, total=False):
    """How to serve a stream of images; what is left out is the server's default."""

    max_in_flight: int
    """At most so many images at the server at once. 0: the server's default."""
    tracker: str
    """Gives objects numbers that stay through the stream: `bytetrack`, `botsort` or `none` (default)."""
    overflow: str
    """Images come faster than they are answered: `block` (default) makes the sender wait, `drop_oldest` leaves old ones out."""
    priority: str
    """`interactive`, `standard` (default) or `batch`."""


class TextOptions(TypedDict, total=False):
    """How to write a text; what is left out is the server's default."""

    model: str
    """The describer's name. Empty: the server's default describer."""
    max_new_tokens: int | None
    """At most so many tokens; default 256."""
    temperature: float | None
    """0 (default) always takes the likeliest token; up to 2 is ever more varied."""
    top_p: float | None
    """Only the likeliest tokens that together reach this probability; above 0 to 1, default 1."""
    seed: int | None
    """The same seed gives the same text. Absent: a new one each time."""
    stop: Sequence[str]
    """The text ends before any of these; at most 8."""


class SubmitOptions(TypedDict, total=False):
    """How a job is to be queued; what is left out is the server's default."""

    queue: str
    """The queue's name. Empty: `default`."""
    priority: str
    """`INTERACTIVE`, `STANDARD` (default) or `BATCH`."""
    delay_s: float
    """Not to be run before so many seconds have passed. Default 0."""
    not_before: datetime | None
    """Not to be run before; with a time zone. Instead of delay_s."""
    deadline_s: float | None
    """EXPIRED if it has not begun within so many seconds. Absent: none."""
    deadline: datetime | None
    """EXPIRED if it has not begun by then; with a time zone. Instead of deadline_s."""
    max_attempts: int
    """Attempts allowed, 1 to 20. 0: the server's default."""
    labels: dict[str, str]
    """The caller's own labels."""
    request_id: str
    """The caller's own name for the submission; the same name gives the same job. Empty: a random one."""
    client: str
    """Who submits, 1 to 64 of a-z A-Z 0-9 - _ . @; the clients of a queue share its workers fairly.
    Empty: one client that all who say nothing share."""
    webhook_url: str
    """Where to tell the job's end. Empty: nowhere."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: `Message("user", [Path("photo.jpg"), "How many stars are there?"])`.

    `role` is `system`, `user` or `assistant`. Among the parts a `str` is always words; an image is a Path, bytes, an array or a
    Pillow image; in a job also a Media, a file stored before. A single part needs no list.
    """

    role: Role | str
    parts: ImageInput | Media | Sequence[ImageInput | Media]
