"""The one-port front against bare grpcio: latency and server CPU of a call, in turn, `python -m benchmarks.front`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from ai4thai.vision.v1 import image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc

from benchmarks.pages import Page, console, run
from benchmarks.processes import Measured
from serving.rpc import channel_options

# Message sizes with calls per round; ten rounds each, the two servers in turn.
SIZES_BYTES = {1_000: 400, 200_000: 150, 5_000_000: 12}
ROUNDS = 10
GOAL_P50 = 1.15
GOAL_CPU = 1.5


@dataclass(frozen=True)
class Cost:
    """What a call cost."""

    p50_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class FrontRow:
    """One message size."""

    size_bytes: int
    bare: Cost
    dressed: Cost
    front: Cost

    @property
    def p50_ratio(self) -> float:
        """Front over bare."""
        return self.front.p50_ms / self.bare.p50_ms

    @property
    def cpu_ratio(self) -> float:
        """Front over bare."""
        return self.front.cpu_ms / self.bare.cpu_ms


def measure(_seconds: float) -> Page:
    """Echoes messages one after another through the three servers, in turn."""
    page = Page("front", "The one-port front against bare grpcio")
    page.say(
        "One caller echoes messages one after another. Bare: `grpc.aio` alone on a TCP port. Dressed: the same with our "
        "interceptors (request id, metrics, access log). Front: our server, everything on. CPU is the server's, for each call."
    )
    console.print("the front …")
    with (
        Measured("benchmarks.bare_echo") as bare,
        Measured("benchmarks.bare_echo", "dressed") as dressed,
        Measured("tests.serving.echo_server", "0") as front,
    ):
        servers = (bare, dressed, front)
        rows = [FrontRow(size_bytes, *_costs(servers, size_bytes, calls)) for size_bytes, calls in SIZES_BYTES.items()]
    page.table(
        [
            "message",
            "bare p50 ms",
            "dressed",
            "front",
            "front / bare",
            "bare CPU ms",
            "dressed",
            "front",
            "front / bare",
        ],
        [_cells(row) for row in rows],
    )
    small, middle = rows[0], rows[1]
    page.goal(f"p50 ≤ {GOAL_P50} × at 1 kB ({small.p50_ratio:.2f} ×)", small.p50_ratio <= GOAL_P50)
    page.goal(f"CPU ≤ {GOAL_CPU} × at 200 kB ({middle.cpu_ratio:.2f} ×)", middle.cpu_ratio <= GOAL_CPU)
    page.say(f"The port by itself (front / dressed) costs {small.front.p50_ms / small.dressed.p50_ms:.2f} × at 1 kB.")
    return page


def _cells(row: FrontRow) -> list[str]:
    costs = (row.bare, row.dressed, row.front)
    waits = [f"{cost.p50_ms:.3f}" for cost in costs]
    works = [f"{cost.cpu_ms:.3f}" for cost in costs]
    return [f"{row.size_bytes:,} B", *waits, f"{row.p50_ratio:.2f}", *works, f"{row.cpu_ratio:.2f}"]


def _costs(servers: Sequence[Measured], size_bytes: int, calls: int) -> list[Cost]:
    content = os.urandom(size_bytes)
    latencies_s: list[list[float]] = [[] for _ in servers]
    cpu_s = [0.0 for _ in servers]
    for _ in range(ROUNDS):
        for number, server in enumerate(servers):
            before_s = server.usage.cpu_s()
            latencies_s[number] += _echo(server.address, content, calls)
            cpu_s[number] += server.usage.cpu_s() - before_s
    return [
        Cost(statistics.median(latencies) * 1000, cpu / (ROUNDS * calls) * 1000)
        for latencies, cpu in zip(latencies_s, cpu_s, strict=True)
    ]


def _echo(address: str, content: bytes, calls: int) -> list[float]:
    """Seconds of each call."""
    request = pb.DetectRequest(image=image_pb2.Image(content=content))
    request.options.annotate = True
    seconds = []
    with grpc.insecure_channel(address, options=channel_options(64 << 20)) as channel:
        detect = rpc.VisionServiceStub(channel).Detect
        for _ in range(5):
            detect(request)
        for _ in range(calls):
            began_s = time.perf_counter()
            detect(request)
            seconds.append(time.perf_counter() - began_s)
    return seconds


if __name__ == "__main__":
    run(measure, 0.0)
