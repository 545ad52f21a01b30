"""A vision server whose decoder and detector do nothing, `python -m benchmarks.null_server`; all else is the real one.

Port, front, interceptors, admission, the decoder's threads, the batcher with its lanes, wire: what is left is what a call costs
besides its image and its model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from serving.process import run
from serving.settings import ServingSettings, describe, read
from vision_server import loading, service
from vision_server.detector import DetectItem, Detector
from vision_server.images import Decoded, Image, Images
from vision_server.results import Box, Card, Detection, Found, Task
from vision_server.settings import VisionSettings

SIDE_PX = 640
_IMAGE = Image(np.zeros((1, 1, 3), np.uint8), SIDE_PX, SIDE_PX)
_FOUND = Found((Detection("null", 0, 1.0, Box(0.0, 0.0, 1.0, 1.0)),))


class NullDetector(Detector):
    """Finds the same object in everything."""

    def load(self) -> Card:
        """Reads nothing."""
        self.card = Card("0", Task.DETECT, "null", "fp32", "cpu", ("null",), SIDE_PX, 0)
        return self.card

    def warm_up(self) -> None:
        """Nothing to warm up."""

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Any that the server's own limit allows."""
        return (1, 2, 4, 8)

    def fit(self, image: Image) -> Any:
        """Fits nothing."""
        return image

    def execute(self, items: Sequence[DetectItem]) -> list[Found | Exception]:
        """The same answer for each item."""
        return [_FOUND] * len(items)


class NullImages(Images):
    """Takes every file for the same image; still in the decoder's threads."""

    def _work(self, source: Any, place: Any, then: Callable[[Image], Any], *_: Any) -> Any:
        return Decoded(_IMAGE, 0.0), then(_IMAGE)


def main() -> int:
    """Serves until it is told to stop; returns the exit code."""
    loading.Detector = NullDetector  # type: ignore[attr-defined]
    service.Images = NullImages  # type: ignore[attr-defined]
    serving = read(ServingSettings)
    settings = VisionSettings(port=0, describer="")
    return run(lambda: service.VisionServer(settings, serving.max_message_bytes), serving, 0, describe(serving))


if __name__ == "__main__":
    sys.exit(main())
