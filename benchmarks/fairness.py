"""Many streams at once: does each get its share? `python -m benchmarks.fairness`."""

from __future__ import annotations

import tempfile

from ai4thai.bench import Load

from benchmarks.loads import put
from benchmarks.pages import Page, console, run
from benchmarks.pictures import pictures
from benchmarks.processes import Measured

STREAMS = 32
GOAL_LEAST = 0.8


def measure(seconds: float) -> Page:
    """32 streams of as many frames as they can; `seconds` in all."""
    page = Page("fairness", f"{STREAMS} streams at once")
    page.say(
        "The shipped detector; each stream keeps 4 frames on their way. Fair is that every stream gets as much as the others."
    )
    with tempfile.TemporaryDirectory() as data_dir:
        env = {
            "VISION_DESCRIBER": "",
            "VISION_MAX_WAIT_MS": "0",
            "VISION_SERVICE_PORT": "0",
            "AI4THAI_DATA_DIR": data_dir,
        }
        with Measured("vision_server", env=env) as server:
            server.wait_until_ready()
            console.print(f"{STREAMS} streams …")
            report = put(
                server.address, pictures(), Load(callers=STREAMS, seconds=seconds, streams=True, deadline_s=60)
            )
    frames = report.images_by_caller
    mean = sum(frames) / len(frames)
    page.table(
        ["images/s", "batch", "frames of a stream: least", "mean", "most", "least / mean", "p50 ms", "p99 ms"],
        [
            [
                f"{report.images_per_s:.1f}",
                f"{report.mean_batch_size:.1f}",
                min(frames),
                f"{mean:.1f}",
                max(frames),
                f"{min(frames) / mean:.2f}",
                f"{report.latency.p50_ms:.0f}",
                f"{report.latency.p99_ms:.0f}",
            ]
        ],
    )
    page.goal(f"no stream gets less than {GOAL_LEAST} of the mean", min(frames) >= GOAL_LEAST * mean)
    return page


if __name__ == "__main__":
    run(measure, 10.0)
