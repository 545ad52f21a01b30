"""What .dockerignore keeps from the engine: how much smaller the build context gets, and that nothing private is in it."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import dockerfile
from docker.utils.build import PatternMatcher  # the engine's rules, `!` and `**` included

from deploy.validation.dockerfile_model import read_stages
from deploy.validation.findings import Finding, Outcome
from deploy.validation.tree import Options, Tree

FILE = ".dockerignore"
LEAST_REDUCTION = 0.60
# Twice what is needed: with .venv in the folder, anything else may be sent and is still a reduction by 60 %.
MOST_BYTES = 32_000_000
# Nothing of these is needed in an image. `*` stands for folders too.
_STAYS_OUT = (
    ".git/*", ".venv/*", "*/__pycache__/*", "*.pyc", ".mypy_cache/*", ".ruff_cache/*", ".pytest_cache/*", "tests/*",
    "benchmarks/*", ".env", ".env.*", "*/.env", "*/.env.*", "*.pem", "*.key", "*/id_rsa", "*.log", "*/node_modules/*",
    "*.egg-info/*", "secrets/*", "*redis-password*",
)  # fmt: skip


def check(tree: Tree, options: Options) -> Outcome:
    """Both bounds are of this folder as it lies, which the engine would be sent without the file; the note has a clone's too."""
    del options
    if not tree.exists(FILE):
        return Outcome.of(
            [
                Finding(
                    FILE,
                    0,
                    "it is not there: everything is sent to the engine",
                    "Restore it: `git checkout .dockerignore`.",
                )
            ]
        )
    before, sent = measure(tree.root, read_patterns(tree.read(FILE)))
    after = sum(sent.values())
    findings = [*_private_findings(sent), *_missing_findings(tree, sent)]
    reduction = 1 - after / before if before else 0.0
    if after > MOST_BYTES or reduction < LEAST_REDUCTION:
        largest = ", ".join(f"{name} {_mb(size)}" for name, size in _largest(sent))
        wrong = (
            f"{_mb(after)} of {_mb(before)} is sent to the engine; at most {_mb(MOST_BYTES)} should be, "
            f"and {LEAST_REDUCTION:.0%} less than all"
        )
        findings.append(Finding(FILE, 0, wrong, f"Leave out what no image needs. Most is in {largest}."))
    clone = sum((tree.root / name).stat().st_size for name in tree.sources) + _size_of(tree.root / ".git")
    note = f"{_mb(before)} → {_mb(after)}, −{reduction:.1%}"
    if clone:
        note += f"; of a fresh clone (its history is part of it): {_mb(clone)} → {_mb(after)}, −{max(0.0, 1 - after / clone):.0%}"
    return Outcome.of(findings, note)


def read_patterns(text: str) -> list[str]:
    """The patterns in their order, without comments."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def measure(root: Path, patterns: Sequence[str]) -> tuple[int, dict[str, int]]:
    """The bytes of all files, and the files that the engine is sent with their bytes."""
    # As the engine does it: these two are sent whatever the patterns say.
    matcher = PatternMatcher([*patterns, "!Dockerfile"])
    sent = {}
    for name in matcher.walk(str(root)):
        path = root / name
        if path.is_symlink() or path.is_file():
            sent[Path(name).as_posix()] = path.lstat().st_size
    return _size_of(root), sent


def _size_of(folder: Path) -> int:
    """The bytes of all files under a folder; 0 when it is not there."""
    size, folders = 0, [str(folder)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                try:
                    size += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # a cache's file that has gone meanwhile
                    continue
    return size


def _private_findings(sent: dict[str, int]) -> Iterator[Finding]:
    """One finding for each pattern, with the first file as its example."""
    for pattern in _STAYS_OUT:
        caught = [name for name in sent if fnmatch.fnmatchcase(name, pattern)]
        if caught:
            size = sum(sent[name] for name in caught)
            wrong = f"{caught[0]} is sent to the engine ({len(caught)} files like {pattern}, {_mb(size)})"
            yield Finding(
                FILE, 0, wrong, f"Leave it out: a line `{pattern.removesuffix('/*').replace('*/', '**/')}` at the end."
            )


def _missing_findings(tree: Tree, sent: dict[str, int]) -> Iterator[Finding]:
    """What the Dockerfile copies must be there."""
    try:
        stages = read_stages(tree.read("Dockerfile"))
    except dockerfile.GoParseError:
        return  # the Dockerfile's own check tells
    for stage in stages:
        for instruction in stage.own:
            if instruction.name not in ("COPY", "ADD") or instruction.flag("from") or "<<" in instruction.text:
                continue
            for source in instruction.words[:-1]:
                wanted = source.removeprefix("./").removeprefix("/").rstrip("/") or "."
                if wanted == "." or "://" in source or "$" in source:
                    continue
                if not any(
                    fnmatch.fnmatchcase(name, wanted) or fnmatch.fnmatchcase(name, f"{wanted}/*") for name in sent
                ):
                    wrong = f"{instruction.name} {source}: there is no such file in the context"
                    yield Finding(
                        "Dockerfile",
                        instruction.line,
                        wrong,
                        f"Let it in by `!{wanted}` in {FILE}, or copy something else.",
                    )


def _largest(sent: dict[str, int]) -> list[tuple[str, int]]:
    sizes: dict[str, int] = {}
    for name, size in sent.items():
        top = name.split("/", 1)[0]
        sizes[top] = sizes.get(top, 0) + size
    return sorted(sizes.items(), key=lambda item: -item[1])[:3]


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
