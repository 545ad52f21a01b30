"""How long each process takes to start, and what it holds then: `python -m benchmarks.cold_start`."""

from __future__ import annotations

import tempfile
import time

import httpx

from benchmarks.pages import Page, console, run
from benchmarks.processes import Measured


def measure(_seconds: float) -> Page:
    """Starts every process once."""
    page = Page("cold_start", "Cold start and resident memory")
    page.say(
        "From the start of the process until the port answers (live) and until it is ready; memory once ready and idle."
    )
    console.print("cold start …")
    with tempfile.TemporaryDirectory() as data_dir:
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
                page.table(
                    ["process", "live s", "ready s", "resident MB"],
                    [
                        [name, f"{live_s:.2f}", f"{ready_s:.2f}", f"{server.usage.rss_mb():.0f}"]
                        for name, server, live_s, ready_s in rows
                    ],
                )
    return page


def _ready_s(server: Measured) -> float:
    while httpx.get(f"http://{server.address}/health", trust_env=False).status_code != 200:
        if server.exit_code is not None:
            raise RuntimeError(f"the server ended with {server.exit_code} before it was ready")
        time.sleep(0.05)
    return time.perf_counter() - server.started_s


if __name__ == "__main__":
    run(measure, 0.0)
