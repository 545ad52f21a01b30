"""A page of results: what was measured, by which command, on what machine, whether the goals were reached."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.processes import end_on_sigterm

RESULTS = Path(__file__).resolve().parent / "results"
# Another program that takes more than this of a core has been measured too.
OUTSIDERS_LIMIT = 0.1
_PACKAGES = ("grpcio", "torch", "openvino", "onnxruntime", "ultralytics-opencv-headless")

console = Console(stderr=True, highlight=False)
"""What is being measured at the moment."""


class Page:
    """Grows a paragraph or a table at a time; `name` is its file's."""

    def __init__(self, name: str, title: str, command: str = "") -> None:
        self.name = name
        self._command = command or f"python -m benchmarks.{name}"
        self._parts = [f"# {title}", f"{_machine()}\n\n`{self._command}`"]
        self.missed: list[str] = []
        """The goals that were not reached."""
        self._outsiders = Outsiders()

    def head(self, title: str) -> None:
        """Begins a section."""
        self._parts.append(f"## {title}")

    def say(self, text: str) -> None:
        """Adds a paragraph."""
        self._parts.append(text)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Adds a table; numbers are written as given, so the caller rounds them."""
        lines = [_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)]
        self._parts.append("\n".join(lines))

    def goal(self, text: str, reached: bool) -> None:
        """Adds a goal and whether it was reached."""
        self._parts.append(f"Goal: {text}: {'reached' if reached else '**missed**'}.")
        if not reached:
            self.missed.append(text)

    @property
    def text(self) -> str:
        """The page in Markdown."""
        return "\n\n".join(self._parts) + "\n"

    def write(self, folder: Path) -> None:
        """Prints it and writes it to `folder`."""
        self._parts.insert(2, self._outsiders.sentence())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.md"
        path.write_text(self.text)
        print(self.text, flush=True)
        console.print(f"[dim]written to {path}[/]")


class Outsiders:
    """How many cores programs other than this one and its children take, from now on.

    On a machine that is shared a baseline can be slowed down and the server not, or the other way round: no ratio shows that.
    """

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._machine_s, self._own_s = _machine_cpu_s(), _own_cpu_s()

    def cores(self) -> float:
        """In the mean since the beginning; ask when the children have ended."""
        taken_s = (_machine_cpu_s() - self._machine_s) - (_own_cpu_s() - self._own_s)
        return max(0.0, taken_s / (time.perf_counter() - self._began_s))

    def sentence(self) -> str:
        """The same for people, with a warning where it spoils the figures."""
        cores = self.cores()
        text = f"Other programs took {cores:.2f} cores meanwhile."
        return (
            text
            if cores <= OUTSIDERS_LIMIT
            else f"**{text} The figures are not to be trusted: measure again on a quiet machine.**"
        )


def _machine_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run(measure: Callable[[float], Page], seconds: float) -> Page:
    """What `python -m benchmarks.NAME` does: measures and writes; `seconds` is for each row unless the caller says otherwise."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"for each row (default: {seconds:g})")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write to")
    arguments = parser.parse_args()
    end_on_sigterm()
    page = measure(arguments.seconds)
    page.write(arguments.output)
    return page


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    return f"{time.strftime('%Y-%m-%d')} · {_cpu()} · {cores} cores · Python {platform.python_version()} · {packages}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
