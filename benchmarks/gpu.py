"""On a machine with an NVIDIA GPU, in one command, `python -m benchmarks.gpu`: the floor, the bare loop, the server.

Exits with 2 where there is no CUDA device. `--device cpu` only tries out that the script runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai4thai.bench import Load

from benchmarks.bare_loop import read_item
from benchmarks.loads import put
from benchmarks.pages import RESULTS, Page, console
from benchmarks.pictures import SIDE_PX, pictures
from benchmarks.processes import Measured, end_on_sigterm
from benchmarks.random_weights import make_weights
from vision_server.detector import DetectItem, Detector
from vision_server.engines.engine import EngineOptions
from vision_server.engines.pytorch import PyTorchEngine
from vision_server.network import set_environment
from vision_server.settings import VisionSettings

NO_CUDA = 2
GOAL_RATIO = 0.8
# Multiplications and additions of one 640 × 640 image, as Ultralytics publishes them.
GIGAFLOPS = {"yolo11n": 6.5, "yolo11s": 21.5, "yolo11m": 68.0, "yolo11l": 86.9, "yolo11x": 194.9}
MATRIX = 8192
MOST_DECODERS = 16


@dataclass(frozen=True)
class Plan:
    """What is measured where."""

    device: str
    architecture: str
    batches: Sequence[int]
    seconds: float

    @property
    def on_gpu(self) -> bool:
        """False only for a trial of the script."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Wall:
    """How many images a second something lets through."""

    name: str
    images_per_s: float


class WithoutGraphs(PyTorchEngine):
    """Launches each kernel by itself."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        super().__init__(path, options)
        self._records = False


def main() -> int:
    """Measures and writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--architecture", default="yolo11s", choices=sorted(GIGAFLOPS))
    parser.add_argument("--largest-batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write to")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"There is no CUDA device here (torch {torch.__version__}). Run this on a machine with an NVIDIA GPU and torch's "
            "CUDA build; `--device cpu` only tries the script out.",
            file=sys.stderr,
        )
        return NO_CUDA
    end_on_sigterm()
    batches = [2**power for power in range(arguments.largest_batch.bit_length())]
    plan = Plan(arguments.device, arguments.architecture, batches, arguments.seconds)
    measure(plan).write(arguments.output)
    return 0


def measure(plan: Plan) -> Page:
    """Everything, with weights of the architecture's shape that were never trained."""
    page = Page(
        "gpu" if plan.on_gpu else "gpu-trial",
        f"{plan.architecture} on {_device_name(plan.device)}",
        "python -m benchmarks.gpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        set_environment(data_dir, fetch_describer=False)
        name = make_weights(plan.architecture, data_dir / "models")
        weights = data_dir / "models" / f"{name}.pt"
        tera_flops, copy_gb_per_s = _floor(page, plan)
        walls = _networks(page, plan, weights, tera_flops, copy_gb_per_s)
        bare_per_s = _bare_loop(page, plan, weights, walls)
        _server(page, plan, data_dir, name, bare_per_s, walls)
    page.head("Walls")
    page.say("How many images a second each part lets through by itself; the least is the wall that is hit first.")
    page.table(["part", "images/s"], [[wall.name, f"{wall.images_per_s:,.0f}"] for wall in sorted(walls, key=_by_rate)])
    return page


def _floor(page: Page, plan: Plan) -> tuple[float, float]:
    """10¹² operations a second of a large product in half precision, and 10⁹ bytes a second copied to the device."""
    console.print("the floor …")
    values = torch.float16 if plan.on_gpu else torch.float32
    side = MATRIX if plan.on_gpu else 512
    left = torch.randn(side, side, dtype=values, device=plan.device)
    product_s = _seconds(plan, lambda: left @ left)
    tera_flops = 2 * side**3 / product_s / 1e12
    pixels = np.zeros((plan.batches[-1], SIDE_PX, SIDE_PX, 3), np.uint8)
    pageable = torch.from_numpy(pixels)
    copy_s = _seconds(plan, lambda: pageable.to(plan.device, copy=True))
    rows = [
        ["product of two matrices", f"{tera_flops:.1f} TFLOPS"],
        ["copy to the device", f"{pixels.nbytes / copy_s / 1e9:.1f} GB/s"],
    ]
    if plan.on_gpu:
        pinned = pageable.pin_memory()
        pinned_s = _seconds(plan, lambda: pinned.to(plan.device, non_blocking=True))
        rows.append(["copy from pinned memory", f"{pixels.nbytes / pinned_s / 1e9:.1f} GB/s"])
    page.head("The floor")
    page.say(
        f"{side} × {side}, {str(values).removeprefix('torch.')}; pixels are copied as the engine does, from ordinary memory."
    )
    page.table(["what", "rate"], rows)
    return tera_flops, pixels.nbytes / copy_s / 1e9


def _networks(page: Page, plan: Plan, weights: Path, tera_flops: float, copy_gb_per_s: float) -> list[Wall]:
    """The forward pass for each batch, with and without recorded graphs, beside its floor."""
    options = EngineOptions(device=plan.device, max_batch=plan.batches[-1])
    engines = {"graphs": PyTorchEngine(weights, options), "no graphs": WithoutGraphs(weights, options)}
    page.head("The network alone")
    page.say(
        f"{engines['graphs'].precision}, from pixels in the host's memory to numbers on the device. The floor is the copy of "
        f"the pixels and {GIGAFLOPS[plan.architecture]:g} GFLOPs an image at the rates above."
    )
    rows, best_per_s = [], 0.0
    for batch in plan.batches:
        console.print(f"the network, batch {batch} …")
        pixels = np.random.default_rng(0).integers(0, 255, (batch, SIDE_PX, SIDE_PX, 3), np.uint8)
        took_ms = {name: 1000 * _seconds(plan, _infer(engine, pixels)) for name, engine in engines.items()}
        floor_ms = pixels.nbytes / copy_gb_per_s / 1e6 + batch * GIGAFLOPS[plan.architecture] / tera_flops
        best_per_s = max(best_per_s, batch / took_ms["graphs"] * 1000)
        rows.append(
            [
                batch,
                f"{floor_ms:.2f}",
                *(f"{took_ms[name]:.2f}" for name in engines),
                f"{batch / took_ms['graphs'] * 1000:,.0f}",
                f"{floor_ms / took_ms['graphs']:.2f}",
            ]
        )
    for engine in engines.values():
        engine.close()
    page.table(["batch", "floor ms", "with graphs ms", "without ms", "images/s", "floor / with graphs"], rows)
    return [Wall("the network with its copies", best_per_s)]


def _bare_loop(page: Page, plan: Plan, weights: Path, walls: list[Wall]) -> float:
    """Decode → detect without a server, several threads decoding ahead; returns the best images/s."""
    core_count = VisionSettings().core_count
    decoder_count = min(core_count, MOST_DECODERS)
    detector = Detector(weights, plan.device, max_batch=plan.batches[-1], engine="pytorch")
    detector.load()
    detector.warm_up()
    page.head("The bare loop")
    page.say(
        f"JPEG files of {SIDE_PX} × {SIDE_PX} px; {decoder_count} threads decode ahead ({core_count} cores), one thread "
        "detects: copy, network, suppression of overlaps. Detecting alone is the same with images decoded before."
    )
    with ThreadPoolExecutor(decoder_count) as pool:
        images = cycle(pictures())
        ready = [read_item(detector, content) for content in pictures()]
        decoded_per_s = _decoding_per_s(plan, detector, pool)
        rows, best_per_s, detecting_per_s = [], 0.0, 0.0
        for batch in plan.batches:
            console.print(f"the bare loop, batch {batch} …")
            items = list(islice(cycle(ready), batch))
            alone_per_s = batch / _seconds(plan, _execute(detector, items))
            whole_per_s = _pipeline_per_s(plan, detector, pool, images, batch)
            best_per_s, detecting_per_s = max(best_per_s, whole_per_s), max(detecting_per_s, alone_per_s)
            rows.append([batch, f"{alone_per_s:,.0f}", f"{whole_per_s:,.0f}"])
    detector.close()
    page.table(["batch", "detecting alone, images/s", "with decoding, images/s"], rows)
    walls += [
        Wall(f"decoding in {decoder_count} threads", decoded_per_s),
        Wall("detecting in one thread", detecting_per_s),
    ]
    return best_per_s


def _server(page: Page, plan: Plan, data_dir: Path, model: str, bare_per_s: float, walls: list[Wall]) -> None:
    """End to end through the port, and what the server without a model lets through."""
    env = {
        "VISION_DETECTOR": model,
        "VISION_DESCRIBER": "",
        "VISION_MAX_WAIT_MS": "0",
        "VISION_DEVICE": plan.device,
        "VISION_ENGINE": "pytorch",
        "VISION_MAX_BATCH": str(plan.batches[-1]),
        "VISION_SERVICE_PORT": "0",
        "AI4THAI_DATA_DIR": str(data_dir),
        "SERVING_ACCESS_LOG": "false",
    }
    callers_tried, streams_tried = ((1, 16, 64, 128), (8, 32)) if plan.on_gpu else ((1, 2), (1,))
    loads = {f"Detect, {callers} callers": Load(callers=callers, seconds=plan.seconds) for callers in callers_tried}
    loads |= {
        f"DetectStream, {streams} streams of 8": Load(callers=streams, seconds=plan.seconds, streams=True, in_flight=8)
        for streams in streams_tried
    }
    rows, best_per_s = [], 0.0
    with Measured("vision_server", env=env) as server:
        server.wait_until_ready()
        for name, load in loads.items():
            console.print(f"{name} …")
            cpu_s = server.usage.cpu_s()
            report = put(server.address, pictures(), load)
            cores = (server.usage.cpu_s() - cpu_s) / (load.seconds + load.warm_up_s)
            best_per_s = max(best_per_s, report.images_per_s)
            rows.append(
                [
                    name,
                    f"{report.images_per_s:,.0f}",
                    f"{report.images_per_s / bare_per_s:.2f}",
                    f"{report.latency.p50_ms:.1f}",
                    f"{report.latency.p99_ms:.1f}",
                    f"{report.mean_batch_size:.1f}",
                    f"{cores:.1f}",
                    f"{report.generator_cpu_ratio:.2f}",
                ]
            )
    with Measured("benchmarks.null_server", env={"SERVING_ACCESS_LOG": "false"}) as null:
        null.wait_until_ready()
        report = put(null.address, pictures(), Load(callers=64, seconds=plan.seconds))
        walls.append(Wall("the server without model and decoder, 64 callers", report.images_per_s))
    page.head("End to end through the port")
    page.say(
        f"`VISION_MAX_BATCH={plan.batches[-1]}`, {model}. The load generator runs on the same machine and has one thread: near "
        "1.0 of its cores it is the limit itself."
    )
    columns = [
        "call",
        "images/s",
        "of the bare loop",
        "p50 ms",
        "p99 ms",
        "batch",
        "server's cores",
        "generator's cores",
    ]
    page.table(columns, rows)
    page.goal(
        f"≥ {GOAL_RATIO} of the bare loop ({best_per_s / bare_per_s:.2f})",
        best_per_s >= GOAL_RATIO * bare_per_s,
    )


def _infer(engine: PyTorchEngine, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Callable[[], object]:
    return lambda: engine.infer(pixels)


def _execute(detector: Detector, items: Sequence[DetectItem]) -> Callable[[], object]:
    return lambda: detector.execute(items)


def _seconds(plan: Plan, work: Callable[[], object]) -> float:
    """What one piece of work takes, the device's part included: the mean over the plan's seconds."""
    wait: Callable[[], object] = torch.cuda.synchronize if plan.on_gpu else lambda: None
    for _ in range(3):
        work()
    wait()
    count, began_s = 0, time.perf_counter()
    while (passed_s := time.perf_counter() - began_s) < plan.seconds or count == 0:
        work()
        wait()
        count += 1
    return passed_s / count


def _decoding_per_s(plan: Plan, detector: Detector, pool: ThreadPoolExecutor) -> float:
    contents = list(islice(cycle(pictures()), 256))
    count, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < plan.seconds:
        count += len(list(pool.map(lambda content: read_item(detector, content), contents)))
    return count / (time.perf_counter() - began_s)


def _pipeline_per_s(plan: Plan, detector: Detector, pool: ThreadPoolExecutor, images: Any, batch: int) -> float:
    """Batches detected one after another while the next ones are decoded."""
    ahead = max(2, -(-MOST_DECODERS * 2 // batch))
    coming = [[pool.submit(read_item, detector, next(images)) for _ in range(batch)] for _ in range(ahead)]
    count, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < plan.seconds:
        items = [future.result() for future in coming.pop(0)]
        coming.append([pool.submit(read_item, detector, next(images)) for _ in range(batch)])
        detector.execute(items)
        count += batch
    passed_s = time.perf_counter() - began_s
    for futures in coming:
        for future in futures:
            future.cancel()
    return count / passed_s


def _by_rate(wall: Wall) -> float:
    return wall.images_per_s


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU (a trial of the script)"


if __name__ == "__main__":
    sys.exit(main())
