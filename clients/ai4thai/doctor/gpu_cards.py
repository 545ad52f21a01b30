"""Reads what the driver tells of this machine's GPUs: by NVML, or by nvidia-smi where Python has no module for it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SMI_S = 4.0
"""What nvidia-smi may take."""
_QUERY = "index,uuid,name,memory.total,memory.used,mig.mode.current"
_MIB = 1 << 20
_SLICE = re.compile(r"UUID: (MIG-[\w/-]+)")
_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)")
_DRIVER = re.compile(r"Driver Version\s*:\s*([\d.]+)")


class NoGpu(Exception):
    """There is none here."""


class GpuBroken(Exception):
    """There is one, but it or its driver cannot be used; the text is the driver's."""


@dataclass(frozen=True)
class Card:
    """One GPU; `slices` are the UUIDs of its MIG slices that this process may see, None: it is whole."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    slices: tuple[str, ...] | None


@dataclass(frozen=True)
class Driver:
    """The driver, the newest CUDA that it speaks (major, minor), its cards."""

    version: str
    cuda: tuple[int, int]
    cards: tuple[Card, ...]


def read_driver() -> Driver:
    """What the driver tells.

    Raises:
        NoGpu: there is no GPU, or no driver for it.
        GpuBroken: the driver is there and answers with an error.
    """
    try:
        import pynvml
    except ImportError:
        return _by_program()
    try:
        pynvml.nvmlInit()
    except Exception as error:
        if "LibraryNotFound" in type(error).__name__:
            return _by_program()
        if "DriverNotLoaded" in type(error).__name__:
            raise NoGpu(str(error)) from None
        raise GpuBroken(f"{type(error).__name__}: {error}") from None
    try:
        return _by_nvml(pynvml)
    except NoGpu:
        raise
    except Exception as error:
        raise GpuBroken(f"{type(error).__name__}: {error}") from None
    finally:
        with suppress(Exception):
            pynvml.nvmlShutdown()


def _by_nvml(nvml: Any) -> Driver:
    cuda = _or_none(nvml.nvmlSystemGetCudaDriverVersion) or 0  # nvidia-ml-py3 (2017) lacks it
    cards = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = _or_none(lambda handle=handle: nvml.nvmlDeviceGetMemoryInfo(handle))  # type: ignore[misc]
        cards.append(
            Card(
                index,
                _as_text(nvml.nvmlDeviceGetUUID(handle)),
                _as_text(nvml.nvmlDeviceGetName(handle)),
                int(memory.total) if memory else 0,
                int(memory.used) if memory else 0,
                _slices(nvml, handle),
            )
        )
    if not cards:
        raise NoGpu("the driver finds no GPU")
    return Driver(_as_text(nvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10), tuple(cards))


def _slices(nvml: Any, handle: Any) -> tuple[str, ...] | None:
    if _or_none(lambda: nvml.nvmlDeviceGetMigMode(handle)[0]) != 1:
        return None
    found = []
    for number in range(_or_none(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0):
        with suppress(Exception):  # numbers may be missing in between
            found.append(_as_text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))))
    return tuple(found)


def _by_program() -> Driver:
    if shutil.which("nvidia-smi") is None:
        if Path("/dev/nvidiactl").exists():
            raise GpuBroken("there are GPU devices, but neither libnvidia-ml nor nvidia-smi")
        raise NoGpu("no NVIDIA driver")
    head, rows, listed = _smi((), (f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"), ("-L",))
    slices: dict[int, list[str]] = {}
    index = -1
    for line in listed.splitlines():
        if (card := re.match(r"GPU (\d+):", line)) is not None:
            index = int(card[1])
        elif (found := _SLICE.search(line)) is not None:
            slices.setdefault(index, []).append(found[1])
    cards = []
    for row in rows.splitlines():
        number, uuid, name, total, used, mig = (cell.strip() for cell in row.split(",", 5))
        whole = mig != "Enabled"
        cards.append(
            Card(
                int(number), uuid, name, _mib(total), _mib(used), None if whole else tuple(slices.get(int(number), ()))
            )
        )
    driver, cuda = _DRIVER.search(head), _CUDA.search(head)
    return Driver(driver[1] if driver else "?", (int(cuda[1]), int(cuda[2])) if cuda else (0, 0), tuple(cards))


def _smi(*calls: tuple[str, ...]) -> list[str]:
    """What nvidia-smi prints for these arguments; side by side, since each call may take a second or more."""
    running = [
        subprocess.Popen(["nvidia-smi", *call], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for call in calls
    ]
    until_s = time.monotonic() + SMI_S
    try:
        printed = [process.communicate(timeout=max(0.0, until_s - time.monotonic()))[0] for process in running]
    except subprocess.TimeoutExpired:
        for process in running:
            process.kill()  # and not waited for: one that hangs in the driver cannot die
        raise GpuBroken(f"nvidia-smi does not answer within {SMI_S:g} s") from None
    for process, text in zip(running, printed, strict=True):
        if process.returncode:
            words = " ".join(text.split())
            if "couldn't communicate with the NVIDIA driver" in words or "No devices were found" in words:
                raise NoGpu(words)
            raise GpuBroken(words or f"nvidia-smi ended with {process.returncode}")
    return printed


def _mib(text: str) -> int:
    return int(text) * _MIB if text.isdecimal() else 0  # `[N/A]` where memory is shared with the machine


def _as_text(value: str | bytes) -> str:
    """nvidia-ml-py3 answers bytes, nvidia-ml-py text."""
    return value.decode() if isinstance(value, bytes) else value


def _or_none(read: Callable[[], T]) -> T | None:
    """What a device cannot tell is absent."""
    try:
        return read()
    except Exception:  # not supported, or a function that the older package lacks
        return None
