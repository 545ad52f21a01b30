"""The project's files as the checks see them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# What tools leave behind: never part of the sources where git cannot be asked.
_LEFT_BEHIND = {".git", ".venv", "__pycache__", "node_modules", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


@dataclass(frozen=True)
class Options:
    """How the checks are to be run."""

    offline: bool = False  # nothing that needs a network
    build: bool = False


@dataclass(frozen=True)
class Tree:
    """A checkout of the project."""

    root: Path

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.root / name).is_file()

    def read(self, name: str) -> str:
        """The text of a file; one that is not there reads as empty, which the checks tell apart by `exists`."""
        return (self.root / name).read_text(encoding="utf-8") if self.exists(name) else ""

    def line_of(self, name: str, needle: str) -> int:
        """The first line that holds the text, 0 when none does."""
        return next((n for n, line in enumerate(self.read(name).splitlines(), 1) if needle in line), 0)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The files that git has or would take, by name; without git all but what tools leave behind."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=self.root, capture_output=True, text=True)
        if listed.returncode == 0 and Path(top.stdout.strip()) == self.root:
            names = {name for name in listed.stdout.split("\0") if name}
        else:
            names = {
                path.relative_to(self.root).as_posix()
                for path in self.root.rglob("*")
                if path.is_file() and not _LEFT_BEHIND & set(path.relative_to(self.root).parts)
            }
        return tuple(sorted(name for name in names if (self.root / name).is_file()))
