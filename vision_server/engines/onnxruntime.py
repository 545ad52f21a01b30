"""ONNX Runtime: .onnx files, on the CPU or where its build has the provider on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.logs import get_logger
from vision_server.engines.engine import EngineOptions, Numbers, Traits, buckets, fixed_side, round_up

_log = get_logger("engines")

_ERRORS_ONLY = 3


class OnnxRuntimeEngine:
    """One session for all lanes: it computes in the thread that calls it, so that lanes stay out of each other's way."""

    name = "onnxruntime"

    def __init__(self, path: Path, options: EngineOptions) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = _ERRORS_ONLY
        # Its threads would otherwise burn a core while they wait for the next image.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if not options.on_cpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            number = int(options.device.partition(":")[2] or 0)
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
        self._session: Any = onnxruntime.InferenceSession(str(path), settings, providers=providers)
        on_cuda = "CUDAExecutionProvider" in self._session.get_providers()
        if not options.on_cpu and not on_cuda:
            _log.warning("this ONNX Runtime has no CUDA provider; the model computes on the CPU", file=path.name)
        self.device = options.device if on_cuda else "cpu"
        taken = self._session.get_inputs()[0]
        self._input_name = taken.name
        self._values: Any = np.float16 if "float16" in taken.type else np.float32
        self.traits = Traits.of(self._session.get_modelmeta().custom_metadata_map)
        self.precision = "fp16" if self.traits.half else "fp32"
        batch, _, side, _ = taken.shape  # a number where it is fixed, a name where it is not
        if isinstance(side, int):
            self.side_px = fixed_side(side, options.side_px)
        else:
            self.side_px = round_up(options.side_px or self.traits.side_px, self.traits.stride_px)
        if isinstance(batch, int):
            self.batch_sizes: tuple[int, ...] = (batch,)
        else:
            # On a CPU batches gain nothing: 10.6, 10.5 and 10.7 ms an image in batches of 1, 4 and 8.
            self.batch_sizes = buckets(options.max_batch) if on_cuda else (1,)
        self.memory_bytes = path.stat().st_size

    def infer(self, batch: NDArray[np.uint8]) -> Numbers:
        """In the thread that calls."""
        planes = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))  # turned as bytes: a quarter of the memory to move
        values = np.divide(planes, self._values(255), dtype=self._values)
        numbers: list[Any] = self._session.run(None, {self._input_name: values})
        return numbers

    def close(self) -> None:
        """Frees the session."""
        self._session = None
