"""Writes what the server has found into the contract's messages."""

from __future__ import annotations

from collections.abc import Sequence

from ai4thai.vision.v1 import detection_pb2, device_service_pb2, generation_pb2, model_service_pb2, vision_service_pb2
from google.protobuf.duration_pb2 import Duration

from serving.errors import ServiceError
from serving.status import to_status
from vision_server.results import (
    Analysis,
    Detection,
    Detections,
    DeviceInfo,
    FinishReason,
    FrameDropped,
    GenerateSummary,
    GenerateTimings,
    ModelInfo,
    ModelState,
    Polygon,
    RunLengths,
    ServerInfo,
    StreamSummary,
    Task,
    Usage,
)
from vision_server.stream import FrameOutcome

DOMAIN = "vision.ai4thai"
_FINISH_REASONS = {reason: generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason}
_STATES = {state: model_service_pb2.ModelState.Value(f"MODEL_STATE_{state.name}") for state in ModelState}
_TASKS = {task: model_service_pb2.Task.Value(f"TASK_{task.name}") for task in Task if task is not Task.UNKNOWN}


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
        mask=None if found.mask is None else _write_mask(found.mask),
        track_id=found.track_id,
    )


def _write_mask(mask: Polygon | RunLengths) -> detection_pb2.Mask:
    if isinstance(mask, Polygon):
        points = [detection_pb2.Point(x_px=x, y_px=y) for x, y in mask.points]
        return detection_pb2.Mask(polygon=detection_pb2.Polygon(points=points))
    return detection_pb2.Mask(
        rle=detection_pb2.RunLengths(height_px=mask.height_px, width_px=mask.width_px, counts=mask.counts)
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
    elif isinstance(item.outcome, FrameDropped):
        result.dropped.SetInParent()
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
        aliases=info.aliases,
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
        model.keypoint_names.extend(card.keypoint_names)
        model.input_size_px, model.memory_bytes = card.input_size_px, card.memory_bytes
    return model


def write_models(infos: Sequence[ModelInfo]) -> model_service_pb2.ListModelsResponse:
    """The models, in the order given."""
    return model_service_pb2.ListModelsResponse(models=[write_model(info) for info in infos])


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
