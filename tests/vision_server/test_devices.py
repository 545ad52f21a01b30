"""The devices as NVML tells of them: whole cards, MIG slices, old packages, errors; and how busy they are."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vision_server.devices import BusyRatios, Devices, read_devices
from vision_server.results import DeviceInfo

GIB = 2**30


class NVMLError(Exception):
    """As pynvml's: each code has a class of its own."""


class NVMLError_NotSupported(NVMLError):  # pynvml's name
    """Asked of what cannot tell."""


class NVMLError_NotFound(NVMLError):
    """No such slice."""


class NVMLError_NoPermission(NVMLError):
    """Not for this container."""


class NVMLError_GpuIsLost(NVMLError):
    """Fallen off the bus."""


@dataclass
class Slice:
    """A MIG slice."""

    uuid: str
    name: str
    used: int = 1 * GIB
    total: int = 10 * GIB


@dataclass
class Card:
    """A card; `slices` None: MIG is off. A place that is None is not there, or another container's."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    used: int = 3 * GIB
    total: int = 80 * GIB
    slices: list[Slice | None] | None = None
    fails: dict[str, NVMLError] = field(default_factory=dict)


class Nvml(ModuleType):
    """The module `pynvml` of nvidia-ml-py, before a machine with these cards."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *cards: Card) -> None:
        super().__init__("pynvml")
        self.cards = cards
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self._of_card(self.cards[index], "handle")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes | str) -> Any:
        wanted = uuid.decode() if isinstance(uuid, bytes) else uuid
        for one in (*self.cards, *(part for card in self.cards for part in card.slices or () if part)):
            if one.uuid == wanted:
                return one
        raise NVMLError_NotFound

    def nvmlDeviceGetIndex(self, handle: Any) -> int:
        return self.cards.index(self._of_card(handle, "index"))

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(handle.uuid)

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return str(handle.name)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        if isinstance(handle, Card):
            self._of_card(handle, "memory")
        return SimpleNamespace(used=handle.used, total=handle.total, free=handle.total - handle.used)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        if self._of_card(handle, "utilization").slices is not None:
            raise NVMLError_NotSupported
        return SimpleNamespace(gpu=37, memory=12)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        self._of_card(handle, "power")
        return 412_500

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        self._of_card(handle, "temperature")
        return 54

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        on = int(self._of_card(handle, "mig").slices is not None)
        return [on, on]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Slice:
        slices = self._of_card(handle, "slices").slices or []
        if index >= len(slices) or (found := slices[index]) is None:
            raise NVMLError_NotFound
        return found

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any) -> Card:
        return next(card for card in self.cards if handle in (card.slices or ()))

    def nvmlDeviceGetAttributes(self, handle: Any) -> Any:
        return SimpleNamespace(gpuInstanceSliceCount=1, memorySizeMB=handle.total // 2**20)

    def _of_card(self, handle: Any, what: str) -> Card:
        if not isinstance(handle, Card):
            raise NVMLError_NotSupported
        if what in handle.fails:
            raise handle.fails[what]
        return handle


class OldNvml(Nvml):
    """The module `pynvml` of nvidia-ml-py3 (2017): bytes instead of text, and nothing of MIG."""

    def __getattribute__(self, name: str) -> Any:
        if "Mig" in name or name == "nvmlDeviceGetAttributes":
            raise AttributeError(name)
        value = super().__getattribute__(name)
        if name in ("nvmlDeviceGetUUID", "nvmlDeviceGetName"):
            return lambda handle: value(handle).encode()
        if name == "nvmlDeviceGetHandleByUUID":

            def by_uuid(uuid: bytes) -> Any:
                assert isinstance(uuid, bytes)  # ctypes takes nothing else
                return value(uuid)

            return by_uuid
        return value


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[DeviceInfo, ...]]:
    """Reads the devices of a machine that a fake module tells of."""

    def read(nvml: Nvml, visible: str | None = None) -> tuple[DeviceInfo, ...]:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        devices = read_devices()
        assert nvml.open == 0
        return devices

    return read


Read = Callable[..., tuple[DeviceInfo, ...]]
WHOLE = Card("GPU-aaaa-1111")
SLICES: list[Slice | None] = [
    None,
    Slice("MIG-bbbb-1", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    Slice("MIG-bbbb-2", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", used=5 * GIB, total=40 * GIB),
]
CUT = Card("GPU-aaaa-2222", slices=SLICES)


@pytest.mark.parametrize("kind", [Nvml, OldNvml])
def test_a_whole_card_tells_everything(machine: Read, kind: type[Nvml]) -> None:
    [device] = machine(kind(WHOLE))
    assert device == DeviceInfo(
        index=0,
        kind="cuda",
        uuid="GPU-aaaa-1111",
        name="NVIDIA H100 80GB HBM3",
        mig_profile="",
        memory_used_bytes=3 * GIB,
        memory_total_bytes=80 * GIB,
        utilization=0.37,
        temperature_celsius=54.0,
        power_watts=412.5,
    )


@pytest.mark.parametrize("visible", [None, "0", "MIG-bbbb-1", "MIG-bbbb", "GPU-aaaa-2222"])
def test_a_slice_tells_what_is_its_own_and_nothing_else(machine: Read, visible: str | None) -> None:
    [device] = machine(Nvml(CUT), visible)
    assert (device.uuid, device.name, device.mig_profile) == ("MIG-bbbb-1", "NVIDIA H100 80GB HBM3", "1g.10gb")
    assert (device.memory_used_bytes, device.memory_total_bytes) == (1 * GIB, 10 * GIB)
    # The card's utilisation is not to be had; its power and warmth are the neighbours' too.
    assert device.utilization is device.power_watts is device.temperature_celsius is None


def test_the_slice_that_is_named_is_the_one_that_is_listed(machine: Read) -> None:
    [device] = machine(Nvml(WHOLE, CUT), "MIG-bbbb-2")
    assert (device.mig_profile, device.memory_total_bytes, device.index) == ("3g.40gb", 40 * GIB, 1)
    # A process gets one slice, however many are named.
    assert [d.uuid for d in machine(Nvml(CUT), "MIG-bbbb-2,MIG-bbbb-1")] == ["MIG-bbbb-2"]


def test_a_slice_whose_name_lacks_the_profile_has_one_all_the_same(machine: Read) -> None:
    bare = Card("GPU-c", slices=[Slice("MIG-c", "NVIDIA H100 80GB HBM3")])
    assert [d.mig_profile for d in machine(Nvml(bare))] == ["1g.10gb"]


def test_the_package_of_2017_finds_a_slice_that_is_named(machine: Read) -> None:
    [device] = machine(OldNvml(CUT), "MIG-bbbb-2")
    assert (device.uuid, device.mig_profile) == ("MIG-bbbb-2", "3g.40gb")
    assert (device.memory_total_bytes, device.utilization) == (40 * GIB, None)


def test_a_cut_card_without_a_slice_for_us_is_no_device_of_ours(machine: Read) -> None:
    others = Card("GPU-aaaa-3333", slices=[None, None])
    assert [d.uuid for d in machine(Nvml(others, WHOLE))] == ["GPU-aaaa-1111"]
    assert [d.kind for d in machine(Nvml(others))] == ["cpu"]


FOUR = [Card(f"GPU-{name}") for name in ("aa11", "aa22", "bb33", "cc44")]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        (" 3 ", [3]),
        ("GPU-bb", [2]),
        ("GPU-bb33,GPU-aa22", [2, 1]),
        ("GPU-aa", None),  # two begin so
        ("1,9,0", [1]),  # the list ends at the first that there is not
        ("1,-1,0", [1]),
        ("0,0", None),
        ("", None),
        ("-1", None),
        ("NoDevFiles", None),
    ],
)
def test_only_the_devices_that_the_process_may_use_are_listed(
    machine: Read, visible: str | None, expected: list[int] | None
) -> None:
    devices = machine(Nvml(*FOUR), visible)
    if expected is None:
        assert [device.kind for device in devices] == ["cpu"]
    else:
        assert [device.index for device in devices] == expected


@pytest.mark.parametrize("error", [NVMLError_NotSupported(), NVMLError_NoPermission(), NVMLError_GpuIsLost()])
@pytest.mark.parametrize("what", ["utilization", "power", "temperature", "mig"])
def test_what_cannot_be_read_is_absent(machine: Read, error: NVMLError, what: str) -> None:
    [device] = machine(Nvml(Card("GPU-x", fails={what: error})))
    absent = {"utilization": device.utilization, "power": device.power_watts, "temperature": device.temperature_celsius}
    assert {name for name, value in absent.items() if value is None} == {what} - {"mig"}


def test_a_card_that_is_lost_is_not_listed_and_the_others_are(machine: Read) -> None:
    lost = Card("GPU-lost", fails={"handle": NVMLError_GpuIsLost()})
    blind = Card("GPU-blind", fails={"memory": NVMLError_GpuIsLost()})
    assert [(d.index, d.uuid) for d in machine(Nvml(lost, blind, WHOLE))] == [(2, WHOLE.uuid)]


def test_a_card_without_memory_of_its_own_has_the_machines(machine: Read) -> None:
    [device] = machine(Nvml(Card("GPU-shared", fails={"memory": NVMLError_NotSupported()})))
    assert device.kind == "cuda" and 0 < device.memory_used_bytes < device.memory_total_bytes


def test_without_a_driver_the_cpu_is_the_device(machine: Read) -> None:
    class NoDriver(Nvml):
        def nvmlInit(self) -> None:
            raise NVMLError("Driver Not Loaded")

    [device] = machine(NoDriver())
    assert (device.kind, device.index, device.uuid) == ("cpu", 0, "")
    assert device.name and device.memory_total_bytes > device.memory_used_bytes > 0
    assert device.utilization is not None and 0 <= device.utilization <= 1
    assert device.temperature_celsius is None


def test_each_watcher_counts_from_its_own_last_time() -> None:
    busy_s = {"cpu": 0.0}
    began_s = time.perf_counter()
    often, seldom = BusyRatios(lambda: busy_s), BusyRatios(lambda: busy_s)
    made_s = time.perf_counter()
    time.sleep(0.2)
    busy_s["cpu"] = 0.1
    first = often.take()["cpu"]
    assert 0 < first <= 0.1 / 0.2
    time.sleep(0.1)
    assert often.take()["cpu"] == 0  # nothing since
    least_s = time.perf_counter() - made_s
    share = seldom.take()["cpu"]
    assert 0.1 / (time.perf_counter() - began_s) <= share <= 0.1 / least_s
    # within the least window the same moment counts
    busy_s["cpu"] += 1
    assert often.take(60)["cpu"] > 0 and often.take(60)["cpu"] > 0


async def test_watchers_share_a_reading_and_end_when_the_server_drains(
    machine: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml(Card("GPU-x"), Card("GPU-y"))
    machine(nvml)
    busy_s = {"cuda:1": 0.0}
    devices = Devices(lambda: busy_s)

    async def watched() -> list[tuple[DeviceInfo, ...]]:
        return [moment async for moment in devices.watch(0.1)]

    watching = [asyncio.create_task(watched()) for _ in range(3)]
    for _ in range(10):
        await asyncio.sleep(0.05)
        busy_s["cuda:1"] += 0.05
    devices.drain()
    async with asyncio.timeout(10):
        for moments in await asyncio.gather(*watching):
            assert len(moments) >= 2
            assert all([device.uuid for device in moment] == ["GPU-x", "GPU-y"] for moment in moments)
            assert all(moment[0].busy_ratio == 0 for moment in moments)
            assert any(moment[1].busy_ratio > 0 for moment in moments)
    assert (await devices.list())[0].busy_ratio == 0
