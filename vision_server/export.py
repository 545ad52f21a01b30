"""Exports a model for another engine: `python -m vision_server.export NAME --engine openvino|onnx|engine`.

What `ai4thai models export` runs. Lines on standard output tell what is being done, the last one what has become of it; what
Ultralytics has to say goes to standard error. The exit code is 1 when there is no export.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from serving.settings import read
from vision_server.detector import Detector
from vision_server.network import set_environment
from vision_server.settings import VisionSettings
from vision_server.weights import (
    SHIPPED,
    UnreadableWeights,
    WeightsMissing,
    detector_files,
    find_detector,
    model_name,
)

# What each kind of export needs beside Ultralytics, and the engine that reads it.
_PACKAGES = {"openvino": ("openvino",), "onnx": ("onnx",), "engine": ("onnx", "onnxslim", "tensorrt")}
_READ_BY = {"openvino": "openvino", "onnx": "onnxruntime", "engine": "tensorrt"}


class CannotExport(Exception):
    """This machine or this model does not allow it; the text says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports one model; returns the exit code."""
    asked = _arguments().parse_args(arguments)
    settings = read(VisionSettings)
    set_environment(settings.data_dir, fetch_describer=False)
    from vision_server.engines.conversion import ConversionFailed

    try:
        export(settings, asked.name, asked.engine, side_px=asked.image_size, half=asked.half)
    except (CannotExport, ConversionFailed, WeightsMissing, UnreadableWeights) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def export(settings: VisionSettings, name: str, form: str, *, side_px: int, half: bool) -> Path:
    """Converts the model's .pt file and puts the export into the model directory, where the server finds it.

    `form` is openvino, onnx or engine; `side_px` 0: the square that the model was trained at. The export has answered an
    example before it is called done. Raises CannotExport, ConversionFailed, WeightsMissing, UnreadableWeights.
    """
    began_s = time.perf_counter()
    device = _device(form)
    _require_packages(form)
    weights = _pickle(name, settings)
    _say(f"reading {weights.name}")
    # Imported late: with it come torch and Ultralytics, for which the environment must be set.
    from vision_server.engines.conversion import ENDINGS, convert

    if form == "openvino":
        from vision_server.engines.openvino import import_openvino

        import_openvino()
    target = settings.model_dir / f"{model_name(name)}{ENDINGS[form]}"
    _say(f"exporting to {target.name}" + (", which takes some minutes" if form == "engine" else ""))
    with redirect_stdout(sys.stderr):
        convert(weights, target, form, side_px=side_px, half=half, max_batch=settings.max_batch, device=device)
        detector = Detector(target, device, engine=_READ_BY[form], max_batch=settings.max_batch)
        card = detector.load()
        detector.warm_up()
        detector.close()
    _say(
        f"{target}: {_megabytes(target):.1f} MB for {card.input_size_px} px, read by {card.engine}; "
        f"made in {time.perf_counter() - began_s:.0f} s"
    )
    return target


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vision_server.export", description=__doc__)
    parser.add_argument("name", help="a shipped model, one of the model directory, or one that Ultralytics publishes")
    parser.add_argument("--engine", choices=sorted(_PACKAGES), required=True)
    parser.add_argument("--image-size", type=int, default=0, metavar="PX", help="side of the square; 0: as trained")
    parser.add_argument("--half", action="store_true", help="weights of 16 bits")
    return parser


def _device(form: str) -> str:
    """TensorRT builds an engine for the very GPU that it runs on; the others are exported on the CPU."""
    if form != "engine":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise CannotExport("A TensorRT engine is built on the NVIDIA GPU that is to run it, and there is none here.")
    return "cuda:0"


def _require_packages(form: str) -> None:
    missing = [package for package in _PACKAGES[form] if find_spec(package) is None]
    if missing:
        raise CannotExport(f"This export needs what is not installed here: pip install {' '.join(missing)}")


def _pickle(name: str, settings: VisionSettings) -> Path:
    """The .pt file to export."""
    stem = model_name(name)
    if stem in SHIPPED and SHIPPED[stem].is_dir():
        raise CannotExport(f"{stem} is a describer; only detectors are exported")
    files = detector_files(stem, settings.model_dir, settings.prefetched_dir)
    if files:
        pickles = [file for file in files if file.suffix == ".pt"]
        if not pickles:
            raise CannotExport(f"only .pt files are exported, and of {stem} there is {files[0].name} alone")
        return pickles[0]
    return find_detector(stem, settings.model_dir, offline=settings.offline)  # fetches it, or says that there is none


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
