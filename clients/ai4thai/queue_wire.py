"""Writes the queue server's requests and reads its responses; protobuf goes no further."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.timestamp_pb2 import Timestamp

from ai4thai import job_results, wire
from ai4thai.errors import from_status
from ai4thai.image_input import ImageInput, read_file
from ai4thai.options import DetectOptions, Message, SubmitOptions, TextOptions
from ai4thai.queue.v1 import job_pb2, queue_service_pb2, work_pb2

# ---- requests


def write_detect_work(images: Iterable[ImageInput], options: DetectOptions) -> work_pb2.Work:
    """Work that finds the objects of images."""
    return work_pb2.Work(
        detect=work_pb2.DetectWork(images=_write_images(images), options=wire.write_detect_options(options))
    )


def write_generate_work(messages: Iterable[Message], options: TextOptions) -> work_pb2.Work:
    """Work that answers a conversation."""
    return work_pb2.Work(
        generate=work_pb2.GenerateWork(
            model=options.get("model", ""),
            messages=[_write_message(message) for message in messages],
            options=wire.write_text_options(options),
        )
    )


def write_analyze_work(
    images: Iterable[ImageInput], question: str, detect: DetectOptions, text: TextOptions
) -> work_pb2.Work:
    """Work that finds the objects of images and answers a question about each."""
    return work_pb2.Work(
        analyze=work_pb2.AnalyzeWork(
            images=_write_images(images),
            question=question,
            detect_options=wire.write_detect_options(detect),
            generate_options=wire.write_text_options(text),
            model=text.get("model", ""),
        )
    )


def write_submit(work: work_pb2.Work, options: SubmitOptions) -> queue_service_pb2.SubmitJobRequest:
    """The request of SubmitJob. It always has a request_id: to send it twice is to submit once."""
    unknown = sorted(set(options) - SubmitOptions.__optional_keys__)
    if unknown:
        raise TypeError(
            f"Unknown option {', '.join(unknown)}. There are: {', '.join(sorted(SubmitOptions.__optional_keys__))}."
        )
    now, delay_s, deadline_s = datetime.now(UTC), options.get("delay_s", 0.0), options.get("deadline_s")
    return queue_service_pb2.SubmitJobRequest(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        queue=options.get("queue", ""),
        priority=_write_priority(options.get("priority", "")),
        not_before_time=_write_time(now + timedelta(seconds=delay_s)) if delay_s else None,
        deadline=_write_time(now + timedelta(seconds=deadline_s)) if deadline_s is not None else None,
        max_attempts=options.get("max_attempts", 0),
        labels=options.get("labels", {}),
        work=work,
    )


def write_list(
    states: Iterable[job_results.JobState | str], queue: str, kind: str, label: str, page_size: int, page_token: str
) -> queue_service_pb2.ListJobsRequest:
    """The request of ListJobs."""
    return queue_service_pb2.ListJobsRequest(
        states=[write_state(state) for state in states],
        queue=queue,
        kind=kind,
        label=label,
        page_size=page_size,
        page_token=page_token,
    )


def write_state(state: job_results.JobState | str) -> job_pb2.JobState.ValueType:
    """A state's number.

    Raises:
        ValueError: no such state.
    """
    try:
        return job_pb2.JobState.Value(f"JOB_STATE_{str(state).upper()}")
    except ValueError:
        raise ValueError(f"The state {state!r} is none of {', '.join(job_results.JobState)}.") from None


def _write_priority(priority: str) -> job_pb2.Priority.ValueType:
    try:
        return job_pb2.Priority.Value(f"PRIORITY_{priority.upper() or 'UNSPECIFIED'}")
    except ValueError:
        raise ValueError(f"The priority {priority!r} is none of INTERACTIVE, STANDARD, BATCH.") from None


def _write_images(images: Iterable[ImageInput]) -> list[work_pb2.MediaSource]:
    if isinstance(images, str | bytes):  # one path would otherwise be read letter by letter
        raise TypeError("images is a list of images; put the single one into a list.")
    return [work_pb2.MediaSource(content=read_file(image)) for image in images]


def _write_message(message: Message) -> work_pb2.WorkMessage:
    return work_pb2.WorkMessage(
        role=wire.write_role(message.role),
        parts=[
            work_pb2.WorkMessagePart(text=part)
            if isinstance(part, str)
            else work_pb2.WorkMessagePart(image=work_pb2.MediaSource(content=read_file(part)))
            for part in wire.parts_of(message)
        ],
    )


def _write_time(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


# ---- responses


def read_job(job: job_pb2.Job) -> job_results.Job:
    """A job as it stood."""
    return job_results.Job(
        job_id=job.job_id,
        kind=job.kind,
        state=job_results.JobState(job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")),
        queue=job.queue,
        priority=job_results.Priority(job_pb2.Priority.Name(job.priority).removeprefix("PRIORITY_")),
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
        result=_read_result(job.result) if job.HasField("result") else None,
        error=from_status(job.error) if job.HasField("error") else None,
    )


def read_page(response: queue_service_pb2.ListJobsResponse) -> job_results.JobPage:
    """Some jobs."""
    return job_results.JobPage(tuple(read_job(job) for job in response.jobs), response.next_page_token)


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
