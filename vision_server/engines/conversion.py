"""Turns a .pt file into what another engine reads, through Ultralytics' exporter."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from vision_server import torchvision_ops
from vision_server.engines.choose import OPENVINO_ENDING

ENDINGS = {"openvino": OPENVINO_ENDING, "onnx": ".onnx", "engine": ".engine"}
"""How the file or folder is called that each kind of export makes."""


class ConversionFailed(Exception):
    """The exporter could not do it; the text says why."""


def convert(
    weights: Path,
    target: Path,
    form: str,
    *,
    side_px: int = 0,
    half: bool = False,
    max_batch: int = 1,
    device: str = "cpu",
) -> Path:
    """Exports `weights` as `form` (openvino, onnx, engine) and puts the result at `target`, whole or not at all.

    `side_px` 0: the square that the model was trained at. `half`: weights of 16 bits. An openvino export takes this square and
    single images, for that is the fastest on a CPU; onnx takes any square and any batch, an engine batches up to `max_batch`.
    Raises ConversionFailed.
    """
    torchvision_ops.install()
    from ultralytics import YOLO

    target.parent.mkdir(parents=True, exist_ok=True)
    # Ultralytics writes beside the .pt file: it gets a folder where nobody looks, on the disk where the result will lie.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting-") as folder:
        source = Path(folder) / "model.pt"
        source.symlink_to(weights.resolve())
        wanted: dict[str, Any] = {"format": form, "device": _exporter_device(device), "verbose": False}
        if side_px:
            wanted["imgsz"] = side_px
        if half:
            wanted["quantize"] = 16
        if form != "openvino":
            wanted["dynamic"] = True
        if form == "onnx":
            wanted["simplify"] = False  # gains nothing (10.4 and 10.5 ms) and takes longer than all the rest
        if form == "engine":
            wanted["batch"] = max_batch
        try:
            with warnings.catch_warnings():
                # Shapes are fixed or told to the exporter: what the tracer takes for constants are constants.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
                made = Path(YOLO(str(source)).export(**wanted))
        except Exception as error:
            raise ConversionFailed(f"{weights.name} could not be exported to {form}: {error}") from error
        _put(made, target)
    return target


def _exporter_device(device: str) -> str:
    """`cuda:1` in the exporter's words."""
    return device.partition(":")[2] or "0" if device.startswith("cuda") else device


def _put(made: Path, target: Path) -> None:
    """Moves the result into its place; another process may be doing the same."""
    if made.is_dir() and target.exists():
        shutil.rmtree(target, ignore_errors=True)  # a folder cannot replace another in one step
    try:
        made.replace(target)
    except OSError:
        if not target.exists():
            raise
        # The other was quicker; what it made is as good.
