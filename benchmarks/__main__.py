"""`make bench`: measures, prints, and writes benchmarks/results/bench.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks.front import FrontRow, measure_front
from benchmarks.load import STREAM_IN_FLIGHT, Load, run_detect, run_streams
from benchmarks.pictures import COUNT, SIDE_PX, pictures
from benchmarks.processes import ROOT, Measured

CALLERS = (1, 4, 16)
RESULTS = ROOT / "benchmarks" / "results" / "bench.md"
GOAL_THROUGHPUT = 0.90
GOAL_P50 = 1.15
GOAL_CPU = 1.5


def main() -> None:
    """Runs all measures; nothing else should run on the machine meanwhile."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each row")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    lines = [*_head()]
    with tempfile.TemporaryDirectory() as data_dir:
        console.print("detection against the bare loop …")
        lines += _detection(arguments.seconds, data_dir, console)
        console.print("cold start and memory …")
        lines += _processes(data_dir)
    console.print("the front against bare grpcio …")
    lines += _front(measure_front())
    text = "\n".join(lines) + "\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)
    console.print(f"written to {arguments.output}")


def _head() -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("grpcio", "torch", "transformers"))
    cores = len(os.sched_getaffinity(0))
    return [
        "# `make bench`",
        "",
        f"{time.strftime('%Y-%m-%d')} · {_cpu()} · {cores} cores · Python {platform.python_version()} · {packages}",
        "",
        "All rows of a table come from one run; the load generator shares the cores with the server.",
        "",
    ]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _bare(seconds: float, data_dir: str) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.bare_loop", str(seconds), data_dir]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "clients"), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _detection(seconds: float, data_dir: str, console: Console) -> list[str]:
    images = [bytes(picture) for picture in pictures()]
    # Before and after, so that a machine that slows down meanwhile does not flatter either side; the better one counts.
    bares = [_bare(seconds / 3, data_dir)]
    rows: list[tuple[str, Load]] = []
    env = {
        "VISION_SERVICE_PORT": "0",
        "AI4THAI_DATA_DIR": data_dir,
        "VISION_DESCRIBER": "",
        "SERVING_ACCESS_LOG": "false",
    }
    with Measured("vision_server", env=env) as server:
        server.wait_for("health check passes", check="models")
        for name, run in (("Detect", run_detect), ("DetectStream", run_streams)):
            for callers in CALLERS:
                console.print(f"  {name}, {callers} callers")
                rows.append((name, run(server.address, images, callers, seconds)))
    bares.append(_bare(seconds / 3, data_dir))
    best = max(bares, key=lambda bare: float(str(bare["images_per_s"])))
    bare_per_s = float(str(best["images_per_s"]))
    lines = [
        "## Detection through the port against the bare model loop",
        "",
        f"`shapes-detector` on the CPU (PyTorch), {COUNT} JPEG files of {SIDE_PX} × {SIDE_PX} px, decoding included. "
        f"The bare loop's best of {len(best['tried'])} settings is **{bare_per_s:.1f} images/s** ({best['setting']}). "  # type: ignore[arg-type]
        f"A stream keeps {STREAM_IN_FLIGHT} frames on their way; its latency counts from the frame's sending.",
        "",
        "| call | callers | images/s | of the bare loop | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, load in rows:
        ratio = load.images_per_s / bare_per_s
        lines.append(
            f"| {name} | {load.callers} | {load.images_per_s:.1f} | {ratio:.2f} | {load.p50_ms:.1f} | {load.p99_ms:.1f} |"
        )
    reached = [load.images_per_s / bare_per_s for name, load in rows if load.callers == CALLERS[-1]]
    lines += [
        "",
        f"Goal: ≥ {GOAL_THROUGHPUT:.2f} of the bare loop at {CALLERS[-1]} callers: {_verdict(min(reached) >= GOAL_THROUGHPUT)}.",
        "",
    ]
    return lines


def _front(rows: list[FrontRow]) -> list[str]:
    lines = [
        "## The one-port front against bare grpcio",
        "",
        "One caller echoes messages one after another. Bare: `grpc.aio` alone on a TCP port. Dressed: the same with our "
        "interceptors (request id, metrics, access log). Front: our server, everything on. CPU is the server's, for each call.",
        "",
        "| message | bare p50 ms | dressed | front | front / bare | bare CPU ms | dressed | front | front / bare |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        costs = (row.bare, row.dressed, row.front)
        waits = " | ".join(f"{cost.p50_ms:.3f}" for cost in costs)
        works = " | ".join(f"{cost.cpu_ms:.3f}" for cost in costs)
        lines.append(f"| {row.size_bytes:,} B | {waits} | {row.p50_ratio:.2f} | {works} | {row.cpu_ratio:.2f} |")
    small, middle = rows[0], rows[1]
    lines += [
        "",
        f"Goals: p50 ≤ {GOAL_P50} × at 1 kB: {_verdict(small.p50_ratio <= GOAL_P50)}; "
        f"CPU ≤ {GOAL_CPU} × at 200 kB: {_verdict(middle.cpu_ratio <= GOAL_CPU)}. "
        f"The port by itself (front / dressed) costs {small.front.p50_ms / small.dressed.p50_ms:.2f} × at 1 kB.",
        "",
    ]
    return lines


def _processes(data_dir: str) -> list[str]:
    lines = [
        "## Cold start and resident memory",
        "",
        "From the start of the process until the port answers (live) and until it is ready; memory once ready and idle.",
        "",
        "| process | live s | ready s | resident MB |",
        "|---|---|---|---|",
    ]
    common = {"AI4THAI_DATA_DIR": data_dir}
    with Measured("queue_server.broker", "--port", "0", env=common, ready="ready") as broker:
        rows = [("broker (Valkey)", broker, broker.live_s, broker.live_s)]
        redis = {**common, "REDIS_URL": broker.url}
        with (
            Measured("vision_server", env={**common, "VISION_SERVICE_PORT": "0"}) as vision,
            Measured("queue_server", env={**redis, "QUEUE_WORKER_PORT": "0"}) as queue,
            Measured(
                "queue_server.worker", env={**redis, "QUEUE_VISION_ADDRESS": vision.address}, ready="working"
            ) as worker,
        ):
            for name, server in (("queue_server", queue), ("vision_server", vision)):  # the quicker one first
                rows.append((name, server, server.live_s, _ready_s(server)))
            rows.append(("worker", worker, worker.live_s, worker.live_s))
            for name, server, live_s, ready_s in rows:
                lines.append(f"| {name} | {live_s:.2f} | {ready_s:.2f} | {server.rss_mb():.0f} |")
    return [*lines, ""]


def _ready_s(server: Measured) -> float:
    while True:
        if httpx.get(f"http://{server.address}/health").status_code == 200:
            return time.perf_counter() - server.started_s
        time.sleep(0.05)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


if __name__ == "__main__":
    main()
