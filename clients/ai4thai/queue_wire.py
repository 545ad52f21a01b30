"""Writes the queue server's requests; protobuf goes no further."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from ai4thai import job_results, wire
from ai4thai.media_input import JobFile, read_job_file
from ai4thai.options import DetectOptions, Message, SubmitOptions, TextOptions
from ai4thai.queue.v1 import job_pb2, queue_service_pb2, work_pb2

# A work's files are left out at first, and put in when it is sent: until then they need not be in memory.


def write_detect_work(image_count: int, options: DetectOptions) -> work_pb2.Work:
    """Work that finds the objects of images; their files are to be put in."""
    return work_pb2.Work(
        detect=work_pb2.DetectWork(images=_empty_sources(image_count), options=wire.write_detect_options(options))
    )


def write_generate_work(messages: Iterable[Message], options: TextOptions) -> tuple[work_pb2.Work, list[JobFile]]:
    """Work that answers a conversation, and the files that are to be put in."""
    files: list[JobFile] = []
    work = work_pb2.GenerateWork(model=options.get("model", ""), options=wire.write_text_options(options))
    for message in messages:
        turn = work.messages.add(role=wire.write_role(message.role))
        for part in wire.parts_of(message):
            if isinstance(part, str):
                turn.parts.add(text=part)
            else:
                turn.parts.add(image=work_pb2.MediaSource())
                files.append(read_job_file(part))
    return work_pb2.Work(generate=work), files


def write_analyze_work(image_count: int, question: str, detect: DetectOptions, text: TextOptions) -> work_pb2.Work:
    """Work that finds the objects of images and answers a question about each; the files are to be put in."""
    return work_pb2.Work(
        analyze=work_pb2.AnalyzeWork(
            images=_empty_sources(image_count),
            question=question,
            detect_options=wire.write_detect_options(detect),
            generate_options=wire.write_text_options(text),
            model=text.get("model", ""),
        )
    )


def write_video_work(
    detect: DetectOptions, stride: int, tracker: str, annotate: bool, max_frames: int
) -> work_pb2.Work:
    """Work that follows the objects of a video; its file is to be put in."""
    return work_pb2.Work(
        video=work_pb2.VideoWork(
            video=work_pb2.MediaSource(),
            options=wire.write_detect_options(detect),
            stride=stride,
            tracker=wire.write_tracker(tracker),
            annotate=annotate,
            max_frames=max_frames,
        )
    )


def sources_of(work: work_pb2.Work) -> Iterator[work_pb2.MediaSource]:
    """Where a work's files are, in their order."""
    match work.WhichOneof("work"):
        case "detect":
            yield from work.detect.images
        case "analyze":
            yield from work.analyze.images
        case "generate":
            for message in work.generate.messages:
                yield from (part.image for part in message.parts if part.HasField("image"))
        case "video":
            yield work.video.video


def write_submit(work: work_pb2.Work, options: SubmitOptions) -> queue_service_pb2.SubmitJobRequest:
    """The request of SubmitJob. It always has a request_id: to send it twice is to submit once."""
    unknown = sorted(set(options) - SubmitOptions.__optional_keys__)
    if unknown:
        raise TypeError(
            f"Unknown option {', '.join(unknown)}. There are: {', '.join(sorted(SubmitOptions.__optional_keys__))}."
        )
    webhook_url = options.get("webhook_url", "")
    return queue_service_pb2.SubmitJobRequest(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        queue=options.get("queue", ""),
        priority=_write_priority(options.get("priority", "")),
        not_before_time=_moment("not_before", options.get("not_before"), "delay_s", options.get("delay_s") or None),
        deadline=_moment("deadline", options.get("deadline"), "deadline_s", options.get("deadline_s")),
        max_attempts=options.get("max_attempts", 0),
        labels=options.get("labels", {}),
        work=work,
        client=options.get("client", ""),
        webhook=queue_service_pb2.Webhook(url=webhook_url) if webhook_url else None,
    )


def write_list(
    states: Iterable[job_results.JobState | str],
    queue: str,
    kind: str,
    label: str,
    client: str,
    page_size: int,
    page_token: str,
) -> queue_service_pb2.ListJobsRequest:
    """The request of ListJobs."""
    return queue_service_pb2.ListJobsRequest(
        states=[write_state(state) for state in states],
        queue=queue,
        kind=kind,
        label=label,
        client=client,
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


def _empty_sources(count: int) -> list[work_pb2.MediaSource]:
    return [work_pb2.MediaSource() for _ in range(count)]


def _moment(name: str, moment: datetime | None, relative_name: str, relative_s: float | None) -> Timestamp | None:
    if moment is not None and relative_s is not None:
        raise ValueError(f"{name} and {relative_name} say the same thing twice; give one of them.")
    if moment is None:
        if relative_s is None:
            return None
        moment = datetime.now(UTC) + timedelta(seconds=relative_s)
    elif moment.tzinfo is None:
        raise ValueError(f"{name} has no time zone; write for example datetime.now(UTC) + timedelta(minutes=5).")
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp
