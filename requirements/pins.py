"""What is pinned: the direct pins in pyproject.toml, the sets that are locked, and the locks as they lie on the disk."""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Set:
    """One environment that is locked as a whole: what of pyproject.toml it has, and what is installed beside the lock."""

    name: str
    says: str
    extra: str
    # Whether our package is to run in it, and so needs `dependencies` of pyproject.toml.
    runs: bool = True
    # Installed before the lock, from a file of its own without hashes; `file` is that file.
    apart: tuple[str, ...] = ()
    file: str = ""


# The builds of torch==2.13.0 for the CPU and for CUDA are different files of the same version: no hash can stand for both.
TORCH_CPU = "torch-cpu.txt"
# PyPI has TensorRT's libraries as a placeholder only, which fetches the real file from NVIDIA's index while it is installed.
TENSORRT = "tensorrt.txt"
NVIDIA_INDEX = "https://pypi.nvidia.com"

SETS = (
    Set("queue", "The queue server and its workers: no GPU library.", "queue"),
    Set("vision-cpu", "The vision server on a CPU.", "vision", apart=("torch",), file=TORCH_CPU),
    Set("vision-gpu", "The vision server on NVIDIA GPUs, with torch for CUDA.", "vision"),
    Set(
        "h100",
        "The vision server on an H100: what vision-gpu has, exporting, nvImageCodec and TensorRT.",
        "h100",
        apart=("tensorrt-cu13",),
        file=TENSORRT,
    ),
    Set("dev", "Everything that tests and checks need, on a CPU.", "dev", apart=("torch",), file=TORCH_CPU),
    Set("build", "What builds our own wheel.", "build", runs=False),
)


@dataclass(frozen=True)
class Pin:
    """One package of a lock: its only version, the hashes of the files that may be installed, who asked for it."""

    name: str
    specifier: str
    hashes: tuple[str, ...]
    via: tuple[str, ...]

    @property
    def version(self) -> str | None:
        """None: not pinned to one version."""
        exact = re.fullmatch(r"==([^=,*]+)", self.specifier)
        return exact[1] if exact else None


def named(name: str) -> Set:
    """The set of this name; KeyError names those that there are."""
    for one in SETS:
        if one.name == name:
            return one
    raise KeyError(f"There is no set '{name}'; there are {', '.join(one.name for one in SETS)}.")


def direct(root: Path, one: Set) -> list[str]:
    """The requirements of pyproject.toml for a set, each once, with extras of our own package followed."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found: dict[str, None] = dict.fromkeys(project["dependencies"] if one.runs else ())
    followed: set[str] = set()

    def follow(extra: str) -> None:
        if extra in followed:
            return
        followed.add(extra)
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                for other in sorted(requirement.extras):
                    follow(other)
            else:
                found.setdefault(line)

    follow(one.extra)
    return list(found)


def split(lines: list[str], apart: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The lines for the lock, and those that are installed beside it."""
    beside = [line for line in lines if canonicalize_name(Requirement(line).name) in apart]
    return [line for line in lines if line not in beside], beside


def written_in(root: Path, one: Set) -> str:
    """The text of SET.in as it follows from pyproject.toml."""
    lines, beside = split(direct(root, one), one.apart)
    of = f"dependencies and the extra {one.extra}" if one.runs else f"the extra {one.extra}"
    head = [f"# {one.says}", f"# Written by `make lock` from pyproject.toml ({of}): change it there."]
    head += [f"# {line} is installed beside this lock: {one.file} says why." for line in beside]
    return "\n".join([*head, *sorted(lines, key=str.lower)]) + "\n"


def written_beside(root: Path, file: str) -> str:
    """The text of torch-cpu.txt or tensorrt.txt as it follows from pyproject.toml."""
    owner = next(one for one in SETS if one.file == file)
    _, beside = split(direct(root, owner), owner.apart)
    if file == TORCH_CPU:
        says = (
            "# torch for the CPU. It has no hash: the builds for the CPU and for CUDA are different files of one version, and a\n"
            "# machine may have either by its own configuration. Where pip has no CPU build of its own, name PyTorch's index:\n"
            f"#   pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r requirements/{file}\n"
        )
        return says + "".join(f"{line}\n" for line in beside)
    requirement = Requirement(beside[0])
    says = (
        "# TensorRT. It has no hash: PyPI has its libraries as a placeholder only, which fetches the real file from NVIDIA's\n"
        "# index while it is installed. With that index named pip takes the real file itself:\n"
        f"#   pip install --no-deps --extra-index-url {NVIDIA_INDEX} -r requirements/{file}\n"
    )
    return says + "".join(f"{requirement.name}{part}{requirement.specifier}\n" for part in ("", "-bindings", "-libs"))


def digest(text: str) -> str:
    """What a lock's head says about the .in file it was made from."""
    return hashlib.sha256(text.encode()).hexdigest()


def head_digest(lock: str) -> str | None:
    """The digest in the head of a lock; None: there is none."""
    found = re.search(r"^# made from \S+ sha256:([0-9a-f]{64})$", lock, re.MULTILINE)
    return found[1] if found else None


def read(lock: str) -> list[Pin]:
    """The packages of a lock (or of a .in file), in its order."""
    pins: list[Pin] = []
    for block in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]:
        line = block.split("\n", 1)[0].split(" #")[0].rstrip("\\ ")
        requirement = Requirement(line)
        comments = "\n".join(part.strip() for part in block.splitlines() if part.strip().startswith("#"))
        via = re.sub(r"^# ?(via)?", "", comments, flags=re.MULTILINE).split("\n")
        pins.append(
            Pin(
                name=canonicalize_name(requirement.name),
                specifier=str(requirement.specifier),
                hashes=tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)),
                via=tuple(text for text in (part.strip() for part in via) if text),
            )
        )
    return pins
