"""The devices of this process and how busy its models keep them: its GPUs, or the CPU where there is none."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from vision_server.gpus import read_gpus
from vision_server.results import DeviceInfo

_MOMENT_S = 0.1
# A share over less time says little: a batch counts when it ends.
_LEAST_WINDOW_S = 1.0


class BusyRatios:
    """The share of the time since it was last asked in which each device computed; each watcher has its own."""

    def __init__(self, busy_s: Callable[[], Mapping[str, float]]) -> None:
        self._read = busy_s
        self._since_s, self._before_s = time.perf_counter(), dict(busy_s())

    def take(self, least_window_s: float = 0.0) -> Mapping[str, float]:
        """0 to 1 by device (`cpu`, `cuda:0`); asked again before `least_window_s` it still counts from the same moment."""
        now_s, busy_s = time.perf_counter(), dict(self._read())
        window_s, before_s = now_s - self._since_s, self._before_s
        if window_s >= least_window_s:
            self._since_s, self._before_s = now_s, busy_s
        return {
            device: min(1.0, max(0.0, (seconds - before_s.get(device, 0.0)) / max(window_s, 1e-6)))
            for device, seconds in busy_s.items()
        }


class Devices:
    """Tells of the devices; who asks at the same moment shares one reading."""

    def __init__(self, busy_s: Callable[[], Mapping[str, float]]) -> None:
        self._busy_s = busy_s
        self._listed = BusyRatios(busy_s)
        self._reading: asyncio.Task[tuple[DeviceInfo, ...]] | None = None
        self._draining = asyncio.Event()

    async def list(self) -> tuple[DeviceInfo, ...]:
        """Every device, busy as it was since the last time that this was asked, at least a second ago."""
        return with_busy(await self._read(), self._listed.take(_LEAST_WINDOW_S))

    async def watch(self, interval_s: float) -> AsyncGenerator[tuple[DeviceInfo, ...], None]:
        """Every device at once and then each `interval_s`, busy as it was since the last time; ends when the server drains."""
        own = BusyRatios(self._busy_s)
        ratios = self._listed.take(_LEAST_WINDOW_S)
        next_s = time.perf_counter()
        while not self._draining.is_set():
            yield with_busy(await self._read(), ratios)
            # A reader that was slow is not sent what it has missed.
            next_s = max(next_s + interval_s, time.perf_counter())
            with suppress(TimeoutError):
                async with asyncio.timeout(next_s - time.perf_counter()):
                    await self._draining.wait()
            ratios = own.take()

    def drain(self) -> None:
        """Ends the watches."""
        self._draining.set()

    async def _read(self) -> tuple[DeviceInfo, ...]:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(read_devices))
        return await asyncio.shield(self._reading)


def with_busy(devices: Sequence[DeviceInfo], ratios: Mapping[str, float]) -> tuple[DeviceInfo, ...]:
    """The devices with their shares; torch numbers GPUs in the order in which this process sees them."""
    return tuple(
        replace(device, busy_ratio=ratios.get(device.kind if device.kind == "cpu" else f"{device.kind}:{number}", 0.0))
        for number, device in enumerate(devices)
    )


def read_devices() -> tuple[DeviceInfo, ...]:
    """Every device now. Takes up to a tenth of a second: off the loop."""
    return read_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) or (_cpu(),)


def _cpu() -> DeviceInfo:
    memory = psutil.virtual_memory()
    return DeviceInfo(
        index=0,
        kind="cpu",
        uuid="",
        name=_cpu_name(),
        mig_profile="",
        memory_used_bytes=int(memory.total - memory.available),
        memory_total_bytes=int(memory.total),
        # Over a moment of its own: without one, psutil answers a false 0 the first time it is asked.
        utilization=min(1.0, psutil.cpu_percent(interval=_MOMENT_S) / 100),
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
