"""Programs of the system that single tests need: where one is missing they are skipped, but never in CI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def needed(program: str | Path) -> str:
    """Where the program lies; without it the test that asks is skipped, and fails in CI, which promises all of them."""
    if found := shutil.which(program):
        return found
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{program} is missing")
    pytest.skip(f"{program} is not installed")
