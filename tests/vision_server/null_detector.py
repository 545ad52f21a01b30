"""A detector without a network: its weights are a line of text that says how it behaves."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from vision_server.detector import DetectItem, Detector
from vision_server.images import Image
from vision_server.results import Box, Card, Detection, Found, Task
from vision_server.weights import UnreadableWeights, short_hash

SIDE_PX = 32


class NullDetector(Detector):
    """Finds one object labelled with the first word of its weights.

    `broken …` cannot be read, `crash …` cannot compute, `slow …` is loaded once `go_on` is set; none computes without `compute`.
    """

    go_on: ClassVar[threading.Event] = threading.Event()
    compute: ClassVar[threading.Event] = threading.Event()
    loads: ClassVar[list[str]] = []
    open: ClassVar[set[int]] = set()
    """Which have been loaded and not been closed."""
    begun: ClassVar[set[int]] = set()
    """Which have had something to compute."""

    @classmethod
    def reset(cls) -> None:
        """As at the beginning: nothing waits."""
        cls.go_on, cls.compute, cls.loads = threading.Event(), threading.Event(), []
        cls.open, cls.begun = set(), set()
        cls.go_on.set()
        cls.compute.set()

    def load(self) -> Card:
        self._words = self._path.read_text()
        type(self).loads.append(self._words)
        if self._words.startswith("slow"):
            assert self.go_on.wait(30)
        if self._words.startswith("broken"):
            raise UnreadableWeights(f"{self._path.name} is {self._words}")
        labels = (self._words.split()[0],)
        self.card = Card(short_hash(self._path), Task.DETECT, "null", "fp32", "cpu", labels, SIDE_PX, len(self._words))
        type(self).open.add(id(self))
        return self.card

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return (1,)

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def fit(self, image: Image) -> Any:
        """Fits nothing."""
        return image

    def execute(self, items: Sequence[DetectItem]) -> list[Found | Exception]:
        type(self).begun.add(id(self))
        assert self.compute.wait(30)
        assert id(self) in self.open, "computes after it was closed"
        if self._words.startswith("crash"):
            raise RuntimeError("the null engine crashed")
        box = Box(0.0, 0.0, 1.0, 1.0)
        return [Found((Detection(self.card.labels[0], 0, 1.0, box),)) for _ in items]

    def close(self) -> None:
        type(self).open.discard(id(self))


def put(folder: Path, name: str, words: str) -> None:
    """Weights with these words, in place at once."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}"
    temporary.write_text(words)
    temporary.rename(folder / name)
