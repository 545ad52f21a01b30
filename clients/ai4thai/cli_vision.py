"""The commands that talk to a vision server: detect, stream, ask, analyze."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ai4thai.cli_options import (
    VISION,
    AsJson,
    Describer,
    Detector,
    Image,
    Images,
    IouThreshold,
    MaskForm,
    Masks,
    MaxDetections,
    MaxNewTokens,
    MinConfidence,
    OnlyLabels,
    Priority,
    Question,
    Seed,
    Temperature,
    TimeoutS,
    TopP,
    VisionAddress,
)
from ai4thai.cli_output import (
    as_json,
    err,
    in_words,
    out,
    print_analysis,
    print_answer_notes,
    print_detection,
    print_error,
    print_json,
    print_piece,
)
from ai4thai.errors import AI4ThaiError
from ai4thai.frames import read_frames
from ai4thai.image_input import ImageInput
from ai4thai.options import DetectOptions, StreamOptions, TextOptions
from ai4thai.results import FrameResult, jpeg_path
from ai4thai.vision_client import VisionClient


def detect(
    images: Images,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the picture with the boxes drawn in (JPEG); of several images, a folder for them."),
    ] = None,
    model: Detector = "",
    min_confidence: MinConfidence = None,
    iou_threshold: IouThreshold = None,
    max_detections: MaxDetections = None,
    label: OnlyLabels = None,
    masks: Masks = False,
    mask_form: MaskForm = "",
    priority: Priority = "",
    json: AsJson = False,
    timeout: TimeoutS = 60,
    vision: VisionAddress = VISION,
) -> None:
    """Finds the objects in images."""
    options = detect_options(model, min_confidence, iou_threshold, max_detections, label, masks, mask_form)
    if save is not None:
        options["annotate"] = True
        if len(images) > 1:
            save.mkdir(parents=True, exist_ok=True)
        else:
            jpeg_path(save)  # a wrong ending is told before the work, not after
    failed = 0
    with VisionClient(vision, timeout_s=timeout) as client:
        for image in images:
            try:
                result = client.detect(image, priority=priority, **options)
            except (AI4ThaiError, OSError) as error:
                if len(images) == 1:
                    raise
                failed += 1
                print_json(
                    {"image": str(image), "error": error if isinstance(error, AI4ThaiError) else str(error)}
                ) if json else print_error(f"{image}: {error}")
                continue
            if json:
                print_json({"image": str(image), **as_json(result)})
            else:
                print_detection(str(image), result)
            if save is not None:
                target = save if len(images) == 1 else save / f"{image.stem}.jpg"
                err.print(f"[green]saved[/] {result.save(target)}")
    if failed:
        raise typer.Exit(1)


def stream(
    source: Annotated[Path, typer.Argument(metavar="VIDEO_OR_FOLDER", help="A video file, or a folder of images.")],
    stride: Annotated[int, typer.Option(min=1, help="Take every how many pictures one.")] = 1,
    limit: Annotated[int, typer.Option(min=0, help="Take at most so many; 0: all.")] = 0,
    max_in_flight: Annotated[int, typer.Option(min=0, help="Pictures at the server at once; 0: its default.")] = 0,
    tracker: Annotated[
        str,
        typer.Option(metavar="TRACKER", help="Number the objects: bytetrack, or botsort where the camera moves."),
    ] = "",
    drop_oldest: Annotated[
        bool, typer.Option("--drop-oldest", help="Drop pictures that come too fast: the latest one counts.")
    ] = False,
    save_dir: Annotated[
        Path | None, typer.Option(help="A folder for the pictures with the boxes drawn in (JPEG).")
    ] = None,
    model: Detector = "",
    min_confidence: MinConfidence = None,
    iou_threshold: IouThreshold = None,
    max_detections: MaxDetections = None,
    label: OnlyLabels = None,
    masks: Masks = False,
    mask_form: MaskForm = "",
    priority: Priority = "",
    json: AsJson = False,
    vision: VisionAddress = VISION,
) -> None:
    """Finds the objects in every picture of a video or folder, over one stream."""
    options: StreamOptions = {
        **detect_options(model, min_confidence, iou_threshold, max_detections, label, masks, mask_form),
        "annotate": save_dir is not None,
        "max_in_flight": max_in_flight,
        "tracker": tracker,
        "overflow": "drop_oldest" if drop_oldest else "",
        "priority": priority,
    }
    frames = read_frames(source, stride, limit)
    if save_dir is not None:
        save_dir.mkdir(parents=True, exist_ok=True)
    names: deque[str] = deque()  # of the pictures on their way: results come in their order

    def pictures() -> Iterator[ImageInput]:
        for name, picture in frames.pictures:
            names.append(name)
            yield picture

    labels: Counter[str] = Counter()
    followed: dict[int, str] = {}
    begun_s = time.monotonic()
    with (
        VisionClient(vision) as client,
        client.detect_stream(pictures(), **options) as results,
        _progress() as progress,
    ):
        task = progress.add_task(source.name, total=frames.count, speed="")
        for done, result in enumerate(results, start=1):
            name = names.popleft()
            _tell_frame(progress, name, result, json)
            if result.detection is not None:
                labels.update(item.label for item in result.detection.detections)
                followed.update((d.track_id, d.label) for d in result.detection.detections if d.track_id is not None)
                if save_dir is not None:
                    result.detection.save(save_dir / f"{done:05d} {Path(name).stem}.jpg")
            progress.update(task, completed=done, speed=f"{done / (time.monotonic() - begun_s):.1f} images/s")
        summary = results.summary
    elapsed_s = time.monotonic() - begun_s
    if json:
        print_json({"summary": summary})
    else:
        out.print(
            f"[bold]{summary.detected_count}[/] images answered, {summary.error_count} with an error, "
            f"{summary.dropped_count} dropped, in {elapsed_s:.1f} s "
            f"([bold]{summary.received_count / elapsed_s:.1f} images/s[/]): {in_words(labels.elements())}"
        )
        if tracker:
            out.print(f"followed: {in_words(followed.values())}")
    if save_dir is not None:
        err.print(f"[green]saved[/] {save_dir}")


def ask(
    image: Image,
    question: Question,
    model: Describer = "",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    priority: Priority = "",
    json: AsJson = False,
    timeout: TimeoutS = 300,
    vision: VisionAddress = VISION,
) -> None:
    """Asks about an image; the answer appears as it is written."""
    options = text_options(model, max_new_tokens, temperature, top_p, seed)
    with (
        VisionClient(vision, timeout_s=timeout) as client,
        client.ask(image, question, priority=priority, **options) as text,
    ):
        if json:
            print_json(text.summary)
            return
        for piece in text:
            print_piece(piece)
        print_piece("\n")
        print_answer_notes(text.summary)


def analyze(
    image: Image,
    question: Question,
    save: Annotated[Path | None, typer.Option(help="Write the picture with the boxes drawn in (JPEG).")] = None,
    min_confidence: MinConfidence = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    priority: Priority = "",
    json: AsJson = False,
    timeout: TimeoutS = 300,
    vision: VisionAddress = VISION,
) -> None:
    """Finds the objects in an image and answers a question about them."""
    found = detect_options("", min_confidence, None, None, None)
    found["annotate"] = save is not None
    if save is not None:
        jpeg_path(save)
    with VisionClient(vision, timeout_s=timeout) as client:
        result = client.analyze(
            image,
            question,
            detect=found,
            text=text_options("", max_new_tokens, temperature, None, None),
            priority=priority,
        )
    if json:
        print_json(result)
    else:
        print_analysis(str(image), result)
    if save is not None:
        err.print(f"[green]saved[/] {result.detection.save(save)}")


def detect_options(
    model: str,
    min_confidence: float | None,
    iou_threshold: float | None,
    max_detections: int | None,
    labels: list[str] | None,
    masks: bool = False,
    mask_form: str = "",
) -> DetectOptions:
    """The options of a detection as the command line has them; to name a form of masks is to want them."""
    return {
        "model": model,
        "min_confidence": min_confidence,
        "iou_threshold": iou_threshold,
        "max_detections": max_detections,
        "labels": labels or [],
        "masks": masks or bool(mask_form),
        "mask_form": mask_form,
    }


def text_options(
    model: str, max_new_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None
) -> TextOptions:
    """The options of an answer as the command line has them."""
    return {
        "model": model,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[bold]{task.fields[speed]}"),
        console=err,
        transient=True,
    )


def _tell_frame(progress: Progress, name: str, result: FrameResult, json: bool) -> None:
    if json:
        print_json({"image": name, **as_json(result)})
    elif result.error is not None:
        progress.console.print(f"[red]{name}: {result.error}[/]", markup=True)
