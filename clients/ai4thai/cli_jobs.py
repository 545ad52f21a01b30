"""The commands that talk to a queue server about jobs: submit, jobs, watch, cancel, delete."""

from __future__ import annotations

from typing import Annotated

import typer

from ai4thai.cli_options import (
    QUEUE,
    AsJson,
    Detector,
    Image,
    Images,
    IouThreshold,
    JobId,
    MaskForm,
    Masks,
    MaxDetections,
    MaxNewTokens,
    MinConfidence,
    Question,
    QueueAddress,
    Temperature,
)
from ai4thai.cli_output import err, job_line, out, print_job_result, print_jobs, print_json
from ai4thai.cli_vision import detect_options
from ai4thai.errors import InvalidInput
from ai4thai.job_results import AnalyzeJobResult, DetectJobResult, Job, JobState
from ai4thai.options import Message, SubmitOptions
from ai4thai.queue_client import QueueClient

QueueName = Annotated[str, typer.Option("--in", metavar="NAME", help="The queue's name. \\[default: default]")]
PriorityName = Annotated[str, typer.Option("--priority", help="interactive, standard or batch. \\[default: standard]")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="May be repeated.")]
DelayS = Annotated[float, typer.Option("--delay", min=0, metavar="SECONDS", help="Not to be run before.")]
RequestId = Annotated[str, typer.Option(help="The same name gives the same job. \\[default: a new one]")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end and print the result.")]

submit = typer.Typer(help="Submits a job, and prints its id.", no_args_is_help=True)


@submit.command("detect")
def submit_detect(
    images: Images,
    model: Detector = "",
    min_confidence: MinConfidence = None,
    iou_threshold: IouThreshold = None,
    max_detections: MaxDetections = None,
    only: Annotated[list[str] | None, typer.Option(help="Only objects of this label; may be repeated.")] = None,
    masks: Masks = False,
    mask_form: MaskForm = "",
    queue_name: QueueName = "",
    priority: PriorityName = "",
    label: Labels = None,
    delay: DelayS = 0,
    request_id: RequestId = "",
    wait: Wait = False,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Finds the objects in images."""
    options = _submit_options(queue_name, priority, label, delay, request_id)
    found = detect_options(model, min_confidence, iou_threshold, max_detections, only, masks, mask_form)
    with QueueClient(queue) as client:
        job = client.submit_detect(images, detect=found, **options)
        _tell_submitted(client, job, wait=wait, json=json)


@submit.command("ask")
def submit_ask(
    image: Image,
    question: Question,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    queue_name: QueueName = "",
    priority: PriorityName = "",
    label: Labels = None,
    delay: DelayS = 0,
    request_id: RequestId = "",
    wait: Wait = False,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Asks about an image."""
    options = _submit_options(queue_name, priority, label, delay, request_id)
    messages = [Message("user", [image, question])]
    with QueueClient(queue) as client:
        job = client.submit_generate(
            messages, text={"max_new_tokens": max_new_tokens, "temperature": temperature}, **options
        )
        _tell_submitted(client, job, wait=wait, json=json)


@submit.command("analyze")
def submit_analyze(
    images: Images,
    question: Annotated[str, typer.Option("--question", help="Asked about each image. Required.")],
    min_confidence: MinConfidence = None,
    max_new_tokens: MaxNewTokens = None,
    queue_name: QueueName = "",
    priority: PriorityName = "",
    label: Labels = None,
    delay: DelayS = 0,
    request_id: RequestId = "",
    wait: Wait = False,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Finds the objects in images and answers a question about each."""
    options = _submit_options(queue_name, priority, label, delay, request_id)
    with QueueClient(queue) as client:
        job = client.submit_analyze(
            images,
            question,
            detect={"min_confidence": min_confidence},
            text={"max_new_tokens": max_new_tokens},
            **options,
        )
        _tell_submitted(client, job, wait=wait, json=json)


def jobs(
    state: Annotated[list[str] | None, typer.Option(help="Only this state, such as running; may be repeated.")] = None,
    queue_name: Annotated[str, typer.Option("--in", metavar="NAME", help="Only this queue.")] = "",
    kind: Annotated[str, typer.Option(help="Only detect, generate or analyze.")] = "",
    label: Annotated[str, typer.Option(metavar="KEY[=VALUE]", help="Only jobs with this label.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=500, help="At most so many, the newest.")] = 20,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Lists jobs, the newest first."""
    with QueueClient(queue) as client:
        page = client.list(states=state or (), queue=queue_name, kind=kind, label=label, page_size=limit)
    if json:
        for job in page.jobs:
            print_json(job)
    elif page.jobs:
        print_jobs(page.jobs)
        if page.next_page_token:
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
            _tell_change(job, json)
        _tell_end(client.get(job_id), json)


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


def delete(job_id: JobId, queue: QueueAddress = QUEUE) -> None:
    """Forgets an ended job and its result."""
    with QueueClient(queue) as client:
        client.delete(job_id)
    out.print(f"{job_id} deleted")


def _submit_options(
    queue_name: str, priority: str, labels: list[str] | None, delay_s: float, request_id: str
) -> SubmitOptions:
    pairs = {}
    for label in labels or ():
        key, equals, value = label.partition("=")
        if not (key and equals):
            raise InvalidInput(f"The label {label!r} is not of the form KEY=VALUE.", code="INVALID_ARGUMENT")
        pairs[key] = value
    return {
        "queue": queue_name,
        "priority": priority,
        "labels": pairs,
        "delay_s": delay_s,
        "request_id": request_id,
    }


def _tell_submitted(client: QueueClient, job: Job, *, wait: bool, json: bool) -> None:
    if wait:
        _tell_end(client.wait(job.job_id, on_change=lambda change: _tell_change(change, json)), json)
    elif json:
        print_json(job)
    else:
        out.print(job.job_id, soft_wrap=True)  # alone on stdout, for scripts
        err.print(f"[dim]{job.state.value}. Follow it: ai4thai watch {job.job_id}[/]", soft_wrap=True)


def _tell_change(job: Job, json: bool) -> None:
    if json:
        if not job.has_ended:
            print_json(job)
    else:
        err.print(job_line(job), soft_wrap=True)


def _tell_end(job: Job, json: bool) -> None:
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
