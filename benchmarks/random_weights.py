"""Weights of a YOLO model's shape that were never trained: as fast as trained ones, and found on every machine."""

from __future__ import annotations

from pathlib import Path


def make_weights(architecture: str, model_dir: Path) -> str:
    """Writes `ARCHITECTURE-random.pt` (`yolo11n`) into the model directory; returns the model's name.

    Call vision_server.network.set_environment first: Ultralytics is imported.
    """
    from vision_server import torchvision_ops

    torchvision_ops.install()
    from ultralytics import YOLO

    name = f"{architecture}-random"
    model_dir.mkdir(parents=True, exist_ok=True)
    YOLO(f"{architecture}.yaml", task="detect").save(str(model_dir / f"{name}.pt"))
    return name
