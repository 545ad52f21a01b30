"""Writes the vision server's requests and reads its responses; protobuf goes no further."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, TypeVar, cast

from ai4thai import results, server_info
from ai4thai.errors import from_status
from ai4thai.image_input import FileImage, ImageInput, read_image
from ai4thai.job_results import Media
from ai4thai.options import DetectOptions, Message, StreamOptions, TextOptions
from ai4thai.vision.v1 import (
    detection_pb2,
    device_service_pb2,
    generation_pb2,
    image_pb2,
    model_service_pb2,
    vision_service_pb2,
)

Value = TypeVar("Value", bound=StrEnum)

_ROLES = {
    results.Role.SYSTEM: generation_pb2.ROLE_SYSTEM,
    results.Role.USER: generation_pb2.ROLE_USER,
    results.Role.ASSISTANT: generation_pb2.ROLE_ASSISTANT,
}


# ---- requests


def write_image(image: ImageInput) -> image_pb2.Image:
    """An image as it travels: a file's bytes as they are, pixels as raw RGB."""
    read = read_image(image)
    if isinstance(read, FileImage):
        return image_pb2.Image(content=read.content)
    return image_pb2.Image(raw=image_pb2.RawImage(width_px=read.width_px, height_px=read.height_px, rgb=read.rgb))


def write_detect_options(options: DetectOptions) -> detection_pb2.DetectOptions:
    """Only what was given is set, so that the server's defaults hold for the rest."""
    _refuse_unknown(options, DetectOptions.__optional_keys__)
    return detection_pb2.DetectOptions(
        model=options.get("model", ""),
        min_confidence=options.get("min_confidence"),
        iou_threshold=options.get("iou_threshold"),
        max_detections=options.get("max_detections"),
        labels=_strings("labels", options.get("labels", ())),
        annotate=options.get("annotate", False),
        masks=options.get("masks", False),
        mask_form=_number(detection_pb2.MaskForm, "mask form", "MASK_FORM_", options.get("mask_form", "")),
    )


def write_text_options(options: TextOptions) -> generation_pb2.GenerateOptions:
    """Like write_detect_options; the model's name stands beside the options, not in them."""
    _refuse_unknown(options, TextOptions.__optional_keys__)
    return generation_pb2.GenerateOptions(
        max_new_tokens=options.get("max_new_tokens"),
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        seed=options.get("seed"),
        stop=_strings("stop", options.get("stop", ())),
    )


def write_detect(image: ImageInput, options: DetectOptions, priority: str = "") -> vision_service_pb2.DetectRequest:
    """The request of Detect."""
    return vision_service_pb2.DetectRequest(
        image=write_image(image), options=write_detect_options(options), priority=write_priority(priority)
    )


def write_stream_config(options: StreamOptions) -> vision_service_pb2.DetectStreamRequest:
    """The first message of DetectStream."""
    _refuse_unknown(options, StreamOptions.__optional_keys__)
    of_each = {name: value for name, value in options.items() if name in DetectOptions.__optional_keys__}
    config = vision_service_pb2.StreamConfig(
        options=write_detect_options(cast(DetectOptions, of_each)),
        max_in_flight=options.get("max_in_flight", 0),
        tracker=write_tracker(options.get("tracker", "")),
        overflow=_number(vision_service_pb2.Overflow, "overflow", "OVERFLOW_", options.get("overflow", "")),
        priority=write_priority(options.get("priority", "")),
    )
    return vision_service_pb2.DetectStreamRequest(config=config)


def write_priority(word: str) -> detection_pb2.Priority.ValueType:
    """A priority's number; nothing is the server's default.

    Raises:
        ValueError: no such priority.
    """
    return cast("detection_pb2.Priority.ValueType", _number(detection_pb2.Priority, "priority", "PRIORITY_", word))


def write_frame(frame_id: int, image: ImageInput) -> vision_service_pb2.DetectStreamRequest:
    """A further message of DetectStream."""
    frame = vision_service_pb2.Frame(frame_id=frame_id, image=write_image(image))
    return vision_service_pb2.DetectStreamRequest(frame=frame)


def write_generate(
    messages: Iterable[Message], options: TextOptions, priority: str = ""
) -> vision_service_pb2.GenerateRequest:
    """The request of Generate."""
    return vision_service_pb2.GenerateRequest(
        model=options.get("model", ""),
        messages=[_write_message(message) for message in messages],
        options=write_text_options(options),
        priority=write_priority(priority),
    )


def write_analyze(
    image: ImageInput, question: str, detect: DetectOptions, text: TextOptions, priority: str = ""
) -> vision_service_pb2.AnalyzeRequest:
    """The request of Analyze."""
    return vision_service_pb2.AnalyzeRequest(
        image=write_image(image),
        question=question,
        detect_options=write_detect_options(detect),
        generate_options=write_text_options(text),
        model=text.get("model", ""),
        priority=write_priority(priority),
    )


def write_load_model(name: str, aliases: Sequence[str]) -> model_service_pb2.LoadModelRequest:
    """The request of LoadModel."""
    return model_service_pb2.LoadModelRequest(name=name, aliases=_strings("aliases", aliases))


def write_watch_devices(interval_s: float) -> device_service_pb2.WatchDevicesRequest:
    """The request of WatchDevices."""
    request = device_service_pb2.WatchDevicesRequest()
    request.interval.FromMicroseconds(round(interval_s * 1e6))
    return request


def write_tracker(word: str) -> vision_service_pb2.Tracker.ValueType:
    """A tracker's number; nothing is the server's default.

    Raises:
        ValueError: no such tracker.
    """
    return cast(
        "vision_service_pb2.Tracker.ValueType", _number(vision_service_pb2.Tracker, "tracker", "TRACKER_", word)
    )


def parts_of(message: Message) -> Sequence[ImageInput | Media]:
    """A message's parts as a list, a single one too; among them a `str` is words."""
    return message.parts if isinstance(message.parts, list | tuple) else [message.parts]  # type: ignore[list-item]


def write_role(role: str) -> generation_pb2.Role.ValueType:
    """A role's number.

    Raises:
        ValueError: no such role.
    """
    try:
        return _ROLES[results.Role(str(role).lower())]
    except ValueError:
        raise ValueError(f"The role {role!r} is none of {', '.join(results.Role)}.") from None


def _write_message(message: Message) -> generation_pb2.Message:
    return generation_pb2.Message(
        role=write_role(message.role),
        parts=[_write_part(part) for part in parts_of(message)],
    )


def _write_part(part: ImageInput | Media) -> generation_pb2.MessagePart:
    if isinstance(part, str):
        return generation_pb2.MessagePart(text=part)
    if isinstance(part, Media):
        raise TypeError("A file that the queue server stores can be asked about in a job only: submit_generate.")
    return generation_pb2.MessagePart(image=write_image(part))


def _number(enum: Any, kind: str, prefix: str, word: str) -> Any:
    """An enum value's number from its word in any case; nothing is the server's default."""
    try:
        return enum.Value(f"{prefix}{str(word).upper() or 'UNSPECIFIED'}")
    except ValueError:
        words = [name.removeprefix(prefix).lower() for name, _ in enum.items() if not name.endswith("_UNSPECIFIED")]
        raise ValueError(f"The {kind} {word!r} is none of {', '.join(words)}.") from None


def _refuse_unknown(options: object, known: frozenset[str]) -> None:
    # A misspelt option must not pass silently, as a TypedDict would let it at run time.
    unknown = sorted(set(options) - known)  # type: ignore[call-overload]
    if unknown:
        raise TypeError(f"Unknown option {', '.join(unknown)}. There are: {', '.join(sorted(known))}.")


def _strings(name: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str):  # "star" would otherwise be the labels s, t, a, r
        raise TypeError(f"{name} is a list of texts: write [{values!r}].")
    return list(values)


# ---- responses


def read_detect(response: vision_service_pb2.DetectResponse) -> results.DetectResult:
    """The objects of one image."""
    times = response.timings
    return results.DetectResult(
        model=response.model,
        model_version=response.model_version,
        width_px=response.width_px,
        height_px=response.height_px,
        detections=tuple(_read_detection(item) for item in response.detections),
        classes=tuple(results.Classification(item.label, item.class_id, item.confidence) for item in response.classes),
        annotated_image=response.annotated_image,
        timings=results.Timings(
            decode_ms=times.decode_ms,
            queue_ms=times.queue_ms,
            inference_ms=times.inference_ms,
            postprocess_ms=times.postprocess_ms,
            total_ms=times.total_ms,
            batch_size=times.batch_size,
        ),
    )


def read_stream_message(
    message: vision_service_pb2.DetectStreamResponse,
) -> results.FrameResult | results.StreamSummary:
    """A message of DetectStream: a frame's result, or the summary that ends it."""
    if message.WhichOneof("message") == "summary":
        summary = message.summary
        return results.StreamSummary(
            received_count=summary.received_count,
            detected_count=summary.detected_count,
            error_count=summary.error_count,
            dropped_count=summary.dropped_count,
            duration_s=summary.duration.ToMilliseconds() / 1000,
        )
    result = message.result
    match result.WhichOneof("outcome"):
        case "error":
            return results.FrameResult(result.frame_id, error=from_status(result.error))
        case "dropped":
            return results.FrameResult(result.frame_id, dropped=True)
        case _:
            return results.FrameResult(result.frame_id, detection=read_detect(result.detection))


def read_generate_message(message: vision_service_pb2.GenerateResponse) -> str | results.Answer:
    """A message of Generate: a piece of text, or the whole answer that ends it."""
    return read_answer(message.summary) if message.WhichOneof("message") == "summary" else message.delta.text


def read_answer(summary: vision_service_pb2.GenerateSummary) -> results.Answer:
    """A whole answer."""
    return results.Answer(
        text=summary.text,
        finish_reason=_read_finish_reason(summary.finish_reason),
        usage=_read_usage(summary.usage),
        timings=_read_text_timings(summary.timings),
        model=summary.model,
    )


def read_analyze(response: vision_service_pb2.AnalyzeResponse) -> results.Analysis:
    """The objects of one image and the answer about them."""
    return results.Analysis(
        detection=read_detect(response.detection),
        answer=results.Answer(
            text=response.text,
            finish_reason=_read_finish_reason(response.finish_reason),
            usage=_read_usage(response.usage),
            timings=_read_text_timings(response.timings),
        ),
    )


def read_info(response: vision_service_pb2.GetServerInfoResponse) -> server_info.ServerInfo:
    """What the server is."""
    limits = response.limits
    return server_info.ServerInfo(
        version=response.version,
        uptime_s=response.uptime.ToMilliseconds() / 1000,
        ready=response.ready,
        device=response.device,
        capabilities=tuple(response.capabilities),
        models=tuple(read_model(model) for model in response.models),
        limits=server_info.Limits(
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_message_bytes=limits.max_message_bytes,
            max_queued_images=limits.max_queued_images,
            max_stream_in_flight=limits.max_stream_in_flight,
            max_new_tokens=limits.max_new_tokens,
            max_queued_generations=limits.max_queued_generations,
            max_images_per_request=limits.max_images_per_request,
        ),
    )


def read_model(model: model_service_pb2.Model) -> server_info.Model:
    """A model and where it is in its life."""
    return server_info.Model(
        name=model.name,
        version=model.version,
        task=read_value(server_info.Task, model_service_pb2.Task, model.task),
        engine=model.engine,
        precision=model.precision,
        device=model.device,
        state=read_value(server_info.ModelState, model_service_pb2.ModelState, model.state),
        load_progress=model.load_progress,
        labels=tuple(model.labels),
        input_size_px=model.input_size_px,
        memory_bytes=model.memory_bytes,
        state_reason=model.state_reason,
        is_default=model.is_default,
        aliases=tuple(model.aliases),
        keypoint_names=tuple(model.keypoint_names),
    )


def read_device(device: device_service_pb2.Device) -> server_info.Device:
    """A device; what it can't tell is None."""
    return server_info.Device(
        index=device.index,
        uuid=device.uuid,
        name=device.name,
        kind=device.kind,
        mig_profile=device.mig_profile,
        memory_used_bytes=device.memory_used_bytes,
        memory_total_bytes=device.memory_total_bytes,
        busy_ratio=device.busy_ratio,
        utilization=device.utilization if device.HasField("utilization") else None,
        temperature_celsius=device.temperature_celsius if device.HasField("temperature_celsius") else None,
        power_watts=device.power_watts if device.HasField("power_watts") else None,
    )


def _read_detection(item: detection_pb2.Detection) -> results.Detection:
    box, turned = item.box, item.oriented_box
    return results.Detection(
        label=item.label,
        class_id=item.class_id,
        confidence=item.confidence,
        box=results.Box(box.x_min_px, box.y_min_px, box.x_max_px, box.y_max_px),
        oriented_box=results.OrientedBox(
            turned.center_x_px, turned.center_y_px, turned.width_px, turned.height_px, turned.angle_degrees
        )
        if item.HasField("oriented_box")
        else None,
        keypoints=tuple(results.Keypoint(k.name, k.x_px, k.y_px, k.confidence) for k in item.keypoints),
        mask=_read_mask(item.mask),
        track_id=item.track_id if item.HasField("track_id") else None,
    )


def _read_mask(mask: detection_pb2.Mask) -> results.Polygon | results.RunLengths | None:
    match mask.WhichOneof("form"):
        case "polygon":
            return results.Polygon(tuple((point.x_px, point.y_px) for point in mask.polygon.points))
        case "rle":
            return results.RunLengths(mask.rle.height_px, mask.rle.width_px, tuple(mask.rle.counts))
        case _:
            return None


def _read_finish_reason(reason: generation_pb2.FinishReason.ValueType) -> results.FinishReason:
    return read_value(results.FinishReason, generation_pb2.FinishReason, reason)


def _read_usage(usage: generation_pb2.Usage) -> results.Usage:
    return results.Usage(usage.prompt_tokens, usage.image_tokens, usage.completion_tokens)


def _read_text_timings(timings: generation_pb2.GenerateTimings) -> results.TextTimings:
    return results.TextTimings(timings.queue_ms, timings.time_to_first_token_ms, timings.total_ms)


def read_value(kind: type[Value], enum: Any, number: int) -> Value:
    """A value of one of the contract's enums; one that a later server has added and this client does not know is UNSPECIFIED."""
    names = enum.DESCRIPTOR.values_by_number
    name = names[number if number in names else 0].name
    return kind(name.removeprefix(names[0].name.removesuffix("UNSPECIFIED")))
