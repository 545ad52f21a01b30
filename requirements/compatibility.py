"""Writes docs/compatibility.md: the tables from the locks, the reasons from compatibility.template.md."""

import tomllib
from pathlib import Path

import pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SHOWN = ("queue", "vision-cpu", "vision-gpu", "h100")
# (what the guide of 2025 calls it, its pin, the package that stands for it here, the heading of the reason in the template)
GUIDE = (
    ("torch", "2.2.2", "torch", "torch"),
    ("transformers", "4.39.3", "transformers", "transformers"),
    ("ultralytics", "8.1.47", "ultralytics-opencv-headless", "ultralytics"),
    ("bitsandbytes", "0.43.1", "bitsandbytes", "bitsandbytes"),
    ("nvidia-ml-py3", "7.352.0", "nvidia-ml-py", "nvidia-ml-py3"),
    ("celery", "(no version)", "dramatiq", "celery"),
)
# The oldest driver for each major version of CUDA; NVIDIA, "CUDA Compatibility", minor version compatibility, table 1:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVERS = {"12": "525", "13": "580"}
ABSENT = "–"


def _versions(root: Path) -> dict[str, dict[str, str]]:
    """For each set that is shown, what it has of each package; what is installed beside a lock counts too."""
    versions: dict[str, dict[str, str]] = {}
    for name in SHOWN:
        one = pins.named(name)
        locked = pins.read((root / "requirements" / f"{name}.txt").read_text())
        versions[name] = {pin.name: pin.version or pin.specifier for pin in locked}
        for requirement in map(Requirement, pins.split(pins.direct(root, one), one.apart)[1]):
            build = " (CPU)" if one.file == pins.TORCH_CPU else ""
            versions[name][canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==") + build
    return versions


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _guide(root: Path, versions: dict[str, dict[str, str]]) -> str:
    """The guide's matrix, with ours beside it."""
    python = tomllib.loads((root / "pyproject.toml").read_text())["project"]["requires-python"]
    lines = [_row("the guide (2025)", "its pin", *SHOWN, "why"), _row(*["---"] * (len(SHOWN) + 3))]
    lines.append(_row("Python", "3.11", *["3.11"] * len(SHOWN), f'the same: `requires-python = "{python}"`'))
    for called, pin, package, heading in GUIDE:
        name = called if called == package else f"{called} → {package}"
        cells = [versions[one].get(package, ABSENT) for one in SHOWN]
        lines.append(_row(name, pin, *cells, f"[{heading}](#{heading})"))
    cuda = ABSENT
    cells = []
    for one in SHOWN:
        toolkit = versions[one].get("cuda-toolkit")
        cuda = ".".join(toolkit.split(".")[:2]) if toolkit else ABSENT
        cells.append(cuda)
    lines.append(_row("CUDA (in torch's wheels)", "12.1 (torch 2.2.2's)", *cells, "[driver](#the-driver)"))
    drivers = [ABSENT if cell == ABSENT else f"≥ {DRIVERS[cell.split('.')[0]]}" for cell in cells]
    lines.append(_row("NVIDIA driver", "≥ 525", *drivers, "[driver](#the-driver)"))
    return "\n".join(lines)


def _direct(root: Path, versions: dict[str, dict[str, str]]) -> str:
    """Every package that pyproject.toml pins for the sets that are shown."""
    names = {canonicalize_name(Requirement(line).name) for one in SHOWN for line in pins.direct(root, pins.named(one))}
    lines = [_row("package", *SHOWN), _row(*["---"] * (len(SHOWN) + 1))]
    lines += [_row(name, *[versions[one].get(name, ABSENT) for one in SHOWN]) for name in sorted(names)]
    counts = [str(len(pins.read((root / "requirements" / f"{one}.txt").read_text()))) for one in SHOWN]
    lines.append(_row("**packages in the lock, with what these require**", *counts))
    return "\n".join(lines)


def written(root: Path) -> str:
    """The page, from the locks below `root`."""
    versions = _versions(root)
    page = (root / "requirements" / "compatibility.template.md").read_text()
    return page.replace("<!-- the guide's table -->", _guide(root, versions)).replace(
        "<!-- the table of direct pins -->", _direct(root, versions)
    )


def write(root: Path) -> None:
    """Writes the page where it differs."""
    (root / "docs" / "compatibility.md").write_text(written(root))


def stale(root: Path) -> str | None:
    """What is wrong with the page, with its cure; None: it says what the locks say."""
    page = root / "docs" / "compatibility.md"
    if page.exists() and page.read_text() == written(root):
        return None
    return "docs/compatibility.md does not say what the locks say. Cure: python requirements/lock.py --matrix"
