"""Reads the queue server's responses; protobuf goes no further."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.timestamp_pb2 import Timestamp

from ai4thai import job_results, wire
from ai4thai.errors import from_status
from ai4thai.queue.v1 import job_pb2, queue_service_pb2, work_pb2


def read_job(job: job_pb2.Job) -> job_results.Job:
    """A job as it stood."""
    return job_results.Job(
        job_id=job.job_id,
        kind=job.kind,
        state=wire.read_value(job_results.JobState, job_pb2.JobState, job.state),
        queue=job.queue,
        priority=wire.read_value(job_results.Priority, job_pb2.Priority, job.priority),
        labels=dict(job.labels),
        progress=job_results.Progress(job.progress.completed_count, job.progress.total_count, job.progress.message),
        attempt_count=job.attempt_count,
        max_attempts=job.max_attempts,
        attempts=tuple(_read_attempt(attempt) for attempt in job.attempts),
        create_time=_read_time(job, "create_time"),
        not_before_time=_read_time(job, "not_before_time"),
        deadline=_read_time(job, "deadline"),
        start_time=_read_time(job, "start_time"),
        end_time=_read_time(job, "end_time"),
        expire_time=_read_time(job, "expire_time"),
        revision=job.revision,
        cancel_requested=job.cancel_requested,
        client=job.client,
        held=job.held,
        webhook=_read_webhook(job.webhook) if job.HasField("webhook") else None,
        result=_read_result(job.result) if job.HasField("result") else None,
        error=from_status(job.error) if job.HasField("error") else None,
    )


def read_page(response: queue_service_pb2.ListJobsResponse) -> job_results.JobPage:
    """Some jobs."""
    return job_results.JobPage(tuple(read_job(job) for job in response.jobs), response.next_page_token)


def read_batch(response: queue_service_pb2.BatchSubmitJobsResponse) -> tuple[job_results.SubmitOutcome, ...]:
    """What became of each submission, in their order."""
    return tuple(
        job_results.SubmitOutcome(job=read_job(item.accepted.job), created=item.accepted.created)
        if item.HasField("accepted")
        else job_results.SubmitOutcome(error=from_status(item.error))
        for item in response.items
    )


def read_media(media: queue_service_pb2.Media) -> job_results.Media:
    """A stored file."""
    return job_results.Media(media.media_id, media.size_bytes, media.content_type, _read_time(media, "expire_time"))


def read_stats(response: queue_service_pb2.GetQueueStatsResponse) -> job_results.Stats:
    """The counts of all queues."""
    return job_results.Stats(
        queues=tuple(
            job_results.QueueStats(
                queue=item.queue,
                depth=item.depth,
                scheduled=item.scheduled,
                running=item.running,
                failed=item.failed,
                backlog=item.backlog,
                oldest_age_s=_read_seconds(item, "oldest_age"),
                throughput_per_second=item.throughput_per_second,
                latency_p50_s=_read_seconds(item, "latency_p50"),
                latency_p95_s=_read_seconds(item, "latency_p95"),
                paused=item.paused,
                held=item.held,
                size_bytes=item.size_bytes,
                clients=tuple(job_results.ClientStats(one.client, one.waiting) for one in item.clients),
            )
            for item in response.queues
        ),
        worker_count=response.worker_count,
    )


def read_worker(worker: queue_service_pb2.Worker) -> job_results.Worker:
    """A worker."""
    return job_results.Worker(
        worker=worker.worker,
        concurrency=worker.concurrency,
        job_ids=tuple(worker.job_ids),
        start_time=_read_time(worker, "start_time"),
        seen_time=_read_time(worker, "seen_time"),
        ended_count=worker.ended_count,
    )


def _read_attempt(attempt: job_pb2.JobAttempt) -> job_results.Attempt:
    return job_results.Attempt(
        number=attempt.number,
        worker=attempt.worker,
        start_time=_read_time(attempt, "start_time"),
        end_time=_read_time(attempt, "end_time"),
        error=from_status(attempt.error) if attempt.HasField("error") else None,
    )


def _read_result(result: work_pb2.JobResult) -> job_results.JobResult | None:
    match result.WhichOneof("result"):
        case "detect":
            return job_results.DetectJobResult(tuple(_read_detect_item(item) for item in result.detect.items))
        case "analyze":
            return job_results.AnalyzeJobResult(tuple(_read_analyze_item(item) for item in result.analyze.items))
        case "generate":
            return wire.read_answer(result.generate.summary)
        case "video":
            return _read_video(result.video)
        case _:  # a kind that this client doesn't know yet
            return None


def _read_detect_item(item: work_pb2.DetectResultItem) -> job_results.DetectItem:
    if item.HasField("error"):
        return job_results.DetectItem(error=from_status(item.error))
    return job_results.DetectItem(detection=wire.read_detect(item.detection))


def _read_analyze_item(item: work_pb2.AnalyzeResultItem) -> job_results.AnalyzeItem:
    if item.HasField("error"):
        return job_results.AnalyzeItem(error=from_status(item.error))
    return job_results.AnalyzeItem(analysis=wire.read_analyze(item.analysis))


def _read_video(result: work_pb2.VideoResult) -> job_results.VideoJobResult:
    return job_results.VideoJobResult(
        tracks_media_id=result.tracks_media_id,
        annotated_media_id=result.annotated_media_id,
        frame_count=result.frame_count,
        detected_frame_count=result.detected_frame_count,
        failed_frame_count=result.failed_frame_count,
        duration_s=_read_seconds(result, "duration") or 0.0,
        width_px=result.width_px,
        height_px=result.height_px,
        tracks=tuple(
            job_results.VideoTrack(
                track_id=track.track_id,
                label=track.label,
                first_s=_read_seconds(track, "first_time") or 0.0,
                last_s=_read_seconds(track, "last_time") or 0.0,
                frame_count=track.frame_count,
                max_confidence=track.max_confidence,
            )
            for track in result.tracks
        ),
    )


def _read_webhook(delivery: job_pb2.WebhookDelivery) -> job_results.WebhookDelivery:
    return job_results.WebhookDelivery(
        url=delivery.url,
        attempt_count=delivery.attempt_count,
        deliver_time=_read_time(delivery, "deliver_time"),
        error=from_status(delivery.error) if delivery.HasField("error") else None,
    )


def _read_time(message: ProtoMessage, name: str) -> datetime | None:
    if not message.HasField(name):
        return None
    timestamp: Timestamp = getattr(message, name)
    return timestamp.ToDatetime(tzinfo=UTC)


def _read_seconds(message: ProtoMessage, name: str) -> float | None:
    if not message.HasField(name):
        return None
    duration: Duration = getattr(message, name)
    return duration.ToMilliseconds() / 1000
