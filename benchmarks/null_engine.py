"""What a call costs besides its image and its model, against a bare grpc.aio echo: `python -m benchmarks.null_engine`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ai4thai.bench import Load
from ai4thai.bench_results import LoadReport

from benchmarks import layers
from benchmarks.loads import put
from benchmarks.pages import Page, console, run
from benchmarks.processes import Measured

CALLERS = (1, 16, 64)
SIZES_BYTES = (20_000, 200_000)
ROUNDS = 3
GOAL_RATIO = 0.6


@dataclass(frozen=True)
class Cost:
    """A load on one server; `cpu_us` is the server's CPU time for each call."""

    report: LoadReport
    cpu_us: float


def measure(seconds: float) -> Page:
    """Both servers in turn, for each number of callers and size of image; then the layers of the null server."""
    page = Page("null_engine", "A vision server without model and decoder against a bare grpc.aio echo")
    page.say(
        "The null server is the whole vision server (port, front, interceptors, admission, decoder's threads, batcher, wire, "
        "metrics, access log) but for a decoder and a detector that do nothing. The echo is grpc.aio alone, answering a few "
        f"bytes. Both in one run, in turn; medians of {ROUNDS} rounds. The load generator shares the cores. CPU is the server "
        "process's, for each call."
    )
    with Measured("benchmarks.bare_echo") as bare, Measured("benchmarks.null_server") as null:
        null.wait_until_ready()
        rows, ratios = [], []
        for size_bytes in SIZES_BYTES:
            for callers in CALLERS:
                console.print(f"{size_bytes:,} B, {callers} callers …")
                bare_costs, null_costs = [], []
                for _ in range(ROUNDS):
                    bare_costs.append(_cost(bare, size_bytes, callers, seconds))
                    null_costs.append(_cost(null, size_bytes, callers, seconds))
                ratios.append(_per_s(null_costs) / _per_s(bare_costs))
                rows.append(_row(size_bytes, callers, bare_costs, null_costs))
    page.table(
        [
            "image",
            "callers",
            "bare calls/s",
            "null calls/s",
            "of the bare",
            "bare p50 ms",
            "null p50 ms",
            "bare CPU µs",
            "null CPU µs",
            "batch",
        ],
        rows,
    )
    page.goal(f"≥ {GOAL_RATIO} of the echo's calls/s everywhere (least: {min(ratios):.2f})", min(ratios) >= GOAL_RATIO)
    layers.add_to(page)
    return page


def _cost(server: Measured, size_bytes: int, callers: int, seconds: float) -> Cost:
    load = Load(callers=callers, seconds=seconds, warm_up_s=0.3)
    cpu_s = server.usage.cpu_s()
    report = put(server.address, [os.urandom(size_bytes)], load)
    return Cost(report, (server.usage.cpu_s() - cpu_s) / report.all_answered_count * 1e6)


def _row(size_bytes: int, callers: int, bare: Sequence[Cost], null: Sequence[Cost]) -> list[str]:
    p50_ms = [statistics.median(cost.report.latency.p50_ms for cost in costs) for costs in (bare, null)]
    cpu_us = [statistics.median(cost.cpu_us for cost in costs) for costs in (bare, null)]
    return [
        f"{size_bytes:,} B",
        str(callers),
        f"{_per_s(bare):,.0f}",
        f"{_per_s(null):,.0f}",
        f"{_per_s(null) / _per_s(bare):.2f}",
        *(f"{number:.2f}" for number in p50_ms),
        *(f"{number:.0f}" for number in cpu_us),
        f"{statistics.median(cost.report.mean_batch_size for cost in null):.1f}",
    ]


def _per_s(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.report.images_per_s for cost in costs)


if __name__ == "__main__":
    run(measure, 2.0)
