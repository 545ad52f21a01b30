"""The bare model loop: decode, detect, next, with no server around it.

`python -m benchmarks.bare_loop WEIGHTS DATA_DIR` answers each line of JSON, a Setting, with a line of JSON, a Bare.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import cv2
import torch

from benchmarks.pictures import pictures
from benchmarks.processes import ENVIRONMENT, ROOT
from vision_server.decoders import ImageFile, quieten
from vision_server.detector import DetectItem, Detector
from vision_server.images import Image
from vision_server.network import set_environment
from vision_server.requests import DetectOptions


@dataclass(frozen=True)
class Setting:
    """How the loop runs: `loops` threads side by side, each decoding and computing batches, with `threads` cores a pass."""

    loops: int
    threads: int
    batch: int
    engine: str = "auto"

    def __str__(self) -> str:
        return f"{self.loops} × {self.threads} threads, batch {self.batch}"


@dataclass(frozen=True)
class Bare:
    """What a setting gave; `p50_ms` is one batch from its file to its detections, `cpu_ms` what an image cost of all cores."""

    images_per_s: float
    p50_ms: float
    cpu_ms: float
    engine: str


# All that a careful script would try on two cores; the more cores, the more loops.
SETTINGS = tuple(
    Setting(loops, threads, batch) for loops, threads in ((1, 1), (1, 2), (2, 1), (3, 1)) for batch in (1, 4, 8)
)


class BareLoop:
    """A process that runs bare loops when asked to; a context manager. Between two questions it does nothing."""

    def __init__(self, weights: Path, data_dir: Path) -> None:
        self._command = [sys.executable, "-m", "benchmarks.bare_loop", str(weights), str(data_dir)]

    def __enter__(self) -> BareLoop:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def measure(self, setting: Setting, seconds: float) -> Bare:
        """Runs the loop for so long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**asdict(setting), "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # whatever else a library has to say
                return Bare(**json.loads(line))
        raise RuntimeError(f"{' '.join(self._command)} ended with {self._process.wait()}")


def main() -> None:
    """Answers until the input ends."""
    set_environment(Path(sys.argv[2]), fetch_describer=False)
    cv2.setNumThreads(1)
    quieten()
    detectors: dict[tuple[str, int, int], Detector] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = asked.pop("seconds")
        setting = Setting(**asked)
        key = (setting.engine, setting.threads, setting.loops)
        if key not in detectors:
            torch.set_num_threads(setting.threads)
            detectors[key] = Detector(
                Path(sys.argv[1]), "cpu", threads=setting.threads, engine=setting.engine, lanes=setting.loops
            )
            detectors[key].load()
            detectors[key].warm_up()
        print(json.dumps(asdict(_run(detectors[key], setting, seconds))), flush=True)


def _run(detector: Detector, setting: Setting, seconds: float) -> Bare:
    latencies_s: list[float] = []
    begin, end = threading.Barrier(setting.loops + 1), threading.Event()

    def loop(number: int) -> None:
        torch.set_num_threads(setting.threads)
        images = islice(cycle(pictures()), number, None)
        detector.execute([read_item(detector, next(images)) for _ in range(setting.batch)])
        begin.wait()
        while not end.is_set():
            began_s = time.perf_counter()
            detector.execute([read_item(detector, next(images)) for _ in range(setting.batch)])
            latencies_s.append(time.perf_counter() - began_s)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(setting.loops)]
    for thread in threads:
        thread.start()
    begin.wait()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    end.wait(seconds)
    end.set()
    for thread in threads:
        thread.join()
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    count = len(latencies_s) * setting.batch
    return Bare(count / took_s, statistics.median(latencies_s) * 1000, cpu_s / count * 1000, detector.card.engine)


def read_item(detector: Detector, content: bytes) -> DetectItem:
    """Decodes a file as the server does, smaller where the model needs no more."""
    with ImageFile(content) as file:
        reduction = file.reduction(detector.card.input_size_px)
        image = Image(file.decode(reduction), *file.upright_size_px, reduction)
    return DetectItem(detector.fit(image), DetectOptions())


if __name__ == "__main__":
    main()
