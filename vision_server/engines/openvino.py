"""OpenVINO: the fastest engine on a CPU; reads its own exports and ONNX, and .pt files by converting them once."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.logs import get_logger
from vision_server.engines.choose import OPENVINO_ENDING
from vision_server.engines.conversion import convert
from vision_server.engines.engine import EngineOptions, Numbers, Traits, fixed_side, round_up

_log = get_logger("engines")
_HASH_DIGITS = 16


@cache
def import_openvino() -> Any:
    """OpenVINO without its telemetry.

    At import already it would send an event to Google Analytics, from a process that it forks. It does without where its
    telemetry package is not installed; None in sys.modules says so to Python. Call this before anything imports openvino.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def _core() -> Any:
    return import_openvino().Core()


class OpenVinoEngine:
    """One stream of computation a lane, each on `threads` cores; shapes are fixed, and batches are of one.

    Batches gain nothing on a CPU (320 px, 0.5 million parameters: 9.2, 8.7 and 8.8 ms an image in batches of 1, 4 and 8;
    yolo11n at 640 px: 92, 96 and 97), and one by one no image can change another's result. A single stream over all cores
    would answer a lone caller little sooner (7.6 instead of 8.4 ms on two cores) and serve many slower.
    """

    name = "openvino"
    # The processor's own choice, bfloat16 where it has that, would leave the tolerance that engines agree within.
    precision = "fp32"
    device = "cpu"

    def __init__(self, path: Path, options: EngineOptions) -> None:
        if path.suffix == ".pt":
            network, told = _convert_once(path, options)
        else:
            network, told = _read(path)
        self.traits = Traits.of(told)
        shape = network.input(0).partial_shape
        batch, side = shape[0], shape[2]
        if side.is_static:
            self.side_px = fixed_side(side.get_length(), options.side_px)
        else:
            self.side_px = round_up(options.side_px or self.traits.side_px, self.traits.stride_px)
        self.batch_sizes = (batch.get_length() if batch.is_static else 1,)
        if shape.is_dynamic:
            network.reshape([self.batch_sizes[0], 3, self.side_px, self.side_px])
        self.memory_bytes = sum(
            op.get_byte_size() for op in network.get_ordered_ops() if op.get_type_name() == "Constant"
        )
        self._compiled = _core().compile_model(
            _taking_pixels(network),
            "CPU",
            {
                "NUM_STREAMS": options.lanes,
                "INFERENCE_NUM_THREADS": options.lanes * options.threads,
                "INFERENCE_PRECISION_HINT": "f32",
                # Several models in one process would be pinned to the same cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._own = threading.local()

    def infer(self, batch: NDArray[np.uint8]) -> Numbers:
        """On a stream of its own, through the buffers of the thread that calls."""
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compiled.create_infer_request()
        return list(request.infer([batch], share_inputs=True, share_outputs=True).values())

    def close(self) -> None:
        """Frees the network and all threads' buffers."""
        self._own = threading.local()
        self._compiled = None


def _taking_pixels(network: Any) -> Any:
    """The network with the cast, the turn and the division before it that would otherwise be numpy's work."""
    openvino = import_openvino()
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(network)
    taken = steps.input()
    taken.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    taken.model().set_layout(openvino.Layout("NCHW"))
    taken.preprocess().convert_element_type(openvino.Type.f32).scale(255.0)
    return steps.build()


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The network of an .onnx file or an exported folder, and what it tells of itself."""
    from ultralytics.nn.backends.base import BaseBackend

    file = path if path.is_file() else next(iter(sorted(path.glob("*.xml"))), None)
    if file is None:
        raise ValueError(f"there is no .xml file in the folder {path.name}")
    return _core().read_model(file), BaseBackend.read_metadata(path)


def _convert_once(path: Path, options: EngineOptions) -> tuple[Any, dict[str, Any]]:
    """A .pt file as OpenVINO's network: from the cache, or converted, which takes a second or two, and kept there.

    What decides over the result is in the name of the kept folder: the weights, the size, the programs. Of one model one
    conversion is kept.
    """
    import_openvino()
    if options.cache_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            return _read(convert(path, Path(folder) / f"model{OPENVINO_ENDING}", "openvino", side_px=options.side_px))
    programs = ", ".join(f"{package} {version(package)}" for package in ("openvino", "torch"))
    key = hashlib.sha256(f"{options.side_px} px, {programs}, {_ultralytics_version()}".encode())
    key.update(path.read_bytes())
    kept_dir = options.cache_dir / path.stem
    kept = kept_dir / f"{key.hexdigest()[:_HASH_DIGITS]}{OPENVINO_ENDING}"
    if kept.is_dir():
        try:
            return _read(kept)
        except Exception as error:
            _log.warning("a kept conversion cannot be read and is made again", folder=str(kept), reason=str(error))
    for old in kept_dir.glob(f"*{OPENVINO_ENDING}"):
        shutil.rmtree(old, ignore_errors=True)
    return _read(convert(path, kept, "openvino", side_px=options.side_px))


def _ultralytics_version() -> str:
    import ultralytics

    return str(ultralytics.__version__)
