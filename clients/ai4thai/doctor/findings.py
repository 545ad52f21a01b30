"""What a check is given and what it answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

DEFAULT_SECRETS_DIR: Final = Path("/run/secrets")


class Level(StrEnum):
    """How good or bad a finding is; only a FAILURE makes `ai4thai doctor` exit with 1."""

    OK = "ok"
    NOTE = "note"
    """Not looked at, or not there, and that is nothing to worry about."""
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, with its value, and (but for OK and NOTE) what to do."""

    check: str
    level: Level
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Situation:
    """What the checks are to look at; `env` is the environment, the options of the command are the other fields."""

    env: Mapping[str, str]
    data_dir: Path
    vision: str
    """Where the vision server is: `host:port`, `grpcs://host:port`."""
    queue: str
    min_free_bytes: int
    """Less free disk than this is a failure."""
    asked: frozenset[str] = frozenset()
    """The checks that were asked for by name; empty: all of them, by none."""
    named: frozenset[str] = frozenset()
    """Of `vision` and `queue` those whose address was given, by an option or a variable, even if it is the default."""

    def port(self, name: str, default: int) -> int:
        """The port that a variable names; the default where it names none."""
        text = self.env.get(name, "")
        return int(text) if text.isdecimal() else default

    def says(self, name: str) -> bool:
        """Whether a variable is set to yes, as the settings and Hugging Face's libraries read it."""
        return self.env.get(name, "").strip().lower() in ("1", "true", "yes", "on")

    @property
    def secrets_dir(self) -> Path | None:
        """Where secrets lie as files; None: nowhere."""
        if named := self.env.get("AI4THAI_SECRETS_DIR"):
            return Path(named)
        return DEFAULT_SECRETS_DIR if os.access(DEFAULT_SECRETS_DIR, os.R_OK | os.X_OK) else None

    def secret(self, name: str) -> str:
        """A setting that may be secret, by its variable's name: from the environment, else from its file; empty: not set."""
        if name in self.env:
            return self.env[name]
        folder = self.secrets_dir
        try:
            return "" if folder is None else (folder / name.lower()).read_text("utf-8").strip()
        except (OSError, ValueError):  # the check of the secrets tells what is wrong with the file
            return ""


def gigabytes(count: float) -> str:
    """Bytes as people say them."""
    if count < 1e9:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB" if count < 100e9 else f"{count / 1e9:.0f} GB"
