"""The command `bench`: puts a load on a vision server and shows what became of it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ai4thai.bench import Arrivals, Bench, Load
from ai4thai.bench_results import Failure, LoadProgress, LoadReport
from ai4thai.cli_options import VISION, AsJson, Detector, VisionAddress
from ai4thai.cli_output import err, out, plain_table, print_json, print_note
from ai4thai.frames import IMAGE_SUFFIXES

_SAMPLES = Path(__file__).parent / "samples"
_BUSY_RATIO = 0.8
"""From here on a generator of one thread is likely to be what limits the rate."""
_BAR_COLUMNS = 30


def bench(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, sent in turn. \\[default: the samples of this package]"),
    ] = None,
    callers: Annotated[int, typer.Option(min=1, help="Callers or streams at once, a connection each.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 10,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Send so many images a second, answered or not; latencies count from when each was due. "
            "\\[default: each caller sends when it has its last answer]",
        ),
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="With --rate: in even steps, or at random.")] = Arrivals.EVEN,
    max_outstanding: Annotated[
        int, typer.Option(min=1, help="With --rate: images on their way at once; what is due beyond is not sent.")
    ] = 1000,
    stream: Annotated[bool, typer.Option("--stream", help="Over streams instead of single calls.")] = False,
    in_flight: Annotated[int, typer.Option(min=1, help="With --stream: images of a stream on their way at once.")] = 4,
    drop_oldest: Annotated[
        bool, typer.Option("--drop-oldest", help="With --stream: later images push out those that wait.")
    ] = False,
    model: Detector = "",
    deadline: Annotated[float, typer.Option(metavar="SECONDS", min=0.01, help="Each call's deadline.")] = 30,
    warm_up: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Load before the measuring begins.")] = 1,
    json: AsJson = False,
    vision: VisionAddress = VISION,
) -> None:
    """Measures a vision server: images/s, latencies, errors, batches. Ctrl-C ends it early."""
    paths = images or sorted(path for path in _SAMPLES.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    load = Load(
        callers=callers,
        seconds=seconds,
        warm_up_s=warm_up,
        rate_per_s=rate,
        arrivals=arrivals,
        max_outstanding=max_outstanding,
        streams=stream,
        in_flight=in_flight,
        drop_oldest=drop_oldest,
        model=model,
        deadline_s=deadline,
    )
    contents = [path.read_bytes() for path in paths]
    report, interrupted = asyncio.run(_measure(vision, contents, load))
    if json:
        print_json({"address": vision, "load": load, "report": report})
    else:
        print_report(load, report)
    if interrupted:
        raise typer.Exit(130)
    if not report.answered_count:
        raise typer.Exit(1)


async def _measure(address: str, images: list[bytes], load: Load) -> tuple[LoadReport, bool]:
    """The report, and whether Ctrl-C ended it early."""
    with Progress(
        TextColumn("{task.fields[phase]}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("[bold]{task.fields[rate]}[/]  {task.fields[notes]}"),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as progress:
        task = progress.add_task("", total=load.warm_up_s + load.seconds, phase="connecting", rate="", notes="")

        def tell(moment: LoadProgress) -> None:
            failed = f", [red]{moment.failed_count:,} failed[/]" if moment.failed_count else ""
            progress.update(
                task,
                completed=moment.elapsed_s,
                phase="measuring" if moment.is_warm else "warming up",
                rate=f"{moment.images_per_s:,.1f} images/s",
                notes=f"{moment.outstanding_count:,} on their way{failed}",
            )

        running = Bench(address, images, load, tell)
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            running.stop()

        with suppress(NotImplementedError, RuntimeError):  # no such signals here, or not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        return await running.run(), interrupted


def print_report(load: Load, report: LoadReport) -> None:
    """A report for people."""
    who = f"{load.callers} {'streams' if load.streams else 'callers'}"
    how = f"{load.rate_per_s:g} images/s due, over {who}" if load.rate_per_s else who
    out.print(
        f"[bold]{report.images_per_s:,.1f} images/s[/]  [dim]{how}, {report.seconds:.1f} s, {report.sent_count:,} sent, "
        f"{report.answered_count:,} answered, {report.failed_count:,} failed, {report.dropped_count:,} dropped[/]\n",
        soft_wrap=True,
    )
    _print_latencies(report)
    if report.batch_images:
        images = {str(size): float(number) for size, number in report.batch_images.items()}
        _print_shares("batch size", "images", images, decimals=0)
        out.print(f"[dim]{report.mean_batch_size:.1f} images for each forward pass[/]\n")
    if report.answered_count:
        steps = report.steps
        named = {
            "decoding": steps.decode_ms,
            "waiting for the model": steps.queue_ms,
            "the model": steps.inference_ms,
            "post-processing": steps.postprocess_ms,
            "else in the server": steps.server_ms,
            "before and after": steps.outside_ms,
        }
        _print_shares("an image's time", "ms", named, decimals=2)
    _print_notes(load, report)


def _print_latencies(report: LoadReport) -> None:
    table = plain_table("latency (ms)", "images", "mean", "p50", "p90", "p99", "max")
    rows = [("answered", report.latency)] if report.answered_count else []
    rows += [(f"[red]{escape(_name(failure))}[/]", failure.latency) for failure in report.failures]
    for name, latency in rows:
        numbers = (latency.mean_ms, latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.max_ms)
        table.add_row(name, f"{latency.count:,}", *(f"{number:,.1f}" for number in numbers))
    out.print(table)
    for failure in report.failures:
        advice = "None of them was told when to come back."
        if failure.retry_delay_mean_s is not None and failure.retry_delay_min_s is not None:
            share = failure.retry_info_count / failure.latency.count
            advice = (
                f"{share:.0%} were told when to come back: after {failure.retry_delay_min_s:.2f} s at least, "
                f"{failure.retry_delay_mean_s:.2f} s in the mean."
            )
        out.print(f"[red]{escape(_name(failure))}[/] [dim]{escape(failure.message)} {advice}[/]", soft_wrap=True)
    out.print()


def _name(failure: Failure) -> str:
    """The code alone where the reason says no more."""
    return failure.code if failure.reason in ("", failure.code) else f"{failure.code} {failure.reason}"


def _print_shares(name: str, unit: str, parts: Mapping[str, float], *, decimals: int) -> None:
    whole = sum(parts.values()) or 1.0
    table = plain_table(name, unit, "share", "")
    for part, amount in parts.items():
        share = max(0.0, amount / whole)
        table.add_row(part, f"{amount:,.{decimals}f}", f"{share:.0%}", "█" * round(share * _BAR_COLUMNS))
    out.print(table)


def _print_notes(load: Load, report: LoadReport) -> None:
    if report.unsent_count:
        print_note(
            f"{report.unsent_count:,} images were due but not sent: {load.max_outstanding:,} were on their way already "
            "(--max-outstanding)."
        )
    if report.generator_cpu_ratio > _BUSY_RATIO:
        print_note(
            f"This program took {report.generator_cpu_ratio:.0%} of a core: it may be what limits the rate. "
            "Start several side by side, best on other machines."
        )
