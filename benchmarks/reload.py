"""Models loaded, swapped and unloaded again and again under traffic: memory, failures, latencies."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from ai4thai.channel import open_channel
from ai4thai.vision.v1 import image_pb2
from ai4thai.vision.v1 import model_service_pb2 as models_pb
from ai4thai.vision.v1 import model_service_pb2_grpc as models_rpc
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc

from benchmarks.pages import RESULTS, Page, console
from benchmarks.pictures import pictures
from benchmarks.processes import Measured
from vision_server.weights import SHIPPED, SHIPPED_DETECTOR

CALLERS = 4
# What is taken once and kept (buffers of threads, caches of libraries) has been taken by then.
SETTLED_AFTER = 0.2
GOAL_GROWTH = 0.02
LOAD_S = 300.0


@dataclass
class Traffic:
    """What the callers saw: seconds of each call, by what went on meanwhile."""

    phase: str = "alone"
    calls_s: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Calls so far."""
        return sum(map(len, self.calls_s.values()))


@dataclass(frozen=True)
class Moment:
    """The server after a number of cycles."""

    cycle: int
    rss_mb: float
    threads: int
    files: int
    answered: int


def measure(cycles: int, engine: str, page: Page) -> None:
    """One server, one engine."""
    with tempfile.TemporaryDirectory() as folder:
        models_dir = Path(folder) / "models"
        models_dir.mkdir()
        for name in ("cams", "extra"):
            shutil.copyfile(SHIPPED[SHIPPED_DETECTOR], models_dir / f"{name}.pt")
        env = {
            "AI4THAI_DATA_DIR": folder,
            "VISION_SERVICE_PORT": "0",
            "VISION_DETECTOR": "cams",
            "VISION_DESCRIBER": "",
            "VISION_ENGINE": engine,
            "VISION_OFFLINE": "true",
            "SERVING_ACCESS_LOG": "false",
        }
        with Measured("vision_server", env=env) as server:
            server.wait_until_ready()
            _cycle(page, server, models_dir, cycles, engine)


def _cycle(page: Page, server: Measured, models_dir: Path, cycles: int, engine: str) -> None:
    moments: list[Moment] = []
    took_s: dict[str, list[float]] = {"load": [], "unload": [], "swap": []}

    def note(cycle: int, answered: int) -> None:
        usage = server.usage
        moments.append(Moment(cycle, usage.rss_mb(), usage.thread_count(), usage.file_count(), answered))

    # Without the client's own retries, which would hide a failure.
    with open_channel(server.address, retries=False) as channel, _traffic(server.address) as traffic:
        life = models_rpc.ModelServiceStub(channel)
        time.sleep(5)
        note(0, traffic.count)
        for cycle in range(1, cycles + 1):
            os.utime(models_dir / "cams.pt")  # newer weights, as far as anyone can tell
            for what, call in (
                ("load", lambda: life.LoadModel(models_pb.LoadModelRequest(name="extra"), timeout=LOAD_S)),
                ("unload", lambda: life.UnloadModel(models_pb.UnloadModelRequest(name="extra"), timeout=LOAD_S)),
                ("swap", lambda: life.LoadModel(models_pb.LoadModelRequest(name="cams"), timeout=LOAD_S)),
            ):
                traffic.phase = what
                began_s = time.perf_counter()
                call()
                took_s[what].append(time.perf_counter() - began_s)
                traffic.phase = "alone"
                time.sleep(0.1)
            time.sleep(0.4)  # what was swapped out has been freed by then
            note(cycle, traffic.count)
            if cycle % 10 == 0:
                console.print(f"{engine}: cycle {cycle} of {cycles}, {moments[-1].rss_mb:.0f} MB")
    _tell(page, engine, moments, took_s, traffic)


@contextmanager
def _traffic(address: str) -> Iterator[Traffic]:
    """Calls without a pause meanwhile, each caller over a connection of its own."""
    seen, ended, lock = Traffic(), threading.Event(), threading.Lock()
    images = [image_pb2.Image(content=bytes(picture)) for picture in pictures()]

    def call() -> None:
        with open_channel(address, retries=False) as channel:
            stub = rpc.VisionServiceStub(channel)
            number = 0
            while not ended.is_set():
                phase, began_s = seen.phase, time.perf_counter()
                number += 1
                try:
                    stub.Detect(pb.DetectRequest(image=images[number % len(images)]), timeout=30)
                except grpc.RpcError as error:
                    with lock:
                        seen.failures.append(str(error))
                    continue
                with lock:
                    seen.calls_s.setdefault(phase, []).append(time.perf_counter() - began_s)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _tell(page: Page, engine: str, moments: Sequence[Moment], took_s: dict[str, list[float]], traffic: Traffic) -> None:
    cycles = moments[-1].cycle
    page.head(f"`{engine}`")
    shown = {0, 1, *(round(cycles * share) for share in (0.1, SETTLED_AFTER, 0.4, 0.6, 0.8, 1))}
    page.table(
        ("cycles", "resident MB", "threads", "open files", "calls answered"),
        [(m.cycle, f"{m.rss_mb:.1f}", m.threads, m.files, f"{m.answered:,}") for m in moments if m.cycle in shown],
    )
    page.table(
        ("the callers' calls", "count", "p50 ms", "p99 ms"),
        [
            (name, f"{len(calls_s):,}", f"{_at(calls_s, 0.5):.1f}", f"{_at(calls_s, 0.99):.1f}")
            for phase, name in (
                ("alone", "nothing else going on"),
                ("load", "begun while another model loads"),
                ("unload", "begun while another model is unloaded"),
                ("swap", "begun while their own model is swapped"),
            )
            if (calls_s := traffic.calls_s.get(phase, []))
        ],
    )
    settled = [moment for moment in moments if moment.cycle >= cycles * SETTLED_AFTER]
    slope_kb = _slope([m.cycle for m in settled], [m.rss_mb * 1000 for m in settled])
    growth_mb = statistics.median(m.rss_mb for m in settled[-10:]) - statistics.median(m.rss_mb for m in settled[:10])
    median_s = ", ".join(f"a {what} {statistics.median(times):.2f} s" for what, times in took_s.items())
    page.say(
        f"Medians: {median_s}. From cycle {settled[0].cycle} on the memory's slope is {slope_kb:+.1f} kB a cycle; the last ten "
        f"cycles have {growth_mb:+.1f} MB against the first ten of those. Failed calls: {len(traffic.failures)}."
    )
    page.goal("no call fails", not traffic.failures)
    page.goal(
        f"the memory grows by less than {GOAL_GROWTH:.0%} from cycle {settled[0].cycle} on",
        growth_mb < GOAL_GROWTH * settled[0].rss_mb,
    )
    threads, files = (
        statistics.median(getattr(m, what) for m in settled[-10:])
        - statistics.median(getattr(m, what) for m in settled[:10])
        for what in ("threads", "files")
    )
    page.goal("no thread and no open file more, by the same medians", threads <= 0 and files <= 0)


def _at(seconds: Sequence[float], share: float) -> float:
    """Milliseconds that this share of the calls took at most."""
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))] * 1000


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    return statistics.linear_regression(xs, ys).slope if len(xs) > 1 else 0.0


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reload", description=__doc__)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--engines", default="openvino,pytorch", help="separated by commas")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write to")
    arguments = parser.parse_args()
    command = f"python -m benchmarks.reload --cycles {arguments.cycles} --engines {arguments.engines}"
    page = Page("reload", "Loading, swapping and unloading models under traffic", command)
    page.say(
        f"`{SHIPPED_DETECTOR}` under two names. {CALLERS} callers call `cams` without a pause and without retries. A cycle: "
        "`extra` is loaded and unloaded, then `cams` is loaded anew and swapped."
    )
    for engine in arguments.engines.split(","):
        measure(arguments.cycles, engine, page)
    page.write(arguments.output)


if __name__ == "__main__":
    main()
