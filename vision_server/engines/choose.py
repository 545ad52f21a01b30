"""Picks the engine for a model's files: by what they are, what the operator wishes, and what this machine has."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

OPENVINO_ENDING = "_openvino_model"
ENDINGS = (".pt", OPENVINO_ENDING, ".onnx", ".engine", ".torchscript")
"""How the names of detectors end: what a model is exported to keeps its name before the ending, as Ultralytics has it."""

# (ending, engine), the best first. OpenVINO is the fastest on a CPU, and reads .pt files by converting them once.
_ON_CPU = (
    (OPENVINO_ENDING, "openvino"),
    (".pt", "openvino"),
    (".onnx", "openvino"),
    (".onnx", "onnxruntime"),
    (".pt", "pytorch"),
    (".torchscript", "pytorch"),
)
_ON_GPU = (
    (".engine", "tensorrt"),
    (".pt", "pytorch"),
    (".torchscript", "pytorch"),
    (".onnx", "onnxruntime"),
)
_EXPORTED_BY = {"openvino": "openvino", "onnxruntime": "onnx", "tensorrt": "engine"}
_MODULES = {"pytorch": "torch", "openvino": "openvino", "onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}


class NoEngine(Exception):
    """Nothing here reads these files as wished; the text names the cure."""


def choose_engine(path: Path, engine: str, device: str) -> str:
    """The engine for one file; "" for a file that only Ultralytics knows. Raises NoEngine."""
    return pick([path], engine, device)[1]


def pick(files: Sequence[Path], engine: str, device: str) -> tuple[Path, str]:
    """Of the files of one model the one to load, and the engine to load it with; `engine` is `auto` or a name.

    Raises NoEngine when none will do.
    """
    by_ending = {ending_of(file.name): file for file in reversed(files)}
    rules = _ON_CPU if device == "cpu" else _ON_GPU
    fitting = [(by_ending[ending], name) for ending, name in rules if ending in by_ending and engine in ("auto", name)]
    for file, name in fitting:
        if find_spec(_MODULES[name]) is not None:
            return file, name
    if engine == "auto" and "" in by_ending:
        return by_ending[""], ""
    raise NoEngine(_why_not(list(by_ending.values()), engine, device, [name for _, name in fitting]))


def ending_of(file_name: str) -> str:
    """The ending that tells what the file is; "" for any other."""
    return next((ending for ending in ENDINGS if file_name.endswith(ending) and file_name != ending), "")


def _why_not(files: Sequence[Path], engine: str, device: str, missing: Sequence[str]) -> str:
    here = ", ".join(file.name for file in files)
    name = files[0].name.removesuffix(ending_of(files[0].name))
    if missing:
        engines = " or ".join(dict.fromkeys(missing))
        return f"{here} is read by {engines}, which is not installed here: pip install {missing[0]}"
    other = _ON_GPU if device == "cpu" else _ON_CPU
    if engine == "auto":
        able = next(
            (known for ending, known in other if any(file.name.endswith(ending) for file in files)), "Ultralytics"
        )
        wanted = "an NVIDIA GPU" if device == "cpu" else "the CPU (VISION_DEVICE=cpu)"
        return f"{here} is for {able} on {wanted}, and the device is {device}; put {name}.pt beside it"
    if engine not in {known for _, known in (_ON_CPU if device == "cpu" else _ON_GPU)}:
        wanted = "needs an NVIDIA GPU" if device == "cpu" else "computes on the CPU: set VISION_DEVICE=cpu"
        return f"VISION_ENGINE is {engine}, which {wanted}; the device is {device}. Or set VISION_ENGINE=auto"
    cure = (
        f"Export it: ai4thai models export {name} --engine {_EXPORTED_BY[engine]}"
        if engine in _EXPORTED_BY
        else f"Put {name}.pt beside it"
    )
    return f"VISION_ENGINE is {engine}, which cannot read {here}. {cure}. Or set VISION_ENGINE=auto"
