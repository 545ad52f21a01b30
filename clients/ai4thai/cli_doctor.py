"""The command that finds out what keeps the platform from working here: doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ai4thai.cli_options import QUEUE, VISION, AsJson, QueueAddress, VisionAddress
from ai4thai.cli_output import out, print_json
from ai4thai.doctor.examination import CHECKS, TIME_S, examine
from ai4thai.doctor.findings import Finding, Level, Situation
from ai4thai.stack import default_data_dir

_MARKS = {Level.OK: "[green]✓[/]", Level.NOTE: "[dim]–[/]", Level.WARNING: "[yellow]![/]", Level.FAILURE: "[red]✗[/]"}


def doctor(
    context: typer.Context,
    checks: Annotated[
        list[str] | None, typer.Argument(metavar="CHECK", help=f"Only these: {', '.join(CHECKS)}.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="AI4THAI_DATA_DIR", help="Jobs, logs, models. \\[default: the user's data directory]"),
    ] = None,
    min_free_gb: Annotated[float, typer.Option(min=0, help="Less free disk than this is a failure.")] = 2.0,
    time: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="What a check may take; they run side by side.")
    ] = TIME_S,
    json: AsJson = False,
    vision: VisionAddress = VISION,
    queue: QueueAddress = QUEUE,
) -> None:
    """Looks for what keeps the platform from working here, and says what to do; exits 1 when there is a ✗."""
    named = {name for name in ("vision", "queue") if _is_given(context, name)}
    if "vision" not in named and (address := os.environ.get("QUEUE_VISION_ADDRESS")):
        vision = address  # where a worker runs, its way to the vision server is the one that counts
        named.add("vision")
    situation = Situation(
        dict(os.environ),
        data_dir or default_data_dir(),
        vision,
        queue,
        int(min_free_gb * 1e9),
        frozenset(checks or ()),
        frozenset(named),
    )
    findings = examine(situation, checks or (), time_s=time)
    if json:
        for finding in findings:
            print_json(finding)
    else:
        _print(findings)
    if any(finding.level is Level.FAILURE for finding in findings):
        raise typer.Exit(1)


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether it was set, on the command line or by its variable."""
    source = context.get_parameter_source(option)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        cure = f"\n[dim]→[/] {escape(finding.cure)}" if finding.cure else ""
        table.add_row(_MARKS[finding.level], finding.check, escape(finding.found) + cure)
    out.print(table)
    failures = sum(finding.level is Level.FAILURE for finding in findings)
    warnings = sum(finding.level is Level.WARNING for finding in findings)
    out.print(f"\n{failures} to mend, {warnings} to look at." if failures or warnings else "\nAll is well.")
