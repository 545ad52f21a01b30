"""Minutes of everything at once, `make soak MINUTES=10`: nothing may fail unexplained, nothing may grow.

Work goes in laps; after each the callers rest, and memory, threads and open files are read while nothing runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.loads import run
from benchmarks.pages import RESULTS, Page, console
from benchmarks.pictures import pictures
from benchmarks.processes import Measured, Usage, end_on_sigterm
from benchmarks.soak_work import CYCLED, Work
from vision_server.weights import SHIPPED, SHIPPED_DESCRIBER, SHIPPED_DETECTOR

LAPS = 10
QUIET_S = 20.0
# The first laps warm up: allocators, thread pools and caches find their size.
WARM_SHARE = 0.3
# Memory may differ by this from lap to lap whatever the server does: glibc keeps what threads have freed.
NOISE_MB = 25.0
# A pool starts its threads as they are needed.
SPARE_THREADS = 2
SPARE_FILES = 2
_IMAGE_PX = 320


@dataclass(frozen=True)
class Rest:
    """The server after a lap, while nothing runs."""

    at_s: float
    work_count: int
    rss_mb: float
    thread_count: int
    file_count: int


@dataclass(frozen=True)
class Soaked:
    """What a soak brought."""

    work: Work
    rests: Sequence[Rest]
    log_errors: Sequence[str]

    @property
    def warm(self) -> Sequence[Rest]:
        """Those after the warm-up."""
        return self.rests[min(len(self.rests) - 2, round(len(self.rests) * WARM_SHARE)) :]

    @property
    def growth_mb(self) -> float:
        """What the fitted line of memory climbs over the warm laps."""
        return _slope([(rest.at_s, rest.rss_mb) for rest in self.warm]) * (self.warm[-1].at_s - self.warm[0].at_s)

    @property
    def scatter_mb(self) -> float:
        """How far the warm laps lie off that line (standard deviation)."""
        slope = _slope([(rest.at_s, rest.rss_mb) for rest in self.warm])
        return statistics.pstdev(rest.rss_mb - slope * rest.at_s for rest in self.warm)

    @property
    def problems(self) -> list[str]:
        """Why it failed; empty: it passed."""
        first, last = self.warm[0], self.warm[-1]
        found = [f"unexplained: {line}" for line in self.work.unexplained[:20]]
        found += [f"in the server's log: {line}" for line in self.log_errors[:20]]
        if self.growth_mb > max(NOISE_MB, 2 * self.scatter_mb):
            found.append(f"memory grew by {self.growth_mb:.0f} MB; lap by lap it scatters by {self.scatter_mb:.0f} MB")
        if last.thread_count > first.thread_count + SPARE_THREADS:
            found.append(f"threads grew from {first.thread_count} to {last.thread_count}")
        if last.file_count > first.file_count + SPARE_FILES:
            found.append(f"open files grew from {first.file_count} to {last.file_count}")
        idle = [name for name in self.work.kinds if not self.work.done[name]]
        if idle:
            found.append(f"never done: {', '.join(idle)}")
        return found


def main() -> int:
    """Soaks, writes the page; returns 1 when something failed or grew."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write to")
    arguments = parser.parse_args()
    end_on_sigterm()
    # Begun before the soak: a page tells what other programs took from its own beginning on.
    page = Page("soak", f"A soak of {arguments.minutes:g} minutes", f"make soak MINUTES={arguments.minutes:g}")
    soaked = soak(arguments.minutes * 60, LAPS)
    describe(page, soaked)
    page.write(arguments.output)
    for problem in soaked.problems:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    return 1 if soaked.problems else 0


def soak(seconds: float, laps: int) -> Soaked:
    """So many seconds of work in so many laps, on a server of its own with all shipped models."""
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_to_cycle(Path(folder))
        detectors = [name for name in SHIPPED if name != SHIPPED_DESCRIBER]
        env = {"VISION_SERVICE_PORT": "0", "AI4THAI_DATA_DIR": folder, "VISION_DETECTOR": ",".join(detectors)}
        with Measured("vision_server", env=env) as server:
            server.wait_until_ready()
            return soak_server(server.address, server.usage, server.log, detectors, weights, seconds, laps)


def soak_server(
    address: str,
    usage: Usage,
    log: Callable[[], Sequence[Mapping[str, object]]],
    detectors: Sequence[str],
    weights: Path,
    seconds: float,
    laps: int,
) -> Soaked:
    """The same on a server that runs; `weights` lie in its model directory, `log` gives its lines so far."""
    before = len(log())
    work, rests = run(_soak(address, usage, detectors, weights, seconds, laps))
    errors = [str({**line}) for line in log()[before:] if line.get("level") in ("error", "critical")]
    return Soaked(work, rests, errors)


def weights_to_cycle(data_dir: Path) -> Path:
    """Puts a copy of the shipped detector into the model directory, to be loaded and unloaded."""
    weights = data_dir / "models" / f"{CYCLED}.pt"
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(SHIPPED[SHIPPED_DETECTOR].read_bytes())
    return weights


async def _soak(
    address: str, usage: Usage, detectors: Sequence[str], weights: Path, seconds: float, laps: int
) -> tuple[Work, list[Rest]]:
    rests = []
    began_s = time.perf_counter()
    async with Work(address, pictures(_IMAGE_PX, 8), detectors, SHIPPED_DESCRIBER, weights) as work:
        for lap in range(laps):
            work.go()
            await asyncio.sleep(seconds / laps)
            await work.rest()
            await _until_quiet(address)
            at_s = time.perf_counter() - began_s
            rests.append(Rest(at_s, work.done.total(), usage.rss_mb(), usage.thread_count(), usage.file_count()))
            console.print(
                f"lap {lap + 1} of {laps}: {work.done.total():,} pieces of work, {rests[-1].rss_mb:.0f} MB, "
                f"{len(work.unexplained)} unexplained"
            )
    return work, rests


async def _until_quiet(address: str) -> None:
    """Until the server has nothing more to do: calls whose callers have left may still be at a model."""
    until_s = time.perf_counter() + QUIET_S
    async with httpx.AsyncClient(trust_env=False) as web:
        while time.perf_counter() < until_s:
            text = (await web.get(f"http://{address}/metrics")).text
            held = [
                line for line in text.splitlines() if line.startswith(("ai4thai_calls_in_flight ", "ai4thai_streams "))
            ]
            if all(float(line.rpartition(" ")[2]) == 0 for line in held):
                break
            await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)


def describe(page: Page, soaked: Soaked) -> None:
    """Writes what a soak brought onto its page."""
    work, last = soaked.work, soaked.rests[-1]
    page.say(
        "All shipped models; side by side callers that detect (all tasks, options and priorities), send bad images, cancel, "
        "have no time, stream with and without trackers, leave streams and connections in the middle, outrun their streams, ask "
        "and leave answers, look at health and metrics, and load, reload and unload a model under traffic. After each lap all "
        "rest, and what the server holds is read."
    )
    page.table(
        ["after s", "pieces of work", "resident MB", "threads", "open files"],
        [
            [f"{rest.at_s:.0f}", f"{rest.work_count:,}", f"{rest.rss_mb:.0f}", rest.thread_count, rest.file_count]
            for rest in soaked.rests
        ],
    )
    page.table(["what they did", "times"], [[name, f"{count:,}"] for name, count in sorted(work.done.items())])
    page.table(
        ["error that was meant to come", "times"],
        [[" ".join(filter(None, pair)), f"{count:,}"] for pair, count in sorted(work.explained.items())],
    )
    page.goal(
        f"no unexplained error in {last.work_count:,} pieces of work ({len(work.unexplained)})", not work.unexplained
    )
    climb, scatter, first = soaked.growth_mb, soaked.scatter_mb, soaked.warm[0]
    page.goal(
        f"memory does not grow (after the warm-up its line climbs by {climb:+.1f} MB; the laps scatter by {scatter:.1f} MB)",
        climb <= max(NOISE_MB, 2 * scatter),
    )
    threads, files = (first.thread_count, last.thread_count), (first.file_count, last.file_count)
    page.goal(
        f"neither threads ({threads[0]} → {threads[1]}) nor open files ({files[0]} → {files[1]}) grow",
        threads[1] <= threads[0] + SPARE_THREADS and files[1] <= files[0] + SPARE_FILES,
    )
    if soaked.problems:
        page.say("\n".join(f"- {problem}" for problem in soaked.problems))


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through the points (least squares)."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


if __name__ == "__main__":
    sys.exit(main())
