"""The one-port front against bare grpcio: latency and server CPU per call, interleaved in one run."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass

import grpc
from ai4thai.vision.v1 import image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc

from benchmarks.processes import Measured
from serving.rpc import channel_options

# Message sizes with calls per round; ten rounds each, the two servers in turn.
SIZES_BYTES = {1_000: 400, 200_000: 150, 5_000_000: 12}
ROUNDS = 10


@dataclass(frozen=True)
class FrontRow:
    """One message size."""

    size_bytes: int
    bare_p50_ms: float
    front_p50_ms: float
    bare_cpu_ms: float
    front_cpu_ms: float

    @property
    def p50_ratio(self) -> float:
        """Front over bare."""
        return self.front_p50_ms / self.bare_p50_ms

    @property
    def cpu_ratio(self) -> float:
        """Front over bare."""
        return self.front_cpu_ms / self.bare_cpu_ms


def measure_front() -> list[FrontRow]:
    """Echoes messages one after another through both servers."""
    rows = []
    env = {"SERVING_LOG_LEVEL": "info"}
    with Measured("benchmarks.bare_echo") as bare, Measured("tests.serving.echo_server", "0", env=env) as front:
        for size_bytes, calls in SIZES_BYTES.items():
            content = os.urandom(size_bytes)
            latencies: dict[str, list[float]] = {"bare": [], "front": []}
            cpu_s = {"bare": 0.0, "front": 0.0}
            for _ in range(ROUNDS):
                for name, server in (("bare", bare), ("front", front)):
                    before_s = server.cpu_s()
                    latencies[name] += _echo(server.address, content, calls)
                    cpu_s[name] += server.cpu_s() - before_s
            count = ROUNDS * calls
            rows.append(
                FrontRow(
                    size_bytes,
                    statistics.median(latencies["bare"]) * 1000,
                    statistics.median(latencies["front"]) * 1000,
                    cpu_s["bare"] / count * 1000,
                    cpu_s["front"] / count * 1000,
                )
            )
    return rows


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
    for row in measure_front():
        print(
            f"{row.size_bytes:>9} B  p50 {row.bare_p50_ms:.3f} → {row.front_p50_ms:.3f} ms ({row.p50_ratio:.2f} ×)"
            f"  CPU {row.bare_cpu_ms:.3f} → {row.front_cpu_ms:.3f} ms ({row.cpu_ratio:.2f} ×)"
        )
