"""One loaded detector: letterboxed images in, objects in the original's pixels out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vision_server.engines import Engine, EngineOptions, open_engine
from vision_server.engines.choose import NoEngine
from vision_server.images import Image
from vision_server.letterbox import Fitted, crop, fit
from vision_server.requests import DetectOptions
from vision_server.results import Card, Found, Task
from vision_server.weights import UnreadableWeights, short_hash

_TASKS = {
    "detect": Task.DETECT,
    "segment": Task.SEGMENT,
    "pose": Task.POSE,
    "classify": Task.CLASSIFY,
    "obb": Task.ORIENTED_BOXES,
}


@dataclass(frozen=True, slots=True)
class DetectItem:
    """What one caller gives to the batch; `class_ids` None: all."""

    fitted: Fitted
    options: DetectOptions
    class_ids: tuple[int, ...] | None = None


class Detector:
    """An engine with its own pre- and post-processing around it: Ultralytics' predict() is made for one caller.

    load(), warm_up(), execute() and close() block and are called off the loop; execute() by `lanes` threads side by side.
    `threads` is the cores of one forward pass on the CPU; `max_batch` the largest batch to prepare for; `cache_dir` keeps
    converted weights for the next start.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        *,
        input_px: int = 0,
        threads: int = 1,
        engine: str = "auto",
        lanes: int = 1,
        max_batch: int = 8,
        cache_dir: Path | None = None,
    ) -> None:
        self._path = path
        self._engine_name = engine
        self._options = EngineOptions(device, input_px, threads, lanes, max_batch, cache_dir)
        self._engine: Engine | None = None

    def load(self) -> Card:
        """Reads the weights, anew when they were read before. Raises UnreadableWeights."""
        from vision_server.readout import Readout

        self._readout = Readout
        try:
            engine = open_engine(self._path, self._engine_name, self._options)
        except NoEngine as error:
            raise UnreadableWeights(str(error)) from error
        except Exception as error:
            raise UnreadableWeights(
                f"{self._path.name} cannot be read as a YOLO model: {_first_words(error)}"
            ) from error
        traits = engine.traits
        if traits.task not in _TASKS:
            raise UnreadableWeights(f"{self._path.name} is a model for {traits.task!r}; served are {', '.join(_TASKS)}")
        self.card = Card(
            version=short_hash(self._path),
            task=_TASKS[traits.task],
            engine=engine.name,
            precision=engine.precision,
            device=engine.device,
            labels=traits.names,
            input_size_px=engine.side_px,
            memory_bytes=engine.memory_bytes,
            keypoint_names=traits.kpt_names,
        )
        self._engine = engine
        return self.card

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batches that the engine computes, the smallest first; execute() fills up and splits what it is given."""
        return self._loaded.batch_sizes

    def warm_up(self) -> None:
        """Answers an example in a batch of each size. Raises when it cannot."""
        side_px = self.card.input_size_px
        grey = Image(np.full((side_px, side_px, 3), 127, np.uint8), side_px, side_px)
        item = DetectItem(self.fit(grey), DetectOptions())
        for size in self.batch_sizes:
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
        """A forward pass for each batch that the engine takes, then each item's own options; one that fails fails alone."""
        engine = self._loaded
        largest = engine.batch_sizes[-1]
        found: list[Found | Exception] = []
        for first in range(0, len(items), largest):
            found += self._compute(engine, items[first : first + largest])
        return found

    def close(self) -> None:
        """Frees the engine; nobody may be executing any more."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def _loaded(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{self._path.name} is not loaded")
        return self._engine

    def _compute(self, engine: Engine, items: Sequence[DetectItem]) -> list[Found | Exception]:
        began_s = time.perf_counter()
        numbers = engine.infer(_stack(items, next(size for size in engine.batch_sizes if size >= len(items))))
        inference_ms = (time.perf_counter() - began_s) * 1000
        readout = self._readout(self.card, [part[: len(items)] for part in numbers], engine.traits, items)
        found: list[Found | Exception] = []
        for index in range(len(items)):
            item_began_s = time.perf_counter()
            try:
                read = readout.read(index)
            except Exception as error:
                found.append(error)
                continue
            took_ms = (time.perf_counter() - item_began_s) * 1000
            found.append(replace(read, inference_ms=inference_ms, postprocess_ms=took_ms))
        return found


def _stack(items: Sequence[DetectItem], size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The items' pixels, filled up with zeros to a batch of `size`: shapes that an engine has prepared for."""
    if size == len(items) == 1:
        return np.ascontiguousarray(items[0].fitted.rgb)[np.newaxis]
    first = items[0].fitted.rgb
    batch = np.zeros((size, *first.shape), np.uint8)
    for place, item in zip(batch, items, strict=False):
        place[:] = item.fitted.rgb
    return batch


def _first_words(error: Exception) -> str:
    """The beginning of an error's text on one line: Ultralytics writes paragraphs with advice for another program."""
    words = " ".join(str(error).split())
    return words if len(words) <= 160 else f"{words[:160]}…"
