"""Can the models compute on the GPU: driver, CUDA, MIG slices, what is visible, against what is asked for."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ai4thai.doctor.findings import Finding, Level, Situation, gigabytes
from ai4thai.doctor.gpu_cards import Card, Driver, GpuBroken, NoGpu, read_driver

LEAST_DRIVERS: Final = {11: "450.80", 12: "525.60", 13: "580.65"}
"""By CUDA's major version; any of its minor versions runs on these (CUDA's minor version compatibility)."""
_NEEDED = "Install a driver (nvidia-smi must list the GPU); in a container start it with the GPU: docker run --gpus all"


def check_gpu(situation: Situation) -> Iterator[Finding]:
    """No GPU is a failure only where VISION_DEVICE asks for one."""
    device = situation.env.get("VISION_DEVICE", "") or "auto"
    wanted = [name for name in device.replace(" ", "").split(",") if name.startswith("cuda")]
    if device == "cpu":
        yield Finding("gpu", Level.NOTE, "VISION_DEVICE is cpu: no GPU is looked for")
        return
    try:
        driver = read_driver()
    except NoGpu as error:
        if wanted:
            yield Finding(
                "gpu",
                Level.FAILURE,
                f"VISION_DEVICE is {device}, and there is no GPU ({error})",
                f"{_NEEDED}. Or VISION_DEVICE=auto.",
            )
        else:
            yield Finding("gpu", Level.OK, f"no GPU: the CPU computes ({error})")
        return
    except GpuBroken as error:
        yield Finding(
            "gpu",
            Level.FAILURE,
            f"the GPU's driver answers with an error: {error}",
            "After an update of the driver: restart the machine. In a container: restart it; "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility. Else: sudo dmesg | grep -i xid",
        )
        return
    yield from _check_driver(driver, bool(wanted))
    for card in driver.cards:
        yield _check_card(card)
    yield from _check_visible(situation, driver, device, wanted)


def _check_driver(driver: Driver, is_wanted: bool) -> Iterator[Finding]:
    told = f"driver {driver.version}" + (f", CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda[0] else "")
    built = torch_cuda()
    if built is None:
        yield Finding("gpu", Level.OK, f"{told} (torch is not installed here)")
    elif built == "":
        yield Finding(
            "gpu",
            Level.FAILURE if is_wanted else Level.WARNING,
            f"{told}, but torch is its CPU build: the models compute on the CPU",
            "Build the image with ACCELERATOR=gpu, or install requirements/vision-gpu.txt.",
        )
    elif driver.cuda[0] and int(built.split(".")[0]) > driver.cuda[0]:
        major = int(built.split(".")[0])
        yield Finding(
            "gpu",
            Level.FAILURE,
            f"{told}, which is too old: torch is built for CUDA {built}",
            f"Install driver {LEAST_DRIVERS.get(major, 'of that CUDA')} or newer.",
        )
    else:
        yield Finding("gpu", Level.OK, f"{told}; torch is built for CUDA {built}")


def _check_card(card: Card) -> Finding:
    told = f"{card.index}: {card.name}, {gigabytes(card.used_bytes)} of {gigabytes(card.total_bytes)} used"
    if card.slices is None:
        return Finding("gpu", Level.OK, told)
    if not card.slices:
        return Finding(
            "gpu",
            Level.FAILURE,
            f"{told}; MIG is on, but there is no slice for this process",
            "sudo nvidia-smi mig -lgip lists profiles, sudo nvidia-smi mig -cgi PROFILE -C makes a slice; a container is given "
            "one by its UUID.",
        )
    return Finding("gpu", Level.OK, f"{told}; MIG slices: {', '.join(card.slices)} (a process uses one)")


def _check_visible(situation: Situation, driver: Driver, device: str, wanted: list[str]) -> Iterator[Finding]:
    visible = situation.env.get("CUDA_VISIBLE_DEVICES")
    usable = len(driver.cards)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        known = [name for name in names if _is_there(name, driver)]
        usable = len(known)
        if len(known) < len(names) or not visible:
            yield Finding(
                "gpu",
                Level.FAILURE if wanted or any(names) else Level.WARNING,
                f"CUDA_VISIBLE_DEVICES is {visible!r}: "
                + (f"there is no {next(n for n in names if n not in known)}" if any(names) else "it hides every GPU"),
                "nvidia-smi -L lists numbers and UUIDs; what stands behind the first one that there is not is hidden.",
            )
        else:
            yield Finding("gpu", Level.OK, f"CUDA_VISIBLE_DEVICES is {visible}")
    for name in wanted:
        number = int(name[5:]) if name[5:].isdecimal() else 0
        if usable and number >= usable:
            yield Finding(
                "gpu",
                Level.FAILURE,
                f"VISION_DEVICE is {device}, but this process sees {usable} GPU{'s' * (usable > 1)}, counted from 0",
                "Name one that is there, or let it see more (CUDA_VISIBLE_DEVICES, the container's GPUs).",
            )


def _is_there(name: str, driver: Driver) -> bool:
    if name.isdecimal():
        return any(card.index == int(name) for card in driver.cards)
    uuids = [uuid for card in driver.cards for uuid in (card.uuid, *(card.slices or ()))]
    return len(name) > 4 and any(uuid.startswith(name) for uuid in uuids)


def torch_cuda() -> str | None:
    """The CUDA that torch is built for; empty: a CPU build; None: no torch. Reads its file, since an import takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda(?:: [^=]+)? = '([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else ""
