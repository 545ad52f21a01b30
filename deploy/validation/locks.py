"""That the lock files say what pyproject.toml pins, and that pip could still install them."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath

from deploy.validation import tools
from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree

SCRIPT = "requirements/lock.py"
_NOT_ASKED = 3  # the script's: nothing is wrong, but what lies at another index could not be asked for
_CURE = "Run `make lock`, look at what it changed, and commit it."


def check_fresh(tree: Tree, options: Options) -> Outcome:
    """`requirements/lock.py --check`: offline, and quick."""
    del options
    if not tree.exists(SCRIPT):
        return Outcome.of([Finding(SCRIPT, 0, "it is not there", f"Restore it: `git checkout {SCRIPT}`.")])
    done = tools.run([sys.executable, SCRIPT, "--check"], tree.root)
    locks = len(lock_names(tree))
    if done.returncode == 0:
        return Outcome(note=f"{locks} locks")
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    if "Traceback" in done.stderr:
        return Outcome.of([Finding(SCRIPT, 0, f"it broke: {lines[-1]}", "Run it by hand, and correct what it says.")])
    return Outcome.of(_finding(line) for line in lines)


def check_resolvable(tree: Tree, options: Options) -> Outcome:
    """pip's own dry run of each lock on this Python 3.11, hashes and all; minutes, most of them the index's."""
    if options.offline:
        return Outcome(left_out="it asks the package index, and --offline was said")
    names = lock_names(tree)
    probe = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--no-cache-dir"]
    done = tools.run([*probe, "--disable-pip-version-check", "pip"], tree.root)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        wrong = f"the package index cannot be reached, so that nobody knows whether {', '.join(names)} can be installed: {said}"
        cure = "Mend the network or PIP_INDEX_URL, or leave this check out: `./validate-docker.sh --offline`."
        return Outcome.of([Finding("requirements", 0, wrong, cure)])
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda name: tools.run([sys.executable, SCRIPT, "--resolve", name], tree.root), names))
    findings = [
        Finding(f"requirements/{name}.txt", 0, " ".join((answer.stderr or answer.stdout).split())[-1000:], _CURE)
        for name, answer in zip(names, answers, strict=True)
        if answer.returncode not in (0, _NOT_ASKED)
    ]
    unasked = dict.fromkeys(
        line for answer in answers for line in answer.stdout.splitlines() if line.startswith("not asked: ")
    )
    note = "; ".join([f"{', '.join(names)}: pip would install each", *unasked])
    return replace(Outcome.of(findings, note=note), left_out="; ".join(unasked))


def lock_names(tree: Tree) -> list[str]:
    """The sets that are locked, by their sources."""
    paths = map(PurePosixPath, tree.sources)
    return sorted(path.stem for path in paths if path.parent.name == "requirements" and path.suffix == ".in")


def _finding(line: str) -> Finding:
    """A line of lock.py's: the file's name first, what is wrong behind it, the cure at the end."""
    line, _, cure = line.partition(" Cure: ")
    cure = f"{cure[0].upper()}{cure[1:]}." if cure else _CURE
    found = re.match(r"(?P<path>[\w./-]+\.(?:in|txt|md|toml))(?::(?P<line>\d+))?:?\s+(?P<wrong>.*)", line)
    if not found:
        return Finding("requirements", 0, line, cure)
    path = (
        found["path"] if "/" in found["path"] or found["path"] == "pyproject.toml" else f"requirements/{found['path']}"
    )
    return Finding(path, int(found["line"] or 0), found["wrong"], cure)
