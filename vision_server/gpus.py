"""What NVML tells of the GPUs and MIG slices that CUDA gives to this process.

Of a slice memory, name and UUID are its own. Utilisation NVML cannot tell; temperature and power are those of the whole card,
neighbours included, and would be false here: all three are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from vision_server.results import DeviceInfo

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Gpu:
    """A card, or a slice of the card with this index; `handle` is NVML's."""

    index: int
    uuid: str
    handle: Any
    is_slice: bool


def read_gpus(visible: str | None) -> tuple[DeviceInfo, ...]:
    """The GPUs in the order of torch's numbers; `visible` is CUDA_VISIBLE_DEVICES, None where it is not set.

    Empty: there are none, or they cannot be read. Takes some milliseconds.
    """
    # nvidia-ml-py and the older nvidia-ml-py3 (2017) both give this module; the latter knows no MIG, so that it tells a slice
    # only when CUDA_VISIBLE_DEVICES names one.
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no GPU: each says so in its own way
        return ()
    try:
        described = [_or_none(lambda gpu=gpu: _describe(pynvml, gpu)) for gpu in _usable(pynvml, visible)]  # type: ignore[misc]
        return tuple(info for info in described if info is not None)
    finally:
        with suppress(Exception):
            pynvml.nvmlShutdown()


def _usable(nvml: Any, visible: str | None) -> list[_Gpu]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order.

    The rules are CUDA's: numbers, or beginnings of UUIDs; the list ends at the first that there is not, and one that comes twice
    makes it empty. Of a card that is cut into slices the first one counts, and a process gets one slice alone. (CUDA numbers
    cards of different kinds by their speed, NVML by their slots: where they are mixed, UUIDs are to be used.)
    """
    cards = _cards(nvml)
    if visible is None:
        wanted = [gpu for card in cards if (gpu := _whole_or_slice(nvml, card)) is not None]
    else:
        wanted = []
        for name in visible.split(","):
            named = _named(nvml, cards, name.strip())
            if named is None:
                break
            wanted.append(named)
        if len({gpu.uuid for gpu in wanted}) < len(wanted):
            return []
    first_slice = next((gpu for gpu in wanted if gpu.is_slice), None)
    return [gpu for gpu in wanted if not gpu.is_slice or gpu is first_slice]


def _named(nvml: Any, cards: Sequence[_Gpu], name: str) -> _Gpu | None:
    if name.startswith("MIG-"):
        slices = [part for card in cards for part in _slices(nvml, card) or ()]
        return next((part for part in slices if part.uuid.startswith(name)), None) or _slice_by_uuid(nvml, name)
    if name.isdigit():
        fitting = [card for card in cards if card.index == int(name)]
    else:
        fitting = [card for card in cards if name.startswith("GPU-") and card.uuid.startswith(name)]
    return _whole_or_slice(nvml, fitting[0]) if len(fitting) == 1 else None


def _cards(nvml: Any) -> list[_Gpu]:
    """The cards that answer; one that has fallen off the bus does not."""
    cards = []
    for index in range(_or_none(nvml.nvmlDeviceGetCount) or 0):
        handle = _or_none(lambda index=index: nvml.nvmlDeviceGetHandleByIndex(index))  # type: ignore[misc]
        uuid = None if handle is None else _or_none(lambda handle=handle: _text(nvml.nvmlDeviceGetUUID(handle)))  # type: ignore[misc]
        if uuid is not None:
            cards.append(_Gpu(index, uuid, handle, is_slice=False))
    return cards


def _whole_or_slice(nvml: Any, card: _Gpu) -> _Gpu | None:
    """The card, or its first slice where it is cut; None: it is cut, and no slice is for this process."""
    slices = _slices(nvml, card)
    return card if slices is None else next(iter(slices), None)


def _slices(nvml: Any, card: _Gpu) -> list[_Gpu] | None:
    """The slices that this process may see; None: the card is whole."""
    if _or_none(lambda: nvml.nvmlDeviceGetMigMode(card.handle)[0]) != 1:
        return None
    found = []
    for number in range(_or_none(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(card.handle)) or 0):
        # Numbers may be missing in between, and those of other containers are not found.
        with suppress(Exception):
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(card.handle, number)
            found.append(_Gpu(card.index, _text(nvml.nvmlDeviceGetUUID(handle)), handle, is_slice=True))
    return found


def _slice_by_uuid(nvml: Any, uuid: str) -> _Gpu | None:
    """A slice by its whole UUID, which a package without MIG functions can find too."""
    handle = _or_none(lambda: nvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
    if handle is None:
        return None
    index = _or_none(lambda: nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)))
    return _Gpu(index or 0, uuid, handle, is_slice=True)


def _describe(nvml: Any, gpu: _Gpu) -> DeviceInfo:
    handle = gpu.handle
    name, _, profile = _text(nvml.nvmlDeviceGetName(handle)).partition(" MIG ")
    memory = _memory(nvml, handle)
    power_milliwatts = None if gpu.is_slice else _or_none(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    utilization = None if gpu.is_slice else _or_none(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return DeviceInfo(
        index=gpu.index,
        kind="cuda",
        uuid=gpu.uuid,
        name=name,
        mig_profile=(profile or _profile(nvml, handle)) if gpu.is_slice else "",
        memory_used_bytes=memory[0],
        memory_total_bytes=memory[1],
        utilization=None if utilization is None else utilization / 100,
        temperature_celsius=None
        if gpu.is_slice
        else _or_none(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        power_watts=None if power_milliwatts is None else power_milliwatts / 1000,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Bytes used and there. A GPU without memory of its own (GB10, Jetson) shares the machine's, and NVML does not tell."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if type(error).__name__ != "NVMLError_NotSupported":
            raise
        shared = psutil.virtual_memory()
        return int(shared.total - shared.available), int(shared.total)
    return int(memory.used), int(memory.total)


def _profile(nvml: Any, handle: Any) -> str:
    """`1g.10gb`, where the name does not end in it."""
    attributes = _or_none(lambda: nvml.nvmlDeviceGetAttributes(handle))
    if attributes is None:
        return "unknown"
    return f"{attributes.gpuInstanceSliceCount}g.{round(attributes.memorySizeMB / 1024)}gb"


def _text(value: str | bytes) -> str:
    """nvidia-ml-py3 answers bytes, nvidia-ml-py text."""
    return value.decode() if isinstance(value, bytes) else value


def _or_none(read: Callable[[], T]) -> T | None:
    """What a device cannot tell is absent."""
    try:
        return read()
    except Exception:  # NVMLError_NotSupported and its like, or a function that the older package lacks
        return None
