"""What is stale or unsafe in the locks: read from files alone, so that every commit can afford it."""

import re
from pathlib import Path

import compatibility
import pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

RELOCK = "Cure: make lock"
# What belongs to a GPU, and may not come into the queue's image, not even as a dependency's dependency.
GPU = re.compile(
    r"torch|torchvision|triton|transformers|accelerate|bitsandbytes|ultralytics.*|onnxruntime.*|openvino|tensorrt.*|nvidia-.*|cuda-.*"
)
# CUDA's own packages: none of them in a lock for the CPU. (nvidia-ml-py only asks the driver, where there is one.)
CUDA = re.compile(r"triton|cuda-.*|tensorrt.*|nvidia-(?!ml-py$).*")


def findings(root: Path) -> list[str]:
    """Everything that is wrong with requirements/ and docs/compatibility.md, a line each with its cure; [] when nothing is."""
    found = [line for one in pins.SETS for line in (*_sources(root, one), *_lock(root, one))]
    found += _differing(root)
    if not found and (stale := compatibility.stale(root)):
        found.append(stale)
    return list(dict.fromkeys(found))


def _sources(root: Path, one: pins.Set) -> list[str]:
    """What SET.in, and the file of what is installed beside the lock, do not say as pyproject.toml does."""
    wanted = {f"{one.name}.in": pins.written_in(root, one)}
    if one.file:
        wanted[one.file] = pins.written_beside(root, one.file)
    found = []
    for name, text in wanted.items():
        path = root / "requirements" / name
        if not path.exists():
            found.append(f"requirements/{name} is missing. {RELOCK}")
        elif path.read_text() != text:
            there, due = _requirements(path.read_text()), _requirements(text)
            differing = [f"{line} is missing" for line in due if line not in there]
            differing += [f"{line} is not in pyproject.toml" for line in there if line not in due]
            found.append(
                f"requirements/{name} does not say what pyproject.toml says: "
                f"{'; '.join(differing) or 'other comments or order'}. {RELOCK} (change pins in pyproject.toml)"
            )
    return found


def _requirements(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _lock(root: Path, one: pins.Set) -> list[str]:
    path = root / "requirements" / f"{one.name}.txt"
    name = f"requirements/{path.name}"
    if not path.exists():
        return [f"{name} is missing. {RELOCK}"]
    text = path.read_text()
    found = [
        f"{name} has '{line.strip()}', which is one machine's own configuration. Cure: take the line out"
        for line in text.splitlines()
        if re.match(r"-(?!-hash)|[^#].*(\s@\s|://)", line.strip())
    ]
    source = path.with_suffix(".in")
    if source.exists() and pins.head_digest(text) != pins.digest(source.read_text()):
        found.append(f"{name} was not made from {source.name} as it is now. {RELOCK}")
    locked = pins.read(text)
    by_name = {pin.name: pin for pin in locked}
    wanted, _ = pins.split(pins.direct(root, one), one.apart)
    for requirement in map(Requirement, wanted):
        pin = by_name.get(canonicalize_name(requirement.name))
        if pin is None:
            found.append(f"{name} lacks {requirement}, which pyproject.toml asks for. {RELOCK}")
        elif pin.version is not None and not requirement.specifier.contains(pin.version, prereleases=True):
            found.append(f"{name} has {pin.name} {pin.version}, and pyproject.toml asks for {requirement}. {RELOCK}")
    beside = set(one.apart)
    for pin in locked:
        if pin.version is None:
            found.append(f"{name}: {pin.name}{pin.specifier} is not pinned to one version (==). {RELOCK}")
        elif "+" in pin.version:
            found.append(f"{name}: {pin.name} {pin.version} is a local build that PyPI does not have. {RELOCK}")
        if not pin.hashes:
            found.append(f"{name}: {pin.name} has no hash, so any file would be taken for it. {RELOCK}")
        parents = [by for by in pin.via if not by.startswith("-r ")]
        if not pin.via:
            found.append(f"{name}: nobody asked for {pin.name}: it was written in by hand. {RELOCK}")
        found += [
            f"{name}: {pin.name} is there for {by}, which is not. {RELOCK}"
            for by in parents
            if canonicalize_name(by) not in by_name and canonicalize_name(by) not in beside
        ]
        if one.name in ("queue", "build") and GPU.fullmatch(pin.name):
            found.append(
                f"{name}: {pin.name} is a GPU library ({', '.join(pin.via)}). Cure: take out of pyproject.toml's extra "
                f"{one.extra} what brings it, then make lock"
            )
        elif "torch" in one.apart and CUDA.fullmatch(pin.name):
            found.append(f"{name}: {pin.name} belongs to CUDA, and this lock is for the CPU. {RELOCK}")
    return found


def _differing(root: Path) -> list[str]:
    """Packages that two locks have at two versions: what was tested here would not be what runs there."""
    seen: dict[str, dict[str | None, list[str]]] = {}
    for one in pins.SETS:
        path = root / "requirements" / f"{one.name}.txt"
        for pin in pins.read(path.read_text()) if path.exists() else ():
            seen.setdefault(pin.name, {}).setdefault(pin.version, []).append(path.name)
    return [
        f"{name} is locked at several versions: "
        + ", ".join(f"{version} in {'/'.join(files)}" for version, files in versions.items())
        + f". Cure: make lock UPGRADE={name}"
        for name, versions in seen.items()
        if len(versions) > 1
    ]
