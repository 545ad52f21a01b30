"""Shows what the platform can do: pictures through a stream, a question in two languages, jobs over pictures and a video."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from rich.markup import escape

from ai4thai.cli_job_output import job_line, print_tracks
from ai4thai.cli_output import err, in_words, out, plain_table
from ai4thai.cli_up import bring_up, stop_stack
from ai4thai.errors import ServerFault
from ai4thai.frames import IMAGE_SUFFIXES
from ai4thai.job_results import AnalyzeJobResult, Job, JobState, VideoJobResult
from ai4thai.queue_client import QueueClient
from ai4thai.stack import Ports, Stack
from ai4thai.vision_client import VisionClient

SAMPLES: Final = Path(__file__).parent / "samples"
CLIP: Final = SAMPLES / "clip-01.mp4"
QUESTIONS: Final = (("English", "What is in the picture?"), ("ไทย", "ในภาพมีอะไรบ้าง"))


def run_demo(save: Path) -> None:
    """Starts a stack of its own on free ports, uses it, stops it.

    Raises:
        AI4ThaiError, PartEnded: something did not work; the processes' logs are then kept, and their place is told.
    """
    begun_s = time.monotonic()
    samples = sorted(path for path in SAMPLES.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    folder = Path(tempfile.mkdtemp(prefix="ai4thai-demo-"))
    stack = Stack(Ports.free(), folder, env={"SERVING_LOG_FORMAT": "console"})
    try:
        out.rule("[bold]AI4Thai demo[/]")
        bring_up(stack)
        with VisionClient(stack.vision_address) as vision, QueueClient(stack.queue_address) as queue:
            _show_stream(vision, samples)
            _show_questions(vision, samples[0])
            _show_job(queue, samples[:3])
            _show_video(queue, save.with_name(f"{save.stem}.mp4"))
            _save_picture(vision, samples[0], save)
    except BaseException:
        stop_stack(stack)
        err.print(f"[dim]What the processes logged is kept in {stack.log_dir}[/]", soft_wrap=True)
        raise
    if not stop_stack(stack):
        raise ServerFault(f"Not everything stopped cleanly. What the processes logged is kept in {stack.log_dir}")
    shutil.rmtree(folder, ignore_errors=True)
    _tell_how_to_go_on(samples[0], time.monotonic() - begun_s)


def _show_stream(vision: VisionClient, samples: list[Path]) -> None:
    _headline(f"{len(samples)} pictures through one stream")
    drawn = _what_was_drawn()
    table = plain_table("picture", "size (px)", "surest", "as drawn", "found")
    begun_s = time.monotonic()
    with vision.detect_stream(samples) as results:
        for sample, result in zip(samples, results, strict=True):
            found = result.detection
            if found is None:
                table.add_row(sample.name, "", "", "", f"[red]{escape(str(result.error))}[/]")
                continue
            labels = [item.label for item in found.detections]
            surest = f"{found.detections[0].confidence:.2f}" if labels else ""
            same = "[green]yes[/]" if in_words(labels) == in_words(drawn[sample.name]) else "[yellow]no[/]"
            table.add_row(sample.name, f"{found.width_px} x {found.height_px}", surest, same, in_words(labels))
        summary = results.summary
    elapsed_s = time.monotonic() - begun_s
    out.print(table)
    out.print(
        f"  [dim]{summary.detected_count} pictures in {elapsed_s:.2f} s: {len(samples) / elapsed_s:.1f} images/s[/]"
    )
    if summary.error_count:
        raise ServerFault(f"{summary.error_count} of the demo's own pictures could not be answered.")


def _what_was_drawn() -> dict[str, list[str]]:
    """The labels of the shapes in each sample, by its file's name: the truth, which the server is not told."""
    samples = json.loads((SAMPLES / "samples.json").read_text("utf-8"))["samples"]
    return {sample["file"]: [shape["label"] for shape in sample["shapes"]] for sample in samples}


def _show_questions(vision: VisionClient, sample: Path) -> None:
    _headline(f"Questions about {sample.name}, answered as the words come")
    for language, question in QUESTIONS:
        out.print(f"  [dim]{language:<8}[/] {question}")
        sys.stdout.write("           → ")
        with vision.ask(sample, question) as text:
            for piece in text:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            answer = text.summary
        out.print(
            f"           [dim]{answer.usage.completion_tokens} tokens, the first after "
            f"{answer.timings.time_to_first_token_ms:.0f} ms, the last after {answer.timings.total_ms:.0f} ms[/]"
        )


def _show_job(queue: QueueClient, samples: list[Path]) -> None:
    _headline(f"A job: {len(samples)} pictures, each with a question")

    def tell(change: Job) -> None:
        out.print(f"  {job_line(change)}", soft_wrap=True)

    job = queue.submit_analyze(samples, "How many shapes are there?", labels={"from": "demo"})
    job = queue.wait(job.job_id, timeout_s=300, on_change=tell)
    if job.state is not JobState.SUCCEEDED or not isinstance(job.result, AnalyzeJobResult):
        raise job.error or ServerFault(f"The demo's job ended {job.state}.")
    table = plain_table("picture", "How many shapes are there?", "found")
    for sample, item in zip(samples, job.result.items, strict=True):
        if item.analysis is None:
            raise item.error or ServerFault(f"The demo's job says nothing of {sample.name}.")
        labels = [found.label for found in item.analysis.detection.detections]
        table.add_row(sample.name, escape(item.analysis.text), in_words(labels))
    out.print(table)


def _show_video(queue: QueueClient, save: Path) -> None:
    _headline(f"A job: the objects of {CLIP.name}, followed")
    job = queue.wait(queue.submit_video(CLIP, annotate=True).job_id, timeout_s=300)
    result = job.outcome()
    if not isinstance(result, VideoJobResult) or not result.tracks:
        raise ServerFault("The demo's video job followed nothing.")
    print_tracks(result)
    save.parent.mkdir(parents=True, exist_ok=True)
    queue.download(result.annotated_media_id, save)
    out.print(f"  {save.resolve()}", soft_wrap=True)


def _save_picture(vision: VisionClient, sample: Path, save: Path) -> None:
    save.parent.mkdir(parents=True, exist_ok=True)
    vision.detect(sample, annotate=True).save(save)
    _headline("A picture with what was found drawn in")
    out.print(f"  {save.resolve()}", soft_wrap=True)


def _tell_how_to_go_on(sample: Path, took_s: float) -> None:
    _headline("How to go on")
    command = Path(sys.argv[0])
    name = str(command) if command.name == "ai4thai" else "ai4thai"
    out.print(f"  {name} up   [dim]# or make up: the same, to stay[/]")
    out.print("  [dim]then, in another terminal:[/]")
    shown = sample.relative_to(Path.cwd()) if sample.is_relative_to(Path.cwd()) else sample
    out.print(f"  {name} detect {shown} --save out.jpg", soft_wrap=True)
    out.print(f'  {name} ask {shown} "Is there a star?"', soft_wrap=True)
    out.print("  [dim]README.md has the same in Python, for grpcurl and for curl.[/]")
    out.print(f"\n[bold green]All of it worked[/], in {took_s:.1f} s.")


def _headline(text: str) -> None:
    out.print(f"\n[bold]{text}[/]")
