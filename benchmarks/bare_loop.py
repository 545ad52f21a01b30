"""The bare model loop, `python -m benchmarks.bare_loop SECONDS`: decode, detect, next, with no server around it.

Prints one JSON line: the images per second of the best setting, and of each setting tried.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.pictures import pictures
from vision_server.detector import DetectItem, Detector
from vision_server.images import Image
from vision_server.network import set_environment
from vision_server.requests import DetectOptions
from vision_server.weights import SHIPPED, SHIPPED_DETECTOR

# Forward-pass threads, images a batch, decoding ahead in a second thread: all that a careful script would try.
SETTINGS = [(threads, batch, ahead) for threads in (1, 2) for batch in (1, 4, 8) for ahead in (False, True)]


def main() -> None:
    """Tries each setting for some seconds."""
    seconds = float(sys.argv[1])
    set_environment(Path(sys.argv[2]), fetch_describer=False)
    cv2.setNumThreads(1)
    detector = Detector(SHIPPED[SHIPPED_DETECTOR], "cpu", input_px=0, torch_threads=1)
    detector.load()
    detector.warm_up()
    tried = {}
    with ThreadPoolExecutor(1) as pool:
        for threads, batch, ahead in SETTINGS:
            torch.set_num_threads(threads)
            tried[f"{threads} threads, batch {batch}{', decoding ahead' if ahead else ''}"] = _measure(
                detector, batch, seconds, pool if ahead else None
            )
    best = max(tried, key=lambda name: tried[name])
    print(json.dumps({"images_per_s": tried[best], "setting": best, "tried": tried}))


def _measure(detector: Detector, batch: int, seconds: float, pool: ThreadPoolExecutor | None) -> float:
    images = cycle(pictures())

    def decode() -> list[DetectItem]:
        items = []
        for content in islice(images, batch):
            rgb = np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR_RGB), np.uint8)
            items.append(DetectItem(detector.fit(Image(rgb, rgb.shape[1], rgb.shape[0])), DetectOptions()))
        return items

    detector.execute(decode())
    count = 0
    began_s = time.perf_counter()
    coming = pool.submit(decode) if pool else None
    while time.perf_counter() - began_s < seconds:
        if coming is not None and pool is not None:
            items = coming.result()
            coming = pool.submit(decode)
        else:
            items = decode()
        detector.execute(items)
        count += len(items)
    return count / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
