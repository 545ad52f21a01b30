"""Reads requests into the server's own dataclasses; what does not fit is named by its field."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ai4thai.vision.v1 import (
    detection_pb2,
    device_service_pb2,
    generation_pb2,
    image_pb2,
    model_service_pb2,
    vision_service_pb2,
)

from vision_server.errors import ImageEmpty, InvalidField
from vision_server.requests import (
    DetectOptions,
    EncodedImage,
    GenerateOptions,
    ImageSource,
    MaskForm,
    Priority,
    RawPixels,
    Role,
    StreamOptions,
    Tracker,
    Turn,
)
from vision_server.settings import VisionSettings

_MAX_DETECTIONS = 1000
_MAX_PARTS = 4096
_MAX_STOPS = 8
_MAX_ALIASES = 8
_ALIAS = re.compile(r"[\w.-]{1,64}")
_MIN_INTERVAL_S, _MAX_INTERVAL_S, _DEFAULT_INTERVAL_S = 0.1, 3600.0, 1.0
_ROLES = {
    generation_pb2.ROLE_SYSTEM: Role.SYSTEM,
    generation_pb2.ROLE_USER: Role.USER,
    generation_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
}
_MASK_FORMS = {
    detection_pb2.MASK_FORM_UNSPECIFIED: MaskForm.POLYGON,
    detection_pb2.MASK_FORM_POLYGON: MaskForm.POLYGON,
    detection_pb2.MASK_FORM_RLE: MaskForm.RLE,
}
_PRIORITIES = {
    detection_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    detection_pb2.PRIORITY_STANDARD: Priority.STANDARD,
    detection_pb2.PRIORITY_BATCH: Priority.BATCH,
}
_TRACKERS = {
    vision_service_pb2.TRACKER_UNSPECIFIED: None,
    vision_service_pb2.TRACKER_NONE: None,
    vision_service_pb2.TRACKER_BYTETRACK: Tracker.BYTETRACK,
    vision_service_pb2.TRACKER_BOTSORT: Tracker.BOTSORT,
}
_DROPS_OLDEST = {
    vision_service_pb2.OVERFLOW_UNSPECIFIED: False,
    vision_service_pb2.OVERFLOW_BLOCK: False,
    vision_service_pb2.OVERFLOW_DROP_OLDEST: True,
}


def read_image(image: image_pb2.Image, field: str = "image") -> ImageSource:
    """The image of a request. Raises ImageEmpty."""
    source = image.WhichOneof("source")
    if source == "content" and image.content:
        return EncodedImage(image.content, field)
    if source == "raw":
        raw = image.raw
        return RawPixels(raw.rgb, raw.width_px, raw.height_px, field)
    raise ImageEmpty(field)


def read_detect_options(options: detection_pb2.DetectOptions, field: str = "options") -> DetectOptions:
    """Raises InvalidField."""
    defaults = DetectOptions()
    form = _MASK_FORMS.get(options.mask_form)
    if form is None:
        raise InvalidField(f"{field}.mask_form", f"is {options.mask_form}.", "One of MASK_FORM_POLYGON, MASK_FORM_RLE.")
    return DetectOptions(
        model=options.model,
        min_confidence=_ranged(options, "min_confidence", defaults.min_confidence, 0, 1, field),
        iou_threshold=_ranged(options, "iou_threshold", defaults.iou_threshold, 0, 1, field),
        max_detections=int(_ranged(options, "max_detections", defaults.max_detections, 1, _MAX_DETECTIONS, field)),
        labels=tuple(options.labels),
        annotate=options.annotate,
        masks=form if options.masks else None,
    )


def read_priority(asked: detection_pb2.Priority.ValueType, word: str | None, field: str = "priority") -> Priority:
    """The request's own, else what the call's `x-priority` says, else STANDARD. Raises InvalidField."""
    if asked != detection_pb2.PRIORITY_UNSPECIFIED:
        if asked not in _PRIORITIES:
            raise InvalidField(field, f"is {asked}.", "One of PRIORITY_INTERACTIVE, PRIORITY_STANDARD, PRIORITY_BATCH.")
        return _PRIORITIES[asked]
    if word is None:
        return Priority.STANDARD
    try:
        return Priority[word.strip().upper()]
    except KeyError:
        raise InvalidField("x-priority", f"is {word!r}.", "One of interactive, standard, batch.") from None


def read_stream_config(
    config: vision_service_pb2.StreamConfig, settings: VisionSettings, priority_word: str | None = None
) -> StreamOptions:
    """Raises InvalidField."""
    if config.tracker not in _TRACKERS:
        raise InvalidField(
            "config.tracker", f"is {config.tracker}.", "One of TRACKER_NONE, TRACKER_BYTETRACK, TRACKER_BOTSORT."
        )
    if config.overflow not in _DROPS_OLDEST:
        raise InvalidField("config.overflow", f"is {config.overflow}.", "One of OVERFLOW_BLOCK, OVERFLOW_DROP_OLDEST.")
    limit = settings.max_stream_in_flight
    if not 0 <= config.max_in_flight <= limit:
        raise InvalidField(
            "config.max_in_flight", f"is {config.max_in_flight}.", f"It ranges from 1 to {limit}; 0 takes the default."
        )
    return StreamOptions(
        detect=read_detect_options(config.options, "config.options"),
        max_in_flight=config.max_in_flight or limit,
        tracker=_TRACKERS[config.tracker],
        drop_oldest=_DROPS_OLDEST[config.overflow],
        priority=read_priority(config.priority, priority_word, "config.priority"),
    )


def read_aliases(request: model_service_pb2.LoadModelRequest) -> tuple[str, ...]:
    """The other names that a model shall answer to. Raises InvalidField."""
    aliases = tuple(dict.fromkeys(request.aliases))
    if len(aliases) > _MAX_ALIASES:
        raise InvalidField("aliases", f"has {len(aliases)} names.", f"At most {_MAX_ALIASES}.")
    for alias in aliases:
        if not _ALIAS.fullmatch(alias):
            raise InvalidField(
                "aliases", f"has {alias!r}.", "A name has 1 to 64 letters, digits, dots, dashes and underscores."
            )
    return aliases


def read_interval_s(request: device_service_pb2.WatchDevicesRequest) -> float:
    """Time between two messages, in seconds. Raises InvalidField."""
    if not request.HasField("interval"):
        return _DEFAULT_INTERVAL_S
    interval_s = request.interval.seconds + request.interval.nanos / 1e9
    if not _MIN_INTERVAL_S <= interval_s <= _MAX_INTERVAL_S:
        raise InvalidField(
            "interval", f"is {interval_s:g} s.", f"It ranges from {_MIN_INTERVAL_S:g} s to {_MAX_INTERVAL_S:g} s."
        )
    return interval_s


def read_generate_options(
    options: generation_pb2.GenerateOptions, settings: VisionSettings, field: str = "options"
) -> GenerateOptions:
    """Raises InvalidField."""
    defaults = GenerateOptions()
    limit = settings.max_new_tokens
    tokens = _ranged(options, "max_new_tokens", min(defaults.max_new_tokens, limit), 1, limit, field)
    top_p = _ranged(options, "top_p", defaults.top_p, 0, 1, field)
    if top_p == 0:
        raise InvalidField(f"{field}.top_p", "is 0.", "It ranges from above 0 to 1.")
    if len(options.stop) > _MAX_STOPS or any(not text for text in options.stop):
        raise InvalidField(
            f"{field}.stop", f"has {len(options.stop)} texts.", f"At most {_MAX_STOPS}, none of them empty."
        )
    return GenerateOptions(
        max_new_tokens=int(tokens),
        temperature=_ranged(options, "temperature", defaults.temperature, 0, 2, field),
        top_p=top_p,
        seed=options.seed if options.HasField("seed") else None,
        stop=tuple(options.stop),
    )


def read_messages(messages: Sequence[generation_pb2.Message], settings: VisionSettings) -> tuple[Turn, ...]:
    """Raises InvalidField, ImageEmpty."""
    if not messages:
        raise InvalidField("messages", "is empty.", "Send at least one message of ROLE_USER.")
    count = len(messages) + sum(len(message.parts) for message in messages)
    if count > _MAX_PARTS:  # before each is looked at: a million empty ones would take seconds
        raise InvalidField("messages", f"has {count:,} messages and parts.", f"At most {_MAX_PARTS:,}.")
    turns = tuple(_read_turn(message, f"messages[{number}]", number) for number, message in enumerate(messages))
    if turns[-1].role is not Role.USER:
        raise InvalidField(f"messages[{len(turns) - 1}].role", "is not the user's.", "The last message is the user's.")
    images = sum(not isinstance(part, str) for turn in turns for part in turn.parts)
    if images > settings.max_images_per_request:
        raise InvalidField(
            "messages",
            f"has {images} images.",
            f"At most {settings.max_images_per_request} (VISION_MAX_IMAGES_PER_REQUEST).",
        )
    size_bytes = sum(len(part.encode()) for turn in turns for part in turn.parts if isinstance(part, str))
    check_text(size_bytes, "messages", settings)
    return turns


def check_text(size_bytes: int, field: str, settings: VisionSettings) -> None:
    """Raises InvalidField when there is more text than the server takes."""
    if size_bytes > settings.max_text_bytes:
        raise InvalidField(
            field, f"has {size_bytes} bytes of text.", f"At most {settings.max_text_bytes} (VISION_MAX_TEXT_BYTES)."
        )


def read_question(question: str, settings: VisionSettings) -> str:
    """Raises InvalidField."""
    if not question.strip():
        raise InvalidField("question", "is empty.", "Ask something.")
    check_text(len(question.encode()), "question", settings)
    return question


def _read_turn(message: generation_pb2.Message, field: str, number: int) -> Turn:
    role = _ROLES.get(message.role)
    if role is None:
        name = _enum_name(generation_pb2.Role, message.role)
        raise InvalidField(f"{field}.role", f"is {name}.", "One of ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT.")
    if role is Role.SYSTEM and number:
        raise InvalidField(f"{field}.role", "is ROLE_SYSTEM.", "Only the first message may be the system's.")
    if not message.parts:
        raise InvalidField(f"{field}.parts", "is empty.", "Send at least one part.")
    parts: list[str | ImageSource] = []
    for index, part in enumerate(message.parts):
        place = f"{field}.parts[{index}]"
        kind = part.WhichOneof("part")
        if kind == "text":
            parts.append(part.text)
        elif kind == "image" and role is Role.USER:
            parts.append(read_image(part.image, f"{place}.image"))
        elif kind == "image":
            raise InvalidField(
                f"{place}.image", f"stands in a turn of the {role.value}.", "Only the user's turns have images."
            )
        else:
            raise InvalidField(place, "has neither text nor image.", "Set one of them.")
    return Turn(role, tuple(parts))


def _ranged(
    options: detection_pb2.DetectOptions | generation_pb2.GenerateOptions,
    name: str,
    default: float,
    low: float,
    high: float,
    field: str,
) -> float:
    if not options.HasField(name):  # type: ignore[arg-type]  # each caller names a field of its own message
        return default
    value: float = getattr(options, name)
    if math.isnan(value) or not low <= value <= high:
        raise InvalidField(f"{field}.{name}", f"is {value:g}.", f"It ranges from {low:g} to {high:g}.")
    return value


def _enum_name(enum: object, number: int) -> str:
    try:
        return str(enum.Name(number))  # type: ignore[attr-defined]  # protobuf's enum wrapper
    except ValueError:
        return str(number)
