"""Keeps Ultralytics, transformers and what they import off the network, unless the operator asked for it."""

from __future__ import annotations

import os
from pathlib import Path


def set_environment(data_dir: Path, *, offline: bool) -> None:
    """Sets the variables that those packages read at import; to be called before any of them is imported."""
    caches = data_dir / "cache"
    caches.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("YOLO_CONFIG_DIR", str(caches))
    os.environ.setdefault("MPLCONFIGDIR", str(caches))
    # Ultralytics would install packages, send telemetry and look for updates.
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_VERBOSE"] = "false"
    if offline:
        os.environ["YOLO_OFFLINE"] = "true"
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
