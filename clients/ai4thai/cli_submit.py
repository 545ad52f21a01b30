"""The commands that submit jobs: submit detect, ask, analyze, video."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ai4thai.cli_jobs import tell_change, tell_end
from ai4thai.cli_media import progress_bar
from ai4thai.cli_options import (
    QUEUE,
    AsJson,
    Client,
    Detector,
    Image,
    Images,
    IouThreshold,
    MaskForm,
    Masks,
    MaxDetections,
    MaxNewTokens,
    MinConfidence,
    Question,
    QueueAddress,
    Temperature,
    parse_moment,
)
from ai4thai.cli_output import err, out, print_json
from ai4thai.cli_vision import detect_options
from ai4thai.errors import InvalidInput
from ai4thai.job_results import Job, VideoJobResult
from ai4thai.options import Message, SubmitOptions
from ai4thai.queue_client import QueueClient

QueueName = Annotated[str, typer.Option("--in", metavar="NAME", help="The queue's name. \\[default: default]")]
PriorityName = Annotated[str, typer.Option("--priority", help="interactive, standard or batch. \\[default: standard]")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="May be repeated.")]
DelayS = Annotated[float, typer.Option("--delay", min=0, metavar="SECONDS", help="Not to be run before.")]
RequestId = Annotated[str, typer.Option(help="The same name gives the same job. \\[default: a new one]")]
WebhookUrl = Annotated[str, typer.Option("--webhook", metavar="URL", help="Where to tell the job's end.")]
NotBefore = Annotated[
    datetime | None,
    typer.Option(parser=parse_moment, metavar="WHEN", help="Not to be run before: 90s, 10m, 2h, or an ISO 8601 time."),
]
Deadline = Annotated[
    datetime | None,
    typer.Option(parser=parse_moment, metavar="WHEN", help="Expires if it has not begun by then: 10m, 2h, or a time."),
]
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
    not_before: NotBefore = None,
    deadline: Deadline = None,
    client: Client = "",
    webhook: WebhookUrl = "",
    request_id: RequestId = "",
    wait: Wait = False,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Finds the objects in images."""
    options = _submit_options(queue_name, priority, label, delay, not_before, deadline, client, webhook, request_id)
    found = detect_options(model, min_confidence, iou_threshold, max_detections, only, masks, mask_form)
    with QueueClient(queue) as server:
        job = server.submit_detect(images, detect=found, **options)
        _tell_submitted(server, job, wait=wait, json=json)


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
    not_before: NotBefore = None,
    deadline: Deadline = None,
    client: Client = "",
    webhook: WebhookUrl = "",
    request_id: RequestId = "",
    wait: Wait = False,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Asks about an image."""
    options = _submit_options(queue_name, priority, label, delay, not_before, deadline, client, webhook, request_id)
    messages = [Message("user", [image, question])]
    with QueueClient(queue) as server:
        job = server.submit_generate(
            messages, text={"max_new_tokens": max_new_tokens, "temperature": temperature}, **options
        )
        _tell_submitted(server, job, wait=wait, json=json)


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
    not_before: NotBefore = None,
    deadline: Deadline = None,
    client: Client = "",
    webhook: WebhookUrl = "",
    request_id: RequestId = "",
    wait: Wait = False,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Finds the objects in images and answers a question about each."""
    options = _submit_options(queue_name, priority, label, delay, not_before, deadline, client, webhook, request_id)
    with QueueClient(queue) as server:
        job = server.submit_analyze(
            images,
            question,
            detect={"min_confidence": min_confidence},
            text={"max_new_tokens": max_new_tokens},
            **options,
        )
        _tell_submitted(server, job, wait=wait, json=json)


@submit.command("video")
def submit_video(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="MP4, MOV, MKV, WebM or AVI.")],
    stride: Annotated[int, typer.Option(min=1, max=1000, help="Look at every so many-th frame.")] = 1,
    tracker: Annotated[str, typer.Option(help="bytetrack, botsort or none. \\[default: bytetrack]")] = "",
    annotate: Annotated[bool, typer.Option("--annotate", help="Also make an MP4 with the boxes drawn in.")] = False,
    max_frames: Annotated[
        int, typer.Option(min=0, show_default=False, help="Look at no more frames. \\[default: the server's limit]")
    ] = 0,
    model: Detector = "",
    min_confidence: MinConfidence = None,
    iou_threshold: IouThreshold = None,
    max_detections: MaxDetections = None,
    only: Annotated[list[str] | None, typer.Option(help="Only objects of this label; may be repeated.")] = None,
    queue_name: QueueName = "",
    priority: PriorityName = "",
    label: Labels = None,
    delay: DelayS = 0,
    not_before: NotBefore = None,
    deadline: Deadline = None,
    client: Client = "",
    webhook: WebhookUrl = "",
    request_id: RequestId = "",
    wait: Wait = False,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Wait, then save the tracks (JSON) and the MP4 here.")
    ] = None,
    json: AsJson = False,
    queue: QueueAddress = QUEUE,
) -> None:
    """Finds and follows the objects of a video."""
    options = _submit_options(queue_name, priority, label, delay, not_before, deadline, client, webhook, request_id)
    found = detect_options(model, min_confidence, iou_threshold, max_detections, only, False, "")
    if out_dir is not None:
        out_dir.mkdir(parents=True, exist_ok=True)  # not after an hour's work
    with QueueClient(queue) as server:
        with progress_bar("uploading", video.name) as on_progress:
            job = server.submit_video(
                video,
                detect=found,
                stride=stride,
                tracker=tracker,
                annotate=annotate,
                max_frames=max_frames,
                on_progress=on_progress,
                **options,
            )
        if out_dir is None:
            _tell_submitted(server, job, wait=wait, json=json)
            return
        job = server.wait(job.job_id, on_change=lambda change: tell_change(change, json))
        if isinstance(job.result, VideoJobResult):
            _save_video_result(server, job.result, out_dir, video.stem)
        tell_end(job, json)


def _save_video_result(server: QueueClient, result: VideoJobResult, folder: Path, stem: str) -> None:
    files = {f"{stem}.tracks.json": result.tracks_media_id, f"{stem}.annotated.mp4": result.annotated_media_id}
    for name, media_id in files.items():
        if media_id:
            with progress_bar("downloading", name) as on_progress:
                server.download(media_id, folder / name, on_progress=on_progress)
            err.print(f"[green]saved[/] {escape(str(folder / name))}", soft_wrap=True)


def _submit_options(
    queue_name: str,
    priority: str,
    labels: list[str] | None,
    delay_s: float,
    not_before: datetime | None,
    deadline: datetime | None,
    client: str,
    webhook_url: str,
    request_id: str,
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
        "not_before": not_before,
        "deadline": deadline,
        "client": client,
        "webhook_url": webhook_url,
        "request_id": request_id,
    }


def _tell_submitted(server: QueueClient, job: Job, *, wait: bool, json: bool) -> None:
    if wait:
        tell_end(server.wait(job.job_id, on_change=lambda change: tell_change(change, json)), json)
    elif json:
        print_json(job)
    else:
        out.print(job.job_id, soft_wrap=True)  # alone on stdout, for scripts
        err.print(f"[dim]{job.state.value}. Follow it: ai4thai watch {job.job_id}[/]", soft_wrap=True)
