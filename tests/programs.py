"""What single tests need of the system: where it is missing they are skipped, but never in CI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def needed(program: str | Path) -> str:
    """Where the program lies; without it the test that asks is skipped, and fails in CI, which promises all of them."""
    return shutil.which(program) or missing(str(program))


def missing(what: str) -> NoReturn:
    """Ends the test that needs it."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is not installed")
