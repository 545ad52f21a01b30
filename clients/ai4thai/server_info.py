"""What servers tell of themselves: models, devices, limits, health."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Task(StrEnum):
    """What a model is for; UNSPECIFIED until it is loaded."""

    UNSPECIFIED = "UNSPECIFIED"
    DETECT = "DETECT"
    SEGMENT = "SEGMENT"
    POSE = "POSE"
    CLASSIFY = "CLASSIFY"
    ORIENTED_BOXES = "ORIENTED_BOXES"
    GENERATE = "GENERATE"


class ModelState(StrEnum):
    """Where a model is in its life."""

    UNSPECIFIED = "UNSPECIFIED"
    PENDING = "PENDING"
    LOADING = "LOADING"
    WARMING_UP = "WARMING_UP"
    READY = "READY"
    FAILED = "FAILED"
    UNLOADING = "UNLOADING"
    UNLOADED = "UNLOADED"

    @property
    def is_on_its_way(self) -> bool:
        """Whether it will be ready, or will have failed, before long."""
        return self in (ModelState.PENDING, ModelState.LOADING, ModelState.WARMING_UP)


@dataclass(frozen=True)
class Model:
    """A model; `load_progress` goes from 0 to 1, `state_reason` says why it failed, `labels` are a detector's.

    READY with a `load_progress` below 1: it serves, and newer weights are on their way to take its place.
    """

    name: str
    version: str
    task: Task
    engine: str
    precision: str
    device: str
    state: ModelState
    load_progress: float
    labels: tuple[str, ...]
    input_size_px: int
    memory_bytes: int
    state_reason: str
    is_default: bool
    aliases: tuple[str, ...] = ()
    keypoint_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """A device that models run on. What it can't tell is None, never a false 0; shares go from 0 to 1."""

    index: int
    uuid: str
    name: str
    kind: str
    mig_profile: str
    memory_used_bytes: int
    memory_total_bytes: int
    busy_ratio: float
    utilization: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None


@dataclass(frozen=True)
class Limits:
    """What a vision server takes at most."""

    max_image_bytes: int
    max_image_pixels: int
    max_message_bytes: int
    max_queued_images: int
    max_stream_in_flight: int
    max_new_tokens: int
    max_queued_generations: int
    max_images_per_request: int


@dataclass(frozen=True)
class ServerInfo:
    """What a vision server is; `ready` once every model it was told to serve is."""

    version: str
    uptime_s: float
    ready: bool
    device: str
    capabilities: tuple[str, ...]
    models: tuple[Model, ...]
    limits: Limits


class Health(StrEnum):
    """What grpc.health.v1 says of a service; UNKNOWN_SERVICE: the server doesn't have it."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    UNKNOWN = "UNKNOWN"
    UNKNOWN_SERVICE = "UNKNOWN_SERVICE"
