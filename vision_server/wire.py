"""Between protobuf messages and the server's own dataclasses; what does not fit is named by its field."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ai4thai.vision.v1 import (
    detection_pb2,
    device_service_pb2,
    generation_pb2,
    image_pb2,
    model_service_pb2,
    vision_service_pb2,
)
from google.protobuf.duration_pb2 import Duration

from serving.errors import ServiceError, not_served_yet
from serving.status import to_status
from vision_server.errors import ImageEmpty, InvalidField
from vision_server.requests import (
    DetectOptions,
    EncodedImage,
    GenerateOptions,
    ImageSource,
    RawPixels,
    Role,
    StreamOptions,
    Turn,
)
from vision_server.results import (
    Analysis,
    Detection,
    Detections,
    DeviceInfo,
    FinishReason,
    GenerateSummary,
    GenerateTimings,
    ModelInfo,
    ModelState,
    ServerInfo,
    StreamSummary,
    Task,
    Usage,
)
from vision_server.settings import VisionSettings
from vision_server.stream import FrameOutcome

DOMAIN = "vision.ai4thai"
_MAX_DETECTIONS = 1000
_MAX_STOPS = 8
_ROLES = {
    generation_pb2.ROLE_SYSTEM: Role.SYSTEM,
    generation_pb2.ROLE_USER: Role.USER,
    generation_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
}
_FINISH_REASONS = {reason: generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason}
_STATES = {state: model_service_pb2.ModelState.Value(f"MODEL_STATE_{state.name}") for state in ModelState}
_TASKS = {task: model_service_pb2.Task.Value(f"TASK_{task.name}") for task in Task if task is not Task.UNKNOWN}


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
    """Raises InvalidField, or NOT_SERVED_YET for masks."""
    if options.masks:
        raise not_served_yet(f"{field}.masks")
    defaults = DetectOptions()
    return DetectOptions(
        model=options.model,
        min_confidence=_ranged(options, "min_confidence", defaults.min_confidence, 0, 1, field),
        iou_threshold=_ranged(options, "iou_threshold", defaults.iou_threshold, 0, 1, field),
        max_detections=int(_ranged(options, "max_detections", defaults.max_detections, 1, _MAX_DETECTIONS, field)),
        labels=tuple(options.labels),
        annotate=options.annotate,
    )


def read_stream_config(config: vision_service_pb2.StreamConfig, settings: VisionSettings) -> StreamOptions:
    """Raises InvalidField, or NOT_SERVED_YET for trackers and DROP_OLDEST."""
    if config.tracker not in (vision_service_pb2.TRACKER_UNSPECIFIED, vision_service_pb2.TRACKER_NONE):
        raise not_served_yet(f"config.tracker {_enum_name(vision_service_pb2.Tracker, config.tracker)}")
    if config.overflow not in (vision_service_pb2.OVERFLOW_UNSPECIFIED, vision_service_pb2.OVERFLOW_BLOCK):
        raise not_served_yet(f"config.overflow {_enum_name(vision_service_pb2.Overflow, config.overflow)}")
    limit = settings.max_stream_in_flight
    if not 0 <= config.max_in_flight <= limit:
        raise InvalidField(
            "config.max_in_flight", f"is {config.max_in_flight}.", f"It ranges from 1 to {limit}; 0 takes the default."
        )
    return StreamOptions(read_detect_options(config.options, "config.options"), config.max_in_flight or limit)


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


def write_detections(answer: Detections) -> vision_service_pb2.DetectResponse:
    """One image's answer."""
    timings = answer.timings
    return vision_service_pb2.DetectResponse(
        model=answer.model,
        model_version=answer.model_version,
        width_px=answer.width_px,
        height_px=answer.height_px,
        detections=[_write_detection(found) for found in answer.detections],
        classes=[
            detection_pb2.Classification(label=one.label, class_id=one.class_id, confidence=one.confidence)
            for one in answer.classes
        ],
        annotated_image=answer.annotated_image,
        timings=detection_pb2.Timings(
            decode_ms=timings.decode_ms,
            queue_ms=timings.queue_ms,
            inference_ms=timings.inference_ms,
            postprocess_ms=timings.postprocess_ms,
            total_ms=timings.total_ms,
            batch_size=timings.batch_size,
        ),
    )


def _write_detection(found: Detection) -> detection_pb2.Detection:
    box, oriented = found.box, found.oriented_box
    return detection_pb2.Detection(
        label=found.label,
        class_id=found.class_id,
        confidence=found.confidence,
        box=detection_pb2.Box(
            x_min_px=box.x_min_px, y_min_px=box.y_min_px, x_max_px=box.x_max_px, y_max_px=box.y_max_px
        ),
        oriented_box=None
        if oriented is None
        else detection_pb2.OrientedBox(
            center_x_px=oriented.center_x_px,
            center_y_px=oriented.center_y_px,
            width_px=oriented.width_px,
            height_px=oriented.height_px,
            angle_degrees=oriented.angle_degrees,
        ),
        keypoints=[
            detection_pb2.Keypoint(name=point.name, x_px=point.x_px, y_px=point.y_px, confidence=point.confidence)
            for point in found.keypoints
        ],
    )


def write_stream(item: FrameOutcome | StreamSummary) -> vision_service_pb2.DetectStreamResponse:
    """A message of a DetectStream."""
    if isinstance(item, StreamSummary):
        summary = vision_service_pb2.StreamSummary(
            received_count=item.received_count,
            detected_count=item.detected_count,
            error_count=item.error_count,
            dropped_count=item.dropped_count,
            duration=_duration(item.duration_s),
        )
        return vision_service_pb2.DetectStreamResponse(summary=summary)
    result = vision_service_pb2.FrameResult(frame_id=item.frame_id)
    if isinstance(item.outcome, ServiceError):
        result.error.CopyFrom(to_status(item.outcome, DOMAIN))
    else:
        result.detection.CopyFrom(write_detections(item.outcome))
    return vision_service_pb2.DetectStreamResponse(result=result)


def write_generated(piece: str | GenerateSummary) -> vision_service_pb2.GenerateResponse:
    """A message of a Generate."""
    if isinstance(piece, str):
        return vision_service_pb2.GenerateResponse(delta=vision_service_pb2.GenerateDelta(text=piece))
    summary = vision_service_pb2.GenerateSummary(
        text=piece.text,
        finish_reason=_FINISH_REASONS[piece.finish_reason],
        usage=_write_usage(piece.usage),
        timings=_write_generate_timings(piece.timings),
        model=piece.model,
    )
    return vision_service_pb2.GenerateResponse(summary=summary)


def write_analysis(analysis: Analysis) -> vision_service_pb2.AnalyzeResponse:
    """The answer of an Analyze."""
    answer = analysis.answer
    return vision_service_pb2.AnalyzeResponse(
        detection=write_detections(analysis.detections),
        text=answer.text,
        usage=_write_usage(answer.usage),
        timings=_write_generate_timings(answer.timings),
        finish_reason=_FINISH_REASONS[answer.finish_reason],
    )


def _write_usage(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens, image_tokens=usage.image_tokens, completion_tokens=usage.completion_tokens
    )


def _write_generate_timings(timings: GenerateTimings) -> generation_pb2.GenerateTimings:
    return generation_pb2.GenerateTimings(
        queue_ms=timings.queue_ms, time_to_first_token_ms=timings.time_to_first_token_ms, total_ms=timings.total_ms
    )


def write_model(info: ModelInfo) -> model_service_pb2.Model:
    """A model."""
    model = model_service_pb2.Model(
        name=info.name,
        state=_STATES[info.state],
        load_progress=info.load_progress,
        state_reason=info.state_reason,
        is_default=info.is_default,
    )
    if info.task in _TASKS:
        model.task = _TASKS[info.task]
    if (card := info.card) is not None:
        model.version, model.engine, model.precision, model.device = (
            card.version,
            card.engine,
            card.precision,
            card.device,
        )
        model.labels.extend(card.labels)
        model.input_size_px, model.memory_bytes = card.input_size_px, card.memory_bytes
    return model


def write_device(info: DeviceInfo) -> device_service_pb2.Device:
    """A device; what it cannot tell stays absent."""
    return device_service_pb2.Device(
        index=info.index,
        kind=info.kind,
        uuid=info.uuid,
        name=info.name,
        mig_profile=info.mig_profile,
        memory_used_bytes=info.memory_used_bytes,
        memory_total_bytes=info.memory_total_bytes,
        utilization=info.utilization,
        temperature_celsius=info.temperature_celsius,
        power_watts=info.power_watts,
        busy_ratio=info.busy_ratio,
    )


def write_server_info(info: ServerInfo) -> vision_service_pb2.GetServerInfoResponse:
    """What the server is."""
    return vision_service_pb2.GetServerInfoResponse(
        version=info.version,
        uptime=_duration(info.uptime_s),
        models=[write_model(model) for model in info.models],
        device=info.device,
        limits=vision_service_pb2.Limits(**info.limits),
        capabilities=info.capabilities,
        ready=info.ready,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration
