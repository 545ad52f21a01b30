"""Images that come at a fixed rate, answered or not: below capacity and at twice it, `python -m benchmarks.overload`."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence

import grpc.aio
from ai4thai.bench import Bench, Load
from ai4thai.bench_results import LoadReport
from ai4thai.vision.v1 import image_pb2, vision_service_pb2, vision_service_pb2_grpc

from benchmarks.loads import put, run
from benchmarks.pages import Page, console
from benchmarks.pages import run as run_page
from benchmarks.pictures import pictures
from benchmarks.processes import Measured, PeakMemory

CONNECTIONS = 16
MAX_WAIT_MS = 800
GOAL_P99 = 3.0
GOAL_GOODPUT = 0.9
GOAL_REFUSAL_MS = 50.0
GOAL_RECOVERY_S = 1.0
PROBE_S = 8.0
# Recovered: from then on the median of five calls in a row is within half as much again of what one caller saw before.
PROBES_IN_A_ROW = 5
RECOVERED = 1.5


def measure(seconds: float) -> Page:
    """Capacity first, then 70 % and 200 % of it; `seconds` each."""
    page = Page("overload", "At a fixed rate: below capacity and at twice it")
    page.say(
        "The shipped detector. Capacity is what 16 callers get that send when they are answered. Then images are due in even "
        "steps, whether earlier ones were answered or not; a latency counts from the moment that its image was due. Right after "
        "the overload one caller asks again and again: recovered is the server when that caller's median is back within half as "
        "much again of what it was before. "
        f"VISION_MAX_WAIT_MS={MAX_WAIT_MS}: what waits when the load ends is worked off within that time (by default within 5 s)."
    )
    with tempfile.TemporaryDirectory() as data_dir:
        env = {
            "VISION_DESCRIBER": "",
            "VISION_SERVICE_PORT": "0",
            "VISION_MAX_WAIT_MS": str(MAX_WAIT_MS),
            "AI4THAI_DATA_DIR": data_dir,
        }
        with Measured("vision_server", env=env) as server:
            server.wait_until_ready()
            _measure(page, server, seconds)
    return page


def _measure(page: Page, server: Measured, seconds: float) -> None:
    console.print("capacity …")
    normal = put(server.address, pictures(), Load(callers=1, seconds=seconds / 2))
    capacity = put(server.address, pictures(), Load(callers=CONNECTIONS, seconds=seconds)).images_per_s
    rss_before_mb = server.usage.rss_mb()
    console.print("70 % …")
    below = run(Bench(server.address, pictures(), _load(0.7 * capacity, seconds)).run())
    console.print("200 % …")
    with PeakMemory(server.usage) as peak:
        above, probes = run(_overload(server.address, _load(2 * capacity, seconds)))
    time.sleep(1)
    rss_after_mb = server.usage.rss_mb()

    page.say(f"Capacity: **{capacity:.1f} images/s**. One caller alone: p50 {normal.latency.p50_ms:.1f} ms.")
    page.table(
        [
            "due",
            "images/s due",
            "answered/s",
            "of capacity",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "refused",
            "refusals p50 ms",
            "p99 ms",
        ],
        [_row("70 %", 0.7 * capacity, capacity, below), _row("200 %", 2 * capacity, capacity, above)],
    )
    ratio = below.latency.p99_ms / below.latency.p50_ms
    page.goal(
        f"at 70 % of capacity p99 ≤ {GOAL_P99:g} × p50 ({ratio:.1f} ×), nothing refused",
        ratio <= GOAL_P99 and not below.failures,
    )
    goodput = above.images_per_s / capacity
    page.goal(f"at 200 % ≥ {GOAL_GOODPUT} of capacity is still answered ({goodput:.2f})", goodput >= GOAL_GOODPUT)
    full = [failure for failure in above.failures if failure.reason == "QUEUE_FULL"]
    others = sum(failure.latency.count for failure in above.failures if failure.reason != "QUEUE_FULL")
    told = bool(full) and full[0].retry_info_count == full[0].latency.count
    quick = bool(full) and full[0].latency.p99_ms <= GOAL_REFUSAL_MS
    advice = (
        f"p99 {full[0].latency.p99_ms:.1f} ms; come back after {full[0].retry_delay_min_s or 0:.2f} s at least, "
        f"{full[0].retry_delay_mean_s or 0:.2f} s in the mean"
        if full
        else "nothing was refused"
    )
    page.goal(
        f"the excess is refused within {GOAL_REFUSAL_MS:g} ms with RetryInfo ({advice}; {others} failed otherwise)",
        told and quick and not others,
    )
    page.say(
        f"Resident memory: {rss_before_mb:.0f} MB before the overload, {peak.rss_mb:.0f} MB at most in it, {rss_after_mb:.0f} MB "
        "after. What it may hold is bounded in images and in bytes (VISION_MAX_QUEUED_IMAGES, VISION_MAX_QUEUED_BYTES)."
    )
    recovery_s = recovered_after_s(probes, normal.latency.p50_ms)
    page.goal(
        f"one caller's p50 is back to normal within {GOAL_RECOVERY_S:g} s of the load's end "
        f"({'not within ' + format(PROBE_S, 'g') if recovery_s is None else format(recovery_s, '.2f')} s)",
        recovery_s is not None and recovery_s <= GOAL_RECOVERY_S,
    )


def _load(rate_per_s: float, seconds: float) -> Load:
    return Load(callers=CONNECTIONS, seconds=seconds, rate_per_s=rate_per_s, max_outstanding=100_000)


async def _overload(address: str, load: Load) -> tuple[LoadReport, list[tuple[float, float]]]:
    """The report; and of one caller from the load's end on: when each call was sent, in seconds after the end, and its ms."""
    loading = asyncio.create_task(Bench(address, pictures(), load).run())
    channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
    stub: vision_service_pb2_grpc.VisionServiceAsyncStub = vision_service_pb2_grpc.VisionServiceStub(channel)
    request = vision_service_pb2.DetectRequest(image=image_pb2.Image(content=pictures()[0]))
    await stub.Detect(request)  # the connection is there
    await asyncio.sleep(load.warm_up_s + load.seconds)
    ended_s = time.perf_counter()
    probes = []
    while (sent_s := time.perf_counter()) < ended_s + PROBE_S:
        try:
            await stub.Detect(request)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.01)
            probes.append((sent_s - ended_s, float("inf")))
            continue
        probes.append((sent_s - ended_s, (time.perf_counter() - sent_s) * 1000))
    await channel.close()
    return await loading, probes


def recovered_after_s(probes: Sequence[tuple[float, float]], normal_p50_ms: float) -> float | None:
    """When the first call was sent that is normal again, as is the median of it and the next four; None: not within the time."""
    for first in range(len(probes) - PROBES_IN_A_ROW + 1):
        row = probes[first : first + PROBES_IN_A_ROW]
        latencies_ms = [ms for _, ms in row]
        if max(latencies_ms[0], statistics.median(latencies_ms)) <= RECOVERED * normal_p50_ms:
            return row[0][0]
    return None


def _row(name: str, due_per_s: float, capacity_per_s: float, report: LoadReport) -> list[str]:
    full = [failure for failure in report.failures if failure.reason == "QUEUE_FULL"]
    latency = report.latency
    return [
        name,
        f"{due_per_s:.1f}",
        f"{report.images_per_s:.1f}",
        f"{report.images_per_s / capacity_per_s:.2f}",
        *(f"{number:.1f}" for number in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
        f"{report.failed_count / max(1, report.sent_count):.0%}",
        *([f"{full[0].latency.p50_ms:.1f}", f"{full[0].latency.p99_ms:.1f}"] if full else ["", ""]),
    ]


if __name__ == "__main__":
    run_page(measure, 10.0)
