"""Pictures for a chaos run with the real vision server, and its own answers to them as the right ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from ai4thai.errors import AI4ThaiError, Unavailable
from ai4thai.job_results import DetectItem
from ai4thai.vision_client import VisionClient

from benchmarks.chaos_plan import Pictures, seen
from benchmarks.pictures import pictures

COUNT = 24
SIDE_PX = 320
BAD = b"no picture"
LOADED_S = 120.0


def learn(address: str) -> tuple[Pictures, Callable[[bytes], str]]:
    """Makes images of a plan, and says what chaos_plan.seen must say of each."""
    files = pictures(SIDE_PX, COUNT)
    with VisionClient(address) as client:
        right = {image: _ask(client, image) for image in (*files, BAD)}

    def picture(numbers: random.Random, seconds: float, good: bool) -> bytes:
        return numbers.choice(files) if good else BAD

    return picture, right.__getitem__


def _ask(client: VisionClient, image: bytes) -> str:
    until_s = time.monotonic() + LOADED_S
    while True:
        try:
            return seen(DetectItem(detection=client.detect(image)))
        except Unavailable:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.5)
        except AI4ThaiError as error:
            return seen(DetectItem(error=error))
