"""How the command line shows jobs, queues and workers: tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from rich.filesize import decimal
from rich.markup import escape

from ai4thai.cli_output import err, out, plain_table, print_analysis, print_answer_notes, print_detection, print_error
from ai4thai.job_results import AnalyzeJobResult, DetectJobResult, Job, JobState, Stats, VideoJobResult, Worker
from ai4thai.results import Answer

STATE_STYLE: Final = {
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.EXPIRED: "red",
    JobState.CANCELLED: "yellow",
    JobState.RUNNING: "cyan",
}

MAX_SHOWN_TRACKS: Final = 30
"""Of a video's objects; the JSON has all."""


def job_line(job: Job) -> str:
    """A job in one line, with markup."""
    style = STATE_STYLE.get(job.state, "white")
    progress = ""
    if job.progress.total_count:
        progress = f"  {job.progress.completed_count}/{job.progress.total_count}"
    attempt = f"  {_attempt(job)}" if job.attempt_count > 1 else ""
    held = "  [yellow]held[/]" if job.held else ""
    why = f"  {escape(str(job.error))}" if job.error else ""
    return f"{job.job_id}  [{style}]{job.state.value:<9}[/]  {job.kind}{progress}{held}{attempt}{why}"


def _attempt(job: Job) -> str:
    # Attempts that do not count (the model was loading, the worker was stopped) can carry the number past the limit.
    limit = f" of {job.max_attempts}" if job.attempt_count <= job.max_attempts else ""
    return f"attempt {job.attempt_count}{limit}"


def print_jobs(jobs: Iterable[Job]) -> None:
    """Jobs as a table; the last column says what is not as usual."""
    table = plain_table("job", "state", "kind", "done", "age", "took", "notes")
    table.columns[0].min_width = 32  # an id is of use only whole
    for job in jobs:
        done = f"{job.progress.completed_count}/{job.progress.total_count}" if job.progress.total_count else ""
        age = _age(datetime.now(UTC) - job.create_time) if job.create_time else ""
        took = f"{(job.end_time - job.create_time).total_seconds():.1f} s" if job.create_time and job.end_time else ""
        state = f"[{STATE_STYLE.get(job.state, 'white')}]{job.state.value}[/]"
        notes = [
            f"queue {escape(job.queue)}" if job.queue != "default" else "",
            f"client {escape(job.client)}" if job.client else "",
            "held" if job.held else "",
            _attempt(job) if job.attempt_count > 1 else "",
            "cancel requested" if job.cancel_requested and not job.has_ended else "",
            "webhook failing" if job.webhook is not None and job.webhook.error is not None else "",
            " ".join(f"{escape(key)}={escape(value)}" for key, value in job.labels.items()),
        ]
        table.add_row(job.job_id, state, job.kind, done, age, took, ", ".join(filter(None, notes)))
    out.print(table)


def print_job_result(job: Job) -> None:
    """What a job brought, or why it brought nothing."""
    if job.error is not None:
        print_error(job.error)
    match job.result:
        case DetectJobResult(items=detected):
            for number, found in enumerate(detected, start=1):
                if found.detection is not None:
                    print_detection(f"image {number}", found.detection)
                else:
                    print_error(f"image {number}: {found.error}")
        case AnalyzeJobResult(items=analyzed):
            for number, told in enumerate(analyzed, start=1):
                if told.analysis is not None:
                    print_analysis(f"image {number}", told.analysis)
                else:
                    print_error(f"image {number}: {told.error}")
        case VideoJobResult() as video:
            print_tracks(video)
            _print_video_files(video)
        case Answer() as answer:
            out.print(escape(answer.text))
            print_answer_notes(answer)


def print_tracks(video: VideoJobResult) -> None:
    """What was followed in a video, as a table."""
    notes = (
        f"{video.width_px} x {video.height_px} px · {video.duration_s:.1f} s · {video.frame_count} frames, "
        f"{video.detected_frame_count} looked at"
    )
    out.print(f"[bold]video[/]  [dim]{notes}[/]", soft_wrap=True)
    if video.failed_frame_count:
        frames = "1 frame" if video.failed_frame_count == 1 else f"{video.failed_frame_count} frames"
        err.print(f"[yellow]{frames} without an answer; the JSON has each one's error.[/]", soft_wrap=True)
    if video.tracks:
        table = plain_table("object", "label", "seen", "frames", "surest")
        for track in video.tracks[:MAX_SHOWN_TRACKS]:
            seen = f"{track.first_s:.2f} – {track.last_s:.2f} s"
            table.add_row(
                f"#{track.track_id}", escape(track.label), seen, str(track.frame_count), f"{track.max_confidence:.2f}"
            )
        out.print(table)
        if len(video.tracks) > MAX_SHOWN_TRACKS:
            out.print(f"[dim]… and {len(video.tracks) - MAX_SHOWN_TRACKS} more[/]")
    else:
        out.print("  nothing was followed")


def _print_video_files(video: VideoJobResult) -> None:
    out.print(f"[dim]tracks (JSON)[/]    {video.tracks_media_id}", soft_wrap=True)
    if video.annotated_media_id:
        out.print(f"[dim]annotated (MP4)[/]  {video.annotated_media_id}", soft_wrap=True)


def print_stats(stats: Stats, workers: Iterable[Worker]) -> None:
    """The queues' counts and the workers as two tables."""
    print_queues(stats)
    people = plain_table("worker", "at once", "ended", "jobs now")
    for worker in workers:
        jobs_now = ", ".join(worker.job_ids) or "–"
        people.add_row(worker.worker, str(worker.concurrency), str(worker.ended_count), jobs_now)
    out.print(people if stats.worker_count else "[yellow]no worker is alive: jobs wait[/]")


def print_queues(stats: Stats) -> None:
    """The queues' counts as a table, then of each what is not as usual, who waits, and what it weighs."""
    table = plain_table("queue", "queued", "scheduled", "running", "failed", "oldest", "jobs/s", "p50", "p95")
    table.columns[0].no_wrap, table.columns[-1].no_wrap = False, True  # a long name gives way, not a number
    for item in stats.queues:
        table.add_row(
            escape(item.queue),
            *(str(count) for count in (item.depth, item.scheduled, item.running, item.failed)),
            _seconds(item.oldest_age_s),
            f"{item.throughput_per_second:.2f}",
            _seconds(item.latency_p50_s),
            _seconds(item.latency_p95_s),
        )
    out.print(table if stats.queues else "no queue has had a job yet")
    for item in stats.queues:
        waiting = ", ".join(f"{escape(one.client) or '(no name)'} {one.waiting}" for one in item.clients)
        notes = [
            "[yellow]paused[/]" if item.paused else "",
            f"{item.held} held" if item.held else "",
            decimal(item.size_bytes) if item.size_bytes else "",
            f"waiting by client: {waiting}" if waiting else "",
        ]
        if any(notes):
            out.print(f"[dim]{escape(item.queue)}:[/] {', '.join(filter(None, notes))}", soft_wrap=True)


def _age(age: timedelta) -> str:
    seconds = age.total_seconds()
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
