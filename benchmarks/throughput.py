"""Detection through the port against the bare model loop: images/s, CPU, what a call adds; `python -m benchmarks.throughput`."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ai4thai.bench import Load
from ai4thai.bench_results import LoadReport

from benchmarks.bare_loop import SETTINGS, Bare, BareLoop, Setting
from benchmarks.loads import put
from benchmarks.pages import Page, console, run
from benchmarks.pictures import COUNT, SIDE_PX, pictures
from benchmarks.processes import Measured
from benchmarks.random_weights import make_weights
from vision_server.network import set_environment
from vision_server.weights import SHIPPED, SHIPPED_DETECTOR

GOAL_RATIO = 0.95
GOAL_OVERHEAD_MS = 2.0
ROUNDS = 3
TRIAL_S = 1.5
REFERENCE = (Setting(1, 1, 1, "pytorch"), Setting(2, 1, 8, "pytorch"))
ONE_AT_A_TIME = Setting(1, 1, 1)


@dataclass(frozen=True)
class Served:
    """A load on the server, and the server's CPU time for each of its images."""

    report: LoadReport
    cpu_ms: float


def measure(seconds: float) -> Page:
    """Measures the shipped detector and one of YOLO11n's shape; `seconds` for each row of a round."""
    page = Page("throughput", "Throughput against the bare model loop")
    page.say(
        f"{COUNT} JPEG files of {SIDE_PX} × {SIDE_PX} px, decoding included on both sides, by the same code. The bare loop is a "
        "Python process of decode → detect with no server around it: the best of several settings. The load generator takes a "
        "share of the same cores, as callers on other machines would not: it is told, and images for each CPU second of the "
        f"server's (the loop's) process compare the two without it. Medians of {ROUNDS} rounds, in which all rows take turns; "
        "a stream keeps 4 frames on their way."
    )
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        set_environment(data_dir, fetch_describer=False)
        random = make_weights("yolo11n", data_dir / "models")
        env = {
            "VISION_DETECTOR": f"{SHIPPED_DETECTOR},{random}",
            "VISION_DESCRIBER": "",
            "VISION_MAX_WAIT_MS": "0",  # a slow machine is measured too, instead of refusing
            "VISION_SERVICE_PORT": "0",
            "AI4THAI_DATA_DIR": str(data_dir),
        }
        with Measured("vision_server", env=env) as server:
            server.wait_until_ready()
            for model, weights in (
                (SHIPPED_DETECTOR, SHIPPED[SHIPPED_DETECTOR]),
                (random, data_dir / "models" / f"{random}.pt"),
            ):
                with BareLoop(weights, data_dir) as loop:
                    _compare(page, server, loop, model, seconds)
    return page


def _compare(page: Page, server: Measured, loop: BareLoop, model: str, seconds: float) -> None:
    console.print(f"{model}: the bare loop's settings …")
    tried = {setting: loop.measure(setting, TRIAL_S) for setting in (*SETTINGS, *REFERENCE)}
    # The best of each way to share the cores, in every round: chosen once, in a bad moment, one that leaves a core idle can look
    # as good as the others, and would flatter the server ever after.
    ways = {(setting.loops, setting.threads) for setting in SETTINGS}
    contenders = [
        max((s for s in SETTINGS if (s.loops, s.threads) == way), key=lambda setting: tried[setting].images_per_s)
        for way in sorted(ways)
    ]
    loads = {
        "Detect, 16 callers": Load(callers=16, seconds=seconds, warm_up_s=0.5, model=model),
        "DetectStream, 8 streams": Load(callers=8, seconds=seconds, warm_up_s=0.5, model=model, streams=True),
        "Detect, 1 caller": Load(callers=1, seconds=seconds, warm_up_s=0.5, model=model),
    }
    bares: dict[Setting, list[Bare]] = {setting: [] for setting in contenders}
    alone: list[Bare] = []
    served: dict[str, list[Served]] = {name: [] for name in loads}
    for number in range(ROUNDS):
        console.print(f"{model}: round {number + 1} of {ROUNDS} …")
        for setting in contenders:
            bares[setting].append(loop.measure(setting, seconds))
        for name, load in loads.items():
            served[name].append(_serve(server, load))
        alone.append(loop.measure(ONE_AT_A_TIME, seconds))
    best = max(contenders, key=lambda setting: _median([bare.images_per_s for bare in bares[setting]]))
    page.head(f"`{model}` ({bares[best][0].engine})")
    bare_per_s = _median([bare.images_per_s for bare in bares[best]])
    bare_cpu_ms = _median([bare.cpu_ms for bare in bares[best]])
    rows = [[f"bare loop: {best}", f"{bare_per_s:.1f}", "1.00", f"{1000 / bare_cpu_ms:.1f}", "1.00", "", "", "", ""]]
    for setting in contenders:
        if setting != best:
            per_s = _median([bare.images_per_s for bare in bares[setting]])
            rows.append([f"bare loop: {setting}", f"{per_s:.1f}", f"{per_s / bare_per_s:.2f}", *[""] * 6])
    ratios, cpu_ratios = [], []
    for name, runs in served.items():
        per_s = _median([one.report.images_per_s for one in runs])
        cpu_ms = _median([one.cpu_ms for one in runs])
        if "1 caller" not in name:
            ratios.append(per_s / bare_per_s)
            cpu_ratios.append(bare_cpu_ms / cpu_ms)
        rows.append(
            [
                name,
                f"{per_s:.1f}",
                f"{per_s / bare_per_s:.2f}",
                f"{1000 / cpu_ms:.1f}",
                f"{bare_cpu_ms / cpu_ms:.2f}",
                f"{_median([one.report.generator_cpu_ratio for one in runs]):.2f}",
                f"{_median([one.report.latency.p50_ms for one in runs]):.1f}",
                f"{_median([one.report.latency.p99_ms for one in runs]):.1f}",
                f"{_median([one.report.mean_batch_size for one in runs]):.1f}",
            ]
        )
    columns = [
        "",
        "images/s",
        "of the bare",
        "images/CPU s",
        "of the bare",
        "generator's cores",
        "p50 ms",
        "p99 ms",
        "batch",
    ]
    page.table(columns, rows)
    page.goal(
        f"≥ {GOAL_RATIO} of the bare loop at 16 callers and at 8 streams ({_two(ratios)})", min(ratios) >= GOAL_RATIO
    )
    page.say(
        f"Where callers bring cores of their own, images for each of the server's CPU seconds count: {_two(cpu_ratios)}."
    )
    p50_ms = _median([one.report.latency.p50_ms for one in served["Detect, 1 caller"]])
    bare_ms = _median([bare.p50_ms for bare in alone])
    page.goal(
        f"one caller's p50 − the bare loop's with one image at a time ({p50_ms:.2f} − {bare_ms:.2f} = {p50_ms - bare_ms:.2f} ms) "
        f"≤ {GOAL_OVERHEAD_MS:g} ms",
        p50_ms - bare_ms <= GOAL_OVERHEAD_MS,
    )
    page.say("All settings of the bare loop that were tried, some seconds each:")
    page.table(
        ["loops × threads, batch", "engine", "images/s", "CPU ms an image", "p50 ms a batch"],
        [
            [setting, bare.engine, f"{bare.images_per_s:.1f}", f"{bare.cpu_ms:.1f}", f"{bare.p50_ms:.1f}"]
            for setting, bare in tried.items()
        ],
    )


def _serve(server: Measured, load: Load) -> Served:
    cpu_s = server.usage.cpu_s()
    report = put(server.address, pictures(), load)
    # Both from the first image to the last: those of the warm-up, and those that were still on their way at the end.
    return Served(report, (server.usage.cpu_s() - cpu_s) / report.all_answered_count * 1000)


def _median(numbers: Sequence[float]) -> float:
    return statistics.median(numbers)


def _two(ratios: Sequence[float]) -> str:
    return " and ".join(f"{ratio:.2f}" for ratio in ratios)


if __name__ == "__main__":
    run(measure, 4.0)
