"""The commands about jobs that were submitted: jobs, watch, cancel, retry, delete."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from ai4thai.cli_job_output import job_line, print_job_result, print_jobs
from ai4thai.cli_options import QUEUE, AsJson, JobId, QueueAddress
from ai4thai.cli_output import err, out, print_json
from ai4thai.job_results import AnalyzeJobResult, DetectJobResult, Job, JobState
from ai4thai.queue_client import QueueClient


def jobs(
    state: Annotated[list[str] | None, typer.Option(help="Only this state, such as running; may be repeated.")] = None,
    queue_name: Annotated[str, typer.Option("--in", metavar="NAME", help="Only this queue.")] = "",
    kind: Annotated[str, typer.Option(help="Only detect, generate, analyze or video.")] = "",
    label: Annotated[str, typer.Option(metavar="KEY[=VALUE]", help="Only jobs with this label.")] = "",
    client: Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this client.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many, the newest.")] = 20,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Lists jobs, the newest first."""
    with QueueClient(queue) as server:
        pages = server.list_all(
            states=state or (),
            queue=queue_name,
            kind=kind,
            label=label,
            client=client,
            page_size=min(limit + 1, 500),
        )
        found = list(islice(pages, limit + 1))  # a page may be short, and still not be the last
    if json:
        for job in found[:limit]:
            print_json(job)
    elif found:
        print_jobs(found[:limit])
        if len(found) > limit:
            err.print("[dim]There are more: see --limit.[/]")
    else:
        out.print("no jobs")


def watch(
    job_id: JobId,
    after_revision: Annotated[int, typer.Option(min=0, help="Only changes after this one.")] = 0,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Follows a job to its end, then prints its result; exits 0 when it succeeded for every image."""
    with QueueClient(queue) as client:
        for job in client.watch(job_id, after_revision):
            tell_change(job, json)
        tell_end(client.get(job_id), json)


def cancel(job_id: JobId, json: AsJson = False, queue: QueueAddress = QUEUE) -> None:
    """Cancels a job; a running one ends as soon as its worker has stopped it."""
    with QueueClient(queue) as client:
        job = client.cancel(job_id)
    if json:
        print_json(job)
    elif job.has_ended:
        out.print(job_line(job))
    else:
        out.print(f"{job_line(job)}  [dim]will stop soon[/]")


def retry(job_id: JobId, json: AsJson = False, queue: QueueAddress = QUEUE) -> None:
    """Queues a job again that failed, was cancelled or expired, with all its attempts before it."""
    with QueueClient(queue) as client:
        job = client.retry(job_id)
    if json:
        print_json(job)
    else:
        out.print(job_line(job), soft_wrap=True)


def delete(job_id: JobId, queue: QueueAddress = QUEUE) -> None:
    """Forgets an ended job and its result."""
    with QueueClient(queue) as client:
        client.delete(job_id)
    out.print(f"{job_id} deleted")


def tell_change(job: Job, json: bool) -> None:
    """A change of a job: beside what was asked for, or as a line of JSON."""
    if json:
        if not job.has_ended:
            print_json(job)
    else:
        err.print(job_line(job), soft_wrap=True)


def tell_end(job: Job, json: bool) -> None:
    """A job at its end, with its result; exits with 1 unless it succeeded for every image."""
    if json:
        print_json(job)
    else:
        print_job_result(job)
    if job.state is not JobState.SUCCEEDED or _some_image_failed(job):
        raise typer.Exit(1)


def _some_image_failed(job: Job) -> bool:
    match job.result:
        case DetectJobResult(items=items) | AnalyzeJobResult(items=items):
            return any(item.error is not None for item in items)
    return False
