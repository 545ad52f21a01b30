"""One loaded detector: letterboxed images in, objects in the original's pixels out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_server.images import Image
from vision_server.letterbox import Fitted, crop, fit
from vision_server.requests import DetectOptions
from vision_server.results import Card, Found, Task
from vision_server.weights import short_hash

_TASKS = {
    "detect": Task.DETECT,
    "segment": Task.SEGMENT,
    "pose": Task.POSE,
    "classify": Task.CLASSIFY,
    "obb": Task.ORIENTED_BOXES,
}


class UnreadableWeights(Exception):
    """The file is there, but no model that can be served; the text says why."""


@dataclass(frozen=True, slots=True)
class DetectItem:
    """What one caller gives to the batch; `class_ids` None: all."""

    fitted: Fitted
    options: DetectOptions
    class_ids: tuple[int, ...] | None = None


class Detector:
    """Loads through Ultralytics' AutoBackend, then runs its own pre- and post-processing: predict() is made for one caller.

    load(), warm_up() and execute() block and are called off the loop; execute() from one thread at a time.
    """

    def __init__(self, path: Path, device: str, *, input_px: int, torch_threads: int) -> None:
        self._path = path
        self._device_name = device
        self._input_px = input_px
        self._torch_threads = torch_threads

    def load(self) -> Card:
        """Reads the weights. Raises whatever is wrong with them."""
        import torch

        from vision_server import torchvision_ops

        torchvision_ops.install()
        from ultralytics.nn.autobackend import AutoBackend

        from vision_server.readout import Readout

        self._torch, self._readout = torch, Readout
        self._device = torch.device(self._device_name)
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            torch.set_num_threads(self._torch_threads)
        try:
            backend: Any = AutoBackend(str(self._path), device=self._device, fp16=not on_cpu, fuse=True, verbose=False)
        except Exception as error:
            raise UnreadableWeights(
                f"{self._path.name} cannot be read as a YOLO model: {_first_words(error)}"
            ) from error
        backend.eval()
        # A .pt file becomes a network in this process; exported engines keep theirs to themselves.
        network: Any = backend.model if isinstance(getattr(backend, "model", None), torch.nn.Module) else None
        task = str(getattr(network, "task", None) or getattr(backend, "task", None) or "detect")
        if task not in _TASKS:
            raise UnreadableWeights(f"{self._path.name} is a model for {task!r}; served are {', '.join(_TASKS)}")
        if network is not None and on_cpu:
            network.to(memory_format=torch.channels_last)
        self._backend = backend
        self._half = bool(getattr(backend, "fp16", False))
        self.card = Card(
            version=short_hash(self._path),
            task=_TASKS[task],
            engine="pytorch" if self._path.suffix == ".pt" else self._path.suffix.lstrip(".") or self._path.name,
            precision="fp16" if self._half else "fp32",
            device=str(self._device),
            labels=tuple(str(backend.names[number]) for number in sorted(backend.names)),
            input_size_px=self._side_px(network),
            memory_bytes=sum(t.numel() * t.element_size() for t in network.parameters()) if network is not None else 0,
        )
        return self.card

    def warm_up(self) -> None:
        """Answers an example, alone and in a batch. Raises when it cannot."""
        side_px = self.card.input_size_px
        grey = Image(np.full((side_px, side_px, 3), 127, np.uint8), side_px, side_px)
        item = DetectItem(self.fit(grey), DetectOptions())
        for size in (1, 2):
            for outcome in self.execute([item] * size):
                if isinstance(outcome, Exception):
                    raise outcome

    def class_ids(self, labels: Sequence[str]) -> tuple[int, ...] | None:
        """The labels' numbers; None for no labels, which means all. Raises KeyError with a label that there is not."""
        if not labels:
            return None
        numbers = {label: number for number, label in enumerate(self.card.labels)}
        return tuple(numbers[label] for label in labels)

    def fit(self, image: Image) -> Fitted:
        """The image in the model's square; any thread may call it."""
        cut = crop if self.card.task is Task.CLASSIFY else fit
        return cut(image, self.card.input_size_px)

    def execute(self, items: Sequence[DetectItem]) -> list[Found | Exception]:
        """One forward pass for all items, then each item's own thresholds; an item that fails fails alone."""
        torch = self._torch
        began_s = time.perf_counter()
        with torch.inference_mode():
            stacked = torch.from_numpy(np.stack([item.fitted.rgb for item in items])).to(self._device)
            # n × side × side × 3 seen as n × 3 × side × side is channels_last already: no copy but the cast's.
            batch = stacked.permute(0, 3, 1, 2).to(torch.float16 if self._half else torch.float32).div_(255)
            numbers: Any = self._backend(batch)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # else the time would be counted where it is waited for
            inference_ms = (time.perf_counter() - began_s) * 1000
            readout = self._readout(self.card, numbers, self._backend)
            found: list[Found | Exception] = []
            for index, item in enumerate(items):
                item_began_s = time.perf_counter()
                try:
                    detections, classes = readout.read(index, item)
                except Exception as error:
                    found.append(error)
                    continue
                took_ms = (time.perf_counter() - item_began_s) * 1000
                found.append(Found(detections, classes, inference_ms, took_ms))
        return found

    def _side_px(self, network: Any) -> int:
        """The side of the model's square: as set, or as trained; a whole number of strides."""
        trained: Any = (
            getattr(self._backend, "imgsz", None) or (getattr(network, "args", None) or {}).get("imgsz") or 640
        )
        wanted_px = self._input_px or int(max(trained) if isinstance(trained, list | tuple) else trained)
        stride_px = int(getattr(self._backend, "stride", 32) or 32)
        return -(-wanted_px // stride_px) * stride_px


def _first_words(error: Exception) -> str:
    """The beginning of an error's text on one line: Ultralytics writes paragraphs with advice for another program."""
    words = " ".join(str(error).split())
    return words if len(words) <= 160 else f"{words[:160]}…"
