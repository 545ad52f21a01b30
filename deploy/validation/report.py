"""What the person at the terminal, or a program, is told of the checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.validation.findings import Outcome


@dataclass(frozen=True)
class Line:
    """One check that has ended, or could not run."""

    name: str
    title: str
    outcome: Outcome
    seconds: float
    missing: str = ""  # the tool that is not there, and the cure

    @property
    def state(self) -> str:
        """In one word."""
        if self.missing:
            return "could not run"
        if self.outcome.findings:
            return "failed"
        return "left out" if self.outcome.left_out else "right"


_MARKS = {"right": "[green]✓[/]", "failed": "[red]✗[/]", "could not run": "[red]✗[/]", "left out": "[yellow]–[/]"}


def exit_code(lines: Sequence[Line]) -> int:
    """1: a check failed; 2: none did, but one could not run; 0: all is right."""
    states = {line.state for line in lines}
    return 1 if "failed" in states else 2 if "could not run" in states else 0


def tell(console: Console, line: Line) -> None:
    """One check, as soon as it has ended: where what is wrong, and the cure."""
    more = line.outcome.note or line.outcome.left_out
    console.print(
        f"{_MARKS[line.state]} {line.title} [dim]{line.seconds:.1f} s[/]" + (f"  {escape(more)}" if more else "")
    )
    if line.missing:
        console.print(f"    {escape(line.missing)}")
    for finding in line.outcome.findings:
        console.print(f"    [bold]{escape(finding.place)}[/] {escape(finding.wrong)}")
        console.print(f"      [dim]→[/] {escape(finding.cure)}")


def summarize(console: Console, lines: Sequence[Line]) -> None:
    """The table at the end."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "check", "result", "found", "seconds"):
        table.add_column(heading, justify="right" if heading in ("found", "seconds") else "left")
    for line in lines:
        found = str(len(line.outcome.findings)) if line.outcome.findings else ""
        table.add_row(_MARKS[line.state], line.name, line.state, found, f"{line.seconds:.1f}")
    console.print()
    console.print(table)
    console.print()
    failed = [line.name for line in lines if line.state == "failed"]
    missing = [line.name for line in lines if line.state == "could not run"]
    left_out = [line.name for line in lines if line.state == "left out"]
    if failed:
        console.print(f"[red]Failed: {', '.join(failed)}.[/] One alone: ./validate-docker.sh --only {failed[0]}")
    if missing:
        console.print(f"[red]Could not run: {', '.join(missing)}.[/]")
    if not failed and not missing:
        console.print("[green]All right.[/]" + (f" Left out: {', '.join(left_out)}." if left_out else ""))


def as_json(lines: Sequence[Line]) -> str:
    """The same for programs."""
    checks = [
        {
            "name": line.name,
            "state": line.state,
            "seconds": round(line.seconds, 2),
            "note": line.outcome.note,
            "left_out": line.outcome.left_out,
            "missing": line.missing,
            "findings": [asdict(finding) for finding in line.outcome.findings],
        }
        for line in lines
    ]
    return json.dumps({"exit_code": exit_code(lines), "checks": checks}, ensure_ascii=False, indent=2)
