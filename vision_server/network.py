"""Keeps Ultralytics, transformers and what they import off the network, unless the operator asked for it."""

from __future__ import annotations

import os
from pathlib import Path


def set_environment(data_dir: Path, *, fetch_describer: bool, hf_token: str = "") -> None:
    """Sets the variables that those packages read at import; to be called before any of them is imported.

    `fetch_describer`: a describer is to come from the Hugging Face hub, with `hf_token` where it asks who is there. Fetching a
    detector needs no such leave: that is a call of our own, which YOLO_OFFLINE does not stop.
    """
    caches = data_dir / "cache"
    caches.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("YOLO_CONFIG_DIR", str(caches))
    os.environ.setdefault("MPLCONFIGDIR", str(caches))
    # Ultralytics would look up public names to find out whether it is online, install packages, send telemetry, look for updates.
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_VERBOSE"] = "false"
    if not fetch_describer:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if hf_token:
        # Not HF_TOKEN_PATH, though it may have come from a file: the hub's package writes beside the file that this names.
        os.environ["HF_TOKEN"] = hf_token
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
