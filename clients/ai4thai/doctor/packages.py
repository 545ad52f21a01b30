"""Is this the Python that we need, and are the packages the ones that we pin?"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any, Final

from ai4thai.doctor.findings import Finding, Level, Situation

PYTHON: Final = (3, 11)
_PIN = re.compile(
    r"(?P<name>[\w.-]+)(?:\[[\w,-]*\])?\s*==\s*(?P<version>[^\s;]+)(?:\s*;\s*extra\s*==\s*['\"](?P<part>[\w-]+)['\"])?"
)
# What servers run with; `dev` and `build` are for those who change them.
_PARTS: Final = ("", "serving", "vision", "export", "h100", "queue")
_SHOWN = 6


def check_python(_situation: Situation) -> Iterator[Finding]:
    """The version that both services are pinned to."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == PYTHON:
        yield Finding("python", Level.OK, f"{version}, {sys.executable}")
        return
    yield Finding(
        "python",
        Level.FAILURE,
        f"{version}; the services, torch and bitsandbytes are tested with 3.11 alone",
        "Make the environment with python3.11: make setup PYTHON=python3.11",
    )


def check_packages(_situation: Situation) -> Iterator[Finding]:
    """Ours as pyproject.toml pins them, then whether those of others fit together, as `pip check` sees it."""
    installed = _installed()
    try:
        required = metadata.requires("ai4thai") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages", Level.NOTE, "ai4thai is not installed as a package, so that its pins are not known here"
        )
        return
    pins = _pins(required)
    wrong, count, parts = [], 0, []
    for part, wanted in pins.items():
        # A part is meant to be here when most of it is: the queue's image has nothing of `vision`, on purpose.
        if part not in _PARTS or sum(name in installed for name in wanted) * 2 <= len(wanted):
            continue
        parts.append(part or "client")
        count += len(wanted)
        wrong += [
            (name, version, installed.get(name))
            for name, version in wanted.items()
            if not _is(installed.get(name), version)
        ]
    if wrong:
        told = ", ".join(f"{name} {here or 'missing'} (pinned: {version})" for name, version, here in wrong[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        asked = " ".join(f"{name}=={version}" for name, version, _ in wrong[:_SHOWN])
        yield Finding(
            "packages", Level.FAILURE, told + more, f"pip install {asked}, or build the image anew from its lock file."
        )
    else:
        yield Finding("packages", Level.OK, f"{count} of {count} pins are kept ({', '.join(parts)})")
    yield from _check_others(installed)


def _check_others(installed: Mapping[str, str]) -> Iterator[Finding]:
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # the queue's image has no use for it
        return
    broken = []
    for distribution in metadata.distributions():
        for text in distribution.requires or ():
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            here = installed.get(_plain(need.name))
            if here is None or not need.specifier.contains(here, prereleases=True):
                broken.append(f"{_name(distribution)} needs {need.name}{need.specifier}, here is {here or 'none'}")
    if broken:
        told = "; ".join(sorted(set(broken))[:_SHOWN])
        yield Finding("packages", Level.WARNING, told, "pip check tells all; a fresh environment has none of these.")


def _installed() -> dict[str, str]:
    """Versions by name; of two on the path the first one counts, as it does when it is imported."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        found.setdefault(_plain(_name(distribution)), distribution.version)
    return found


def _name(distribution: metadata.Distribution) -> str:
    # A folder that a broken uninstall has left has no name.
    headers: Any = distribution.metadata
    return str((headers["Name"] if headers else None) or "?")


def _pins(required: list[str]) -> dict[str, dict[str, str]]:
    """Name to version by part (extra); the part of what is always needed is empty."""
    pins: dict[str, dict[str, str]] = defaultdict(dict)
    for text in required:
        if (found := _PIN.match(text)) is not None:
            pins[found["part"] or ""][_plain(found["name"])] = found["version"]
    return pins


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is(here: str | None, pinned: str) -> bool:
    # `2.13.0+cpu` is torch 2.13.0: the build is told by the check of the GPU.
    return here is not None and here.partition("+")[0] == pinned
