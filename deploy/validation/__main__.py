"""The command line of `validate-docker.sh`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from deploy.validation import report
from deploy.validation.checks import CHECKS, Check
from deploy.validation.findings import Finding, Outcome, ToolMissing
from deploy.validation.tree import Options, Tree

_EPILOGUE = """\
exit codes:
  0  all is right (what was left out is said)
  1  a check failed: each finding says file:line, what is wrong, and the cure
  2  wrong usage, or a check could not run since a tool is missing

environment:
  VENV             the virtual environment with the tools (default: .venv, made by `make setup`)
  BUILD_ARGUMENTS  with --build: more arguments for the engine, such as
                   "--build-arg PYTHON_IMAGE=registry.example/python:3.11-slim-bookworm"
  BUILD_TARGETS    with --build: the targets to build (default: all that are in the Dockerfile)
  ACCELERATOR      with --build: gpu or cpu (default: cpu, which can be started on any machine)

checks:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; the exit code says what came of them."""
    asked = _parser().parse_args(arguments)
    options = Options(offline=asked.offline, build=asked.build)
    checks = [check for check in CHECKS if check.name in asked.only] if asked.only else list(CHECKS)
    if not asked.build and "build" not in asked.only:
        checks = [check for check in checks if check.name != "build"]
    tree = Tree(Path.cwd())
    console = Console(highlight=False, soft_wrap=True)
    lines: list[report.Line] = []
    # As many at once as there are cores: most of a check is a program that it waits for. They are told in their order.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        early = [pool.submit(_run, check, tree, options) for check in checks if check.name != "build"]
        for ended in early:
            lines.append(ended.result())
            if not asked.json:
                report.tell(console, lines[-1])
    for check in checks:
        if check.name == "build":  # alone, since it takes minutes of all cores
            lines.append(_run(check, tree, options))
            if not asked.json:
                report.tell(console, lines[-1])
    if asked.json:
        print(report.as_json(lines))
    else:
        report.summarize(console, lines)
    return report.exit_code(lines)


def _run(check: Check, tree: Tree, options: Options) -> report.Line:
    begun = time.monotonic()
    try:
        outcome, missing = check.run(tree, options), ""
    except ToolMissing as error:
        outcome, missing = Outcome(), str(error)
    except (
        Exception
    ) as error:  # a check that breaks must not look like one that found nothing, nor keep the others from running
        wrong = f"the check itself broke: {type(error).__name__}: {error}"
        cure = f"Mend deploy/validation, or what it could not read; ./validate-docker.sh --only {check.name} runs it alone."
        outcome, missing = Outcome((Finding("deploy/validation", 0, wrong, cure),)), ""
    return report.Line(check.name, check.title, outcome, time.monotonic() - begun, missing)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {check.name:<11} {check.title}" for check in CHECKS)
    parser = argparse.ArgumentParser(
        prog="./validate-docker.sh",
        description="Checks all that delivers this project: images, compose, locks, pipeline, manifests, scripts, secrets.",
        epilog=_EPILOGUE + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--build", action="store_true", help="also build every image, start it, and ask its health (minutes)"
    )
    names = [check.name for check in CHECKS]
    says = "this check alone; may be said several times"
    parser.add_argument("--only", action="append", default=[], metavar="NAME", choices=names, help=says)
    parser.add_argument("--offline", action="store_true", help="leave out what asks a package index")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
