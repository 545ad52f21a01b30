"""What computes a detector's numbers: one face for PyTorch, OpenVINO, ONNX Runtime and TensorRT.

On a CPU they agree: the same objects, places within 0.01 px, confidences within 0.0001 (tests/vision_server/test_engines.py).
"""

from __future__ import annotations

from pathlib import Path

from serving.logs import get_logger
from vision_server.engines.choose import choose_engine
from vision_server.engines.engine import Engine, EngineOptions, Numbers, Traits

__all__ = ["Engine", "EngineOptions", "Numbers", "Traits", "open_engine"]

_log = get_logger("engines")


def open_engine(path: Path, engine: str, options: EngineOptions) -> Engine:
    """Reads the weights and makes them ready to compute; `engine` is the operator's wish, `auto` or a name.

    Blocks, for a second or more where the weights are converted. Raises NoEngine when that engine cannot read this file, else
    whatever is wrong with the weights.
    """
    name = choose_engine(path, engine, options.device)
    # Each is imported when it is wanted: a machine need not have them all.
    if name == "openvino":
        from vision_server.engines.conversion import ConversionFailed
        from vision_server.engines.openvino import OpenVinoEngine

        try:
            return OpenVinoEngine(path, options)
        except ConversionFailed as error:
            if engine != "auto":
                raise
            _log.warning("PyTorch serves what could not be converted for OpenVINO", file=path.name, reason=str(error))
            name = "pytorch"
    if name == "onnxruntime":
        from vision_server.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, options)
    if name == "pytorch" and path.suffix == ".pt":
        from vision_server.engines.pytorch import PyTorchEngine

        return PyTorchEngine(path, options)
    from vision_server.engines.autobackend import AutoBackendEngine

    return AutoBackendEngine(path, name, options)
