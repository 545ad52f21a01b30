"""What every engine offers, and what a model tells about itself whichever engine computes it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[Any]
"""What a YOLO network gives for a batch: its rows and, of a segmenter, its prototypes; arrays on the CPU, or torch's tensors."""

_USUAL_SIDE_PX = 640
_USUAL_STRIDE_PX = 32


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is to compute.

    `lanes` threads call it side by side; each forward pass may use `threads` cores (CPU only). `side_px` 0: the square that
    the model was trained or exported at. `max_batch`: the largest batch worth preparing for. `cache_dir`: where converted
    weights are kept for the next start; None: nowhere.
    """

    device: str = "cpu"
    side_px: int = 0
    threads: int = 1
    lanes: int = 1
    max_batch: int = 8
    cache_dir: Path | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether no accelerator is asked for."""
        return self.device == "cpu"


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model tells of itself.

    `task` in Ultralytics' words (detect, segment, pose, classify, obb). `side_px` is the square it was trained or exported at.
    `end2end`: it suppresses overlaps itself. `kpt_shape` is (points, 2 or 3); empty without keypoints. `kpt_names` are those
    of the first class; empty when the model has none. `half`: it was exported to compute in 16 bits.
    """

    task: str
    names: tuple[str, ...]
    side_px: int = _USUAL_SIDE_PX
    stride_px: int = _USUAL_STRIDE_PX
    end2end: bool = False
    kpt_shape: tuple[int, ...] = ()
    kpt_names: tuple[str, ...] = ()
    half: bool = False

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Traits:
        """From Ultralytics' metadata: of an export (ONNX keeps them as strings), or the like gathered from a network.

        Raises ValueError when there are no class names: without them nothing could be answered.
        """
        names = _value(told.get("names"))
        if not names:
            raise ValueError("it has no class names; was it exported by Ultralytics?")
        side = _value(told.get("imgsz")) or _USUAL_SIDE_PX
        arguments = _value(told.get("args")) or {}
        point_names = _value(told.get("kpt_names")) or {}
        return cls(
            task=str(told.get("task") or "detect"),
            names=tuple(str(names[number]) for number in sorted(names)) if isinstance(names, dict) else tuple(names),
            side_px=int(max(side) if isinstance(side, list | tuple) else side),
            # Ultralytics' loader knows no stride below 32 either.
            stride_px=max(int(told.get("stride") or 0), _USUAL_STRIDE_PX),
            end2end=bool(_value(told.get("end2end")) or arguments.get("nms")),
            kpt_shape=tuple(int(number) for number in _value(told.get("kpt_shape")) or ()),
            kpt_names=tuple(str(name) for name in (point_names[min(point_names)] if point_names else ())),
            half=arguments.get("quantize") == 16,
        )


class Engine(Protocol):
    """A loaded network. infer() may be called from `lanes` threads at once."""

    @property
    def name(self) -> str:
        """pytorch, openvino, onnxruntime or tensorrt; for Ultralytics' other formats the format's name."""

    @property
    def traits(self) -> Traits:
        """What the model tells of itself."""

    @property
    def side_px(self) -> int:
        """The side of the square that it takes."""

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batches that it takes, the smallest first; others are to be filled up or split.

        (1,) promises results that no batch mate can change, not even in the last bit.
        """

    @property
    def precision(self) -> str:
        """In which it computes: fp32, fp16."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu`, `cuda:0`."""

    @property
    def memory_bytes(self) -> int:
        """What its weights take."""

    def infer(self, batch: NDArray[np.uint8]) -> Numbers:
        """One forward pass. `batch` is n × side × side × 3, RGB, contiguous, n one of batch_sizes.

        The numbers lie in the engine's memory: they hold until the same thread infers again.
        """

    def close(self) -> None:
        """Frees it, once nobody infers any more."""


def buckets(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4 … up to the first that holds `max_batch`: so few sizes that each can be prepared, and at most half is padding."""
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


def round_up(side_px: int, stride_px: int) -> int:
    """The least whole number of strides that holds the side."""
    return -(-side_px // stride_px) * stride_px


def fixed_side(exported_px: int, wanted_px: int) -> int:
    """The side of a network that takes no other. Raises ValueError when another is wanted."""
    if wanted_px and wanted_px != exported_px:
        raise ValueError(
            f"it was exported for {exported_px} px, and VISION_DETECTOR_INPUT_PX is {wanted_px}. Export it again with "
            f"--image-size {wanted_px}, or set VISION_DETECTOR_INPUT_PX=0"
        )
    return exported_px


def _value(told: Any) -> Any:
    """Metadata as it was written: a string in ONNX and TensorRT files holds a Python literal."""
    if not isinstance(told, str):
        return told
    try:
        return ast.literal_eval(told)
    except (ValueError, SyntaxError):
        return None
