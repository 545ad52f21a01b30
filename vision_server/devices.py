"""The devices of this machine: GPUs as NVML sees them, the CPU where there is none."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from vision_server.results import DeviceInfo

T = TypeVar("T")

_MOMENT_S = 0.1


def read_devices(busy_ratio: float) -> tuple[DeviceInfo, ...]:
    """Every device now; `busy_ratio` is the executors' own, 0 to 1. May take some milliseconds: off the loop."""
    return _gpus(busy_ratio) or (_cpu(busy_ratio),)


def _gpus(busy_ratio: float) -> tuple[DeviceInfo, ...]:
    # nvidia-ml-py and the older nvidia-ml-py3 both give this module; only what both have is called without asking.
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no GPU: each says so in its own way
        return ()
    try:
        return tuple(_gpu(pynvml, index, busy_ratio) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, index: int, busy_ratio: float) -> DeviceInfo:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    power_milliwatts = _or_none(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    utilization = _or_none(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    mig_on = _or_none(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0]) == 1
    return DeviceInfo(
        index=index,
        kind="cuda",
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        mig_profile=_mig_profile(pynvml, handle) if mig_on else "",
        memory_used_bytes=int(memory.used),
        memory_total_bytes=int(memory.total),
        # On a card that is cut into MIG slices NVML cannot tell; absent is true, 0 would not be.
        utilization=None if utilization is None or mig_on else utilization / 100,
        temperature_celsius=_or_none(
            lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
        ),
        power_watts=None if power_milliwatts is None else power_milliwatts / 1000,
        busy_ratio=busy_ratio,
    )


def _mig_profile(pynvml: Any, handle: Any) -> str:
    """`1g.10gb` of the slice that this process sees; empty where the package is too old to tell."""
    name = _or_none(lambda: _text(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0))))
    return (name or "").rpartition("MIG ")[2]


def _cpu(busy_ratio: float) -> DeviceInfo:
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
        busy_ratio=busy_ratio,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _text(value: str | bytes) -> str:
    """nvidia-ml-py3 answers bytes, nvidia-ml-py text."""
    return value.decode() if isinstance(value, bytes) else value


def _or_none(read: Callable[[], T]) -> T | None:
    """What a device cannot tell is absent."""
    try:
        return read()
    except Exception:  # NVMLError_NotSupported and its like, or a function that the older package lacks
        return None
