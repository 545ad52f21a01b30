"""Asks `ai4thai doctor` in an environment of its own, and reads what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ai4thai.cli import app
from typer.testing import CliRunner

TOKEN = "hf_NeverShownAnywhere"
OURS = (
    "AI4THAI_",
    "VISION_",
    "QUEUE_",
    "REDIS_",
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "CUDA_",
    "SERVING_",
    "CONTAINER_",
)


class Told:
    """What the doctor said, by its JSON."""

    def __init__(self, exit_code: int, output: str) -> None:
        self.exit_code = exit_code
        self.output = output
        self.findings: list[dict[str, str]] = [json.loads(line) for line in output.splitlines()]

    def one(self, check: str, words: str) -> dict[str, str]:
        """The finding of this check with these words."""
        found = [one for one in self.findings if one["check"] == check and words in one["found"]]
        assert len(found) == 1, self.output
        return found[0]

    def failure(self, check: str, words: str, cure: str) -> None:
        """Asserts that it is a ✗ with this cure, and the exit code says so."""
        found = self.one(check, words)
        assert found["level"] == "failure" and cure in found["cure"], found
        assert self.exit_code == 1

    def warning(self, check: str, words: str, cure: str) -> None:
        """Asserts that it is a ! with this cure."""
        found = self.one(check, words)
        assert found["level"] == "warning" and cure in found["cure"], found

    def ok(self, check: str, words: str) -> None:
        """Asserts that it is nothing to worry about."""
        assert self.one(check, words)["level"] in ("ok", "note"), self.output


Ask = Callable[..., Told]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Runs `ai4thai doctor CHECK… --json` with this environment and no other of ours."""
    for name in [name for name in os.environ if name.startswith(OURS) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    (tmp_path / "data").mkdir()

    def run(*arguments: str, **env: str) -> Told:
        defaults = {
            "AI4THAI_DATA_DIR": str(tmp_path / "data"),
            "HF_HOME": str(tmp_path / "hub"),
            "TMPDIR": str(tmp_path),
        }
        # More time than usual: the machine may be busy with other tests.
        result = CliRunner().invoke(app, ["doctor", "--json", "--time", "60", *arguments], env={**defaults, **env})
        assert result.exit_code in (0, 1), result.output
        assert TOKEN not in result.output and "s3cret" not in result.output
        return Told(result.exit_code, result.stdout)

    return run
