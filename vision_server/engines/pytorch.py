"""PyTorch: any .pt file as it is; on a GPU in half precision, each batch size as one recorded CUDA graph."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.logs import get_logger
from vision_server import torchvision_ops
from vision_server.engines.engine import EngineOptions, Numbers, Traits, buckets, round_up

_log = get_logger("engines")

# torch's own advice: let allocations settle before a graph is recorded.
_RUNS_BEFORE_RECORDING = 3


@dataclass(frozen=True)
class _Recorded:
    """A forward pass for one batch size: fill `pixels`, replay, read `numbers`. `kept` is memory that the graph reads too."""

    graph: torch.cuda.CUDAGraph
    pixels: torch.Tensor
    numbers: list[torch.Tensor]
    kept: list[torch.Tensor]


class PyTorchEngine:
    """The fused network, its numbers laid out channels last.

    On the CPU batches are of one: larger ones help only the smallest models (0.5 million parameters at 320 px: 17, 13 and 12 ms
    an image in batches of 1, 4 and 8; yolo11n at 640 px: 116, 124 and 142), and one by one no image can change another's result.
    On a GPU kernels' launches take longer than the kernels of a small batch: a recorded graph is one launch.
    """

    name = "pytorch"

    def __init__(self, path: Path, options: EngineOptions) -> None:
        torchvision_ops.install()
        from ultralytics.nn.autobackend import AutoBackend

        self._torch_device = torch.device(options.device)
        self._on_cpu = options.on_cpu
        if self._on_cpu:
            torch.set_num_threads(options.threads)
        backend: Any = AutoBackend(
            str(path),
            device=self._torch_device,
            fp16=not self._on_cpu,
            fuse=True,
            verbose=False,
            channels_last=None if self._on_cpu else True,
        )
        self._network: Any = backend.model.eval()
        self.traits = _traits(backend)
        self.side_px = round_up(options.side_px or self.traits.side_px, self.traits.stride_px)
        self.batch_sizes = (1,) if self._on_cpu else buckets(options.max_batch)
        self.precision = "fp16" if backend.fp16 else "fp32"
        self._values = torch.float16 if backend.fp16 else torch.float32
        self.device = str(self._torch_device)
        self.memory_bytes = sum(t.numel() * t.element_size() for t in self._network.parameters())
        # One graph has one place for its input: lanes take turns on the GPU, and read their numbers side by side.
        self._turn = threading.Lock()
        self._recorded: dict[int, _Recorded] = {}
        self._records = self._torch_device.type == "cuda"
        # Only one graph runs at a time, and its numbers are copied at once: all may compute in the same memory.
        self._pool = torch.cuda.graph_pool_handle() if self._records else None
        self._stream = torch.cuda.Stream(self._torch_device) if self._records else None  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def infer(self, batch: NDArray[np.uint8]) -> Numbers:
        """On a GPU in turn with the other lanes, whose numbers are copies that stay as they are."""
        pixels = torch.from_numpy(batch)
        if self._stream is None:
            return self._forward(pixels.to(self._torch_device))
        with self._turn, torch.cuda.device(self._torch_device), torch.cuda.stream(self._stream):
            recorded = self._recorded.get(len(batch)) or self._record(pixels)
            if recorded is None:
                numbers = self._forward(pixels.to(self._torch_device))
            else:
                recorded.pixels.copy_(pixels)
                recorded.graph.replay()
                numbers = [values.clone() for values in recorded.numbers]
            self._stream.synchronize()  # the numbers are read on another stream
        return numbers

    def close(self) -> None:
        """Frees the network and its recorded graphs."""
        self._recorded.clear()
        self._network = None

    def _forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        # n × side × side × 3 seen as n × 3 × side × side is channels last already: no copy but the cast's.
        return _flat(self._network(pixels.permute(0, 3, 1, 2).to(self._values).div_(255)))

    def _record(self, example: torch.Tensor) -> _Recorded | None:
        """Records the forward pass for batches of the example's size; None when this network cannot be recorded."""
        if not self._records:
            return None
        pixels = example.to(self._torch_device)
        try:
            for _ in range(_RUNS_BEFORE_RECORDING):
                self._forward(pixels)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are watched meanwhile: others may be serving other models on this GPU.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                numbers = self._forward(pixels)
        except RuntimeError as error:
            self._records = False
            _log.warning("this model runs without CUDA graphs", batch_size=len(example), reason=str(error))
            return None
        # The head keeps its anchors for the last shape it saw, as plain attributes: the next size's would free these.
        kept = [value for part in self._network.modules() for value in vars(part).values() if torch.is_tensor(value)]
        self._recorded[len(example)] = _Recorded(graph, pixels, numbers, kept)
        return self._recorded[len(example)]


def _flat(numbers: Any) -> list[torch.Tensor]:
    """[rows] or [rows, prototypes]: a network beside its rows gives the maps that it is trained by."""
    first = numbers[0] if isinstance(numbers, list | tuple) else numbers
    return list(first) if isinstance(first, list | tuple) else [first]


def _traits(backend: Any) -> Traits:
    network = backend.model
    arguments: Any = getattr(network, "args", None) or {}
    return Traits.of(
        {
            "task": getattr(network, "task", None),
            "names": backend.names,
            "imgsz": arguments.get("imgsz") if isinstance(arguments, dict) else getattr(arguments, "imgsz", None),
            "stride": backend.stride,
            "end2end": backend.end2end,
            "kpt_shape": getattr(backend, "kpt_shape", None),
            "kpt_names": getattr(network, "kpt_names", None),
        }
    )
