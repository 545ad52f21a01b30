"""The safe way to a newer version, up to the point where people decide: what is there, and would it work here; see --help."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import lock
import pins
import upgrade_steps as steps
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NEXT = """Next, if you want it:
  1. {change}
  2. ./validate-docker.sh --build, make check, make test; commit pyproject.toml, requirements/ and docs/compatibility.md together
  3. The merge request's pipeline builds the images; deploy them to staging and run deploy/verify.sh there
  4. Watch staging for a day: errors, latencies, memory and queue depth (docs/operations.md names the alerts)
  5. Production by hand, one machine or a few pods first; the old images stay in the registry
  6. Roll back: the pipeline's rollback job, or deploy/rollback.sh (docs/operations.md)"""


@dataclass
class Summary:
    """Each step that was run, how it ended, and how long it took."""

    ran: list[tuple[str, str, str]] = field(default_factory=list)
    failed: bool = False
    unknown: bool = False

    def run(self, says: str, step: Callable[[], str]) -> bool:
        """Runs a step: it returns a text, or raises Failed or Unknown with one."""
        began = time.monotonic()
        try:
            mark, text = "✓", step()
        except steps.Failed as error:
            mark, text, self.failed = "✗", str(error), True
        except steps.Unknown as error:
            mark, text, self.unknown = "?", str(error), True
        self.ran.append((mark, says, text))
        print(f"{mark} {says} ({time.monotonic() - began:.0f} s)\n  " + text.replace("\n", "\n  "), flush=True)
        return mark == "✓"

    @property
    def code(self) -> int:
        """The exit code: 0 all right, 1 a step says no, 2 something could not be found out."""
        return 1 if self.failed else 2 if self.unknown else 0


def main() -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        description="Without a package: what is newer than each pin. With one: tries it in a copy of the tree.",
        epilog="Exit codes: 0 all right, 1 a step says no, 2 something could not be found out.",
    )
    parser.add_argument(
        "--package", default="", help="the package to try, pinned in pyproject.toml; 'all': every newer one"
    )
    parser.add_argument("--version", default="", help="the version to try (the newest if left out)")
    parser.add_argument(
        "--sets", default="", help="only these locks, with commas (default: every lock that has the package)"
    )
    parser.add_argument(
        "--install", action="store_true", help="install each lock in an environment of its own, run pip check"
    )
    parser.add_argument(
        "--tests", default="", help="install the lock `dev` and run these tests in the copy, e.g. tests/queue_server"
    )
    parser.add_argument("--validate", action="store_true", help="run ./validate-docker.sh in the copy")
    parser.add_argument(
        "--audit", action="store_true", help="ask PyPI for known holes (of the upgraded locks, or of ours)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the copy, and say where it is")
    parser.add_argument(
        "--torch-cpu-links", default=os.environ.get("TORCH_CPU_LINKS") or lock.TORCH_CPU_LINKS, help="see lock.py"
    )
    asked = parser.parse_args()
    try:
        named = [pins.named(name) for name in asked.sets.replace(",", " ").split()]
    except KeyError as error:
        parser.error(str(error.args[0]))
    scratch = Path(tempfile.mkdtemp(prefix="upgrade-check-"))
    summary = Summary()
    try:
        if not asked.package:
            return _look(named, asked.audit, scratch, summary)
        return _try(asked, named, scratch, summary)
    finally:
        if asked.keep:
            print(f"The copy is left in {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)


def _look(named: list[pins.Set], audit: bool, scratch: Path, summary: Summary) -> int:
    apart = steps.elsewhere(pins.ROOT)

    def step() -> str:
        found = steps.newest(pins.ROOT, named or list(pins.SETS), scratch)
        width = max((len(name) for name, _, _ in found), default=0)
        lines = [f"{name:<{width}}  {ours} → {theirs}" for name, ours, theirs in found]
        lines = lines or ["none: every pin is the newest release for Python 3.11"]
        return "\n".join(
            [*lines, *(f"not asked: {name} {ours}, see {pins.NVIDIA_INDEX}/{name}/" for name, ours in apart.items())]
        )

    summary.run("Newer versions than the pins in pyproject.toml", step)
    for one in (named or [pins.named("queue"), pins.named("vision-gpu")]) if audit else ():
        summary.run(f"Known holes in {one.name}", partial(steps.audited, pins.ROOT, one))
    print("\nTo try one: make upgrade-check PACKAGE=… VERSION=…")
    return summary.code


def _try(asked: argparse.Namespace, named: list[pins.Set], scratch: Path, summary: Summary) -> int:
    tree = steps.copied(pins.ROOT, scratch / "tree")
    wanted: list[tuple[str, str]] = []

    def repin() -> str:
        if asked.package != "all":
            steps.pinned(tree, asked.package)
        name = canonicalize_name(asked.package)
        if name in steps.elsewhere(pins.ROOT) and not asked.version:
            raise steps.Unknown(f"what is newer was not asked: say VERSION=…, one of {pins.NVIDIA_INDEX}/{name}/")
        if asked.package == "all" or not asked.version:
            for newer, _, theirs in steps.newest(pins.ROOT, named or list(pins.SETS), scratch):
                if asked.package == "all" or newer == name:
                    wanted.append((newer, theirs))
            if not wanted:
                raise steps.Unknown(f"there is nothing newer of {asked.package} that pyproject.toml pins")
        else:
            wanted.append((asked.package, asked.version))
        return "\n".join(f"{name} {steps.repinned(tree, name, version)} → {version}" for name, version in wanted)

    if not summary.run("The new pins, in a copy of the tree", repin):
        return summary.code
    packages = {canonicalize_name(name) for name, _ in wanted}
    affected = named or [
        one
        for one in pins.SETS
        if packages & {canonicalize_name(Requirement(line).name) for line in pins.direct(tree, one)}
    ]
    names = [one.name for one in affected]
    upgrade: list[str] = ["all"] if asked.package == "all" else [*sorted(packages)]
    good = summary.run(
        "pip-compile finds versions that fit together",
        lambda: steps.locked(tree, names, upgrade, asked.torch_cpu_links),
    )
    if good:
        summary.run("The new locks", lambda: steps.checked(tree, names))
        for one in affected:
            summary.run(f"pip would install {one.name}", partial(steps.resolved, tree, one.name, asked.torch_cpu_links))
    if good and asked.audit:
        for one in affected:
            summary.run(f"Known holes in {one.name}", partial(steps.audited, tree, one))
    if good and asked.install:
        for one in affected:
            summary.run(
                f"{one.name} installs",
                partial(steps.installed, tree, one, scratch / "environments" / one.name, asked.torch_cpu_links),
            )
    if good and asked.validate:
        summary.run("./validate-docker.sh in the copy", lambda: steps.validated(tree))
    if good and asked.tests:
        dev = scratch / "environments" / "dev"
        if dev.exists() or summary.run(
            "dev installs", lambda: steps.installed(tree, pins.named("dev"), dev, asked.torch_cpu_links)
        ):
            summary.run(f"pytest {asked.tests}", lambda: steps.tested(tree, dev, asked.tests.split()))
    _tell(summary, wanted)
    return summary.code


def _tell(summary: Summary, wanted: list[tuple[str, str]]) -> None:
    print("\n| | step |\n|---|---|")
    for mark, says, _ in summary.ran:
        print(f"| {mark} | {says} |")
    print("\nThe working tree is as it was.")
    if summary.code == 0:
        pinned = ", ".join(f"{name}=={version}" for name, version in wanted)
        print(NEXT.format(change=f"Pin {pinned} in pyproject.toml, then: make lock"))


if __name__ == "__main__":
    sys.exit(main())
