"""What all tests stand on."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    # A shell starts what runs in the background with Ctrl-C ignored, and so would be every process that the tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers of pytest-xdist come with a width of their own; what the command line prints is as wide as a test says.
    os.environ.pop("COLUMNS", None)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for what puts Unix sockets there: a socket's path may have 107 bytes, and `tmp_path` alone is nearly as long."""
    folder = tempfile.mkdtemp(prefix="d-", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder)
