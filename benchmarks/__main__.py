"""`make bench`: measures all that is short, prints it, writes benchmarks/results; `python -m benchmarks NAME…`: some of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import cold_start, describer, fairness, front, null_engine, overload, queue, throughput
from benchmarks.pages import RESULTS, Page, console
from benchmarks.processes import end_on_sigterm

# Each with the seconds that its rows take.
SHORT: dict[str, tuple[Callable[[float], Page], float]] = {
    "throughput": (throughput.measure, 3.0),
    "null_engine": (null_engine.measure, 1.5),
    "overload": (overload.measure, 8.0),
    "fairness": (fairness.measure, 8.0),
    "front": (front.measure, 0.0),
    "describer": (describer.measure, 0.0),
    "queue": (queue.measure, 2.0),
    "cold_start": (cold_start.measure, 0.0),
}


def main() -> None:
    """Runs the measures one after another; nothing else should run on the machine meanwhile."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones (default: all of {', '.join(SHORT)})")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write to")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(SHORT)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(SHORT)}")
    end_on_sigterm()
    missed = []
    for name in arguments.names or SHORT:
        measure, seconds = SHORT[name]
        page = measure(seconds)
        page.write(arguments.output)
        missed += [f"{name}: {goal}" for goal in page.missed]
    for goal in missed:
        console.print(f"[yellow]missed[/] {goal}")


if __name__ == "__main__":
    main()
