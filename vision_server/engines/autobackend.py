"""TensorRT, TorchScript, and whatever else Ultralytics can load, through its own loader."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vision_server import torchvision_ops
from vision_server.engines.engine import EngineOptions, Numbers, Traits, buckets, fixed_side, round_up


class AutoBackendEngine:
    """One network behind one lock: such an engine has one place for its input and its numbers."""

    def __init__(self, path: Path, name: str, options: EngineOptions) -> None:
        torchvision_ops.install()
        from ultralytics.nn.autobackend import AutoBackend

        self._torch_device = torch.device(options.device)
        backend: Any = AutoBackend(str(path), device=self._torch_device, fp16=not options.on_cpu, verbose=False)
        backend.eval()
        self._backend = backend
        self.name = name or str(backend.format)
        told = dict(backend.metadata or {})
        self.traits = Traits.of({**told, "names": backend.names, "task": backend.task, "stride": backend.stride})
        if backend.metadata.get("dynamic"):
            # An engine of flexible size was built for batches up to the one that it was exported with.
            self.batch_sizes = buckets(options.max_batch)
            if self.name == "tensorrt":
                self.batch_sizes = tuple(size for size in self.batch_sizes if size <= backend.batch) or (1,)
            self.side_px = round_up(options.side_px or self.traits.side_px, self.traits.stride_px)
        else:
            self.batch_sizes = (int(backend.batch),)
            self.side_px = fixed_side(self.traits.side_px, options.side_px)
        self.precision = "fp16" if backend.fp16 else "fp32"
        self.device = str(backend.device)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        self.memory_bytes = sum(file.stat().st_size for file in files)
        self._turn = threading.Lock()

    @torch.inference_mode()
    def infer(self, batch: NDArray[np.uint8]) -> Numbers:
        """In turn with the other lanes."""
        with self._turn:
            pixels = torch.from_numpy(batch).to(self._torch_device)
            values = pixels.permute(0, 3, 1, 2).to(torch.float16 if self._backend.fp16 else torch.float32).div_(255)
            numbers = self._backend(values.contiguous())
            # Copied before the next caller's turn, for the loader hands out its own buffers.
            copies = [n.clone() for n in (numbers if isinstance(numbers, list | tuple) else [numbers])]
            if self._torch_device.type == "cuda":
                torch.cuda.synchronize(self._torch_device)
        return copies

    def close(self) -> None:
        """Frees the network."""
        self._backend = None
