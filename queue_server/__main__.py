"""Starts the queue server: `python -m queue_server`."""

from __future__ import annotations

import sys

from queue_server import __version__
from queue_server.service import QueueService
from queue_server.settings import QueueSettings
from serving.process import run
from serving.settings import ServingSettings, describe, read


def main() -> int:
    """Reads the settings, serves until a signal; the exit code."""
    serving, settings = read(ServingSettings), read(QueueSettings)
    return run(
        lambda: QueueService(settings, __version__), serving, settings.port, {**describe(settings), **describe(serving)}
    )


if __name__ == "__main__":
    sys.exit(main())
