"""Starts the vision server: `python -m vision_server`."""

from __future__ import annotations

import os
import sys

from serving.process import run
from serving.settings import ServingSettings, describe, read
from vision_server.network import set_environment
from vision_server.service import VisionServer
from vision_server.settings import VisionSettings
from vision_server.weights import is_local_describer


def main() -> int:
    """Serves until it is told to stop; returns the exit code."""
    settings, serving = read(VisionSettings), read(ServingSettings)
    folders = (settings.model_dir, settings.prefetched_dir)
    local = all(is_local_describer(name, *folders) for name in settings.local_describers)
    set_environment(
        settings.data_dir,
        fetch_describer=not (settings.offline or local),
        hf_token=settings.hf_token.get_secret_value(),
    )
    shown = {**describe(settings), **describe(serving)}
    return run(lambda: VisionServer(settings, serving.max_message_bytes), serving, settings.port, shown)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would wait for a thread that still reads weights, minutes for a large model; all that matters has been stopped.
    os._exit(exit_code)
