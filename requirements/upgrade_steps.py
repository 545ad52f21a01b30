"""The steps of an upgrade check, each on a copy of the tree: a text says what was found, an exception why not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lock
import pins
from check import findings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


class Failed(Exception):
    """A step that was run and says no."""


class Unknown(Exception):
    """A step that could not be run, so that it says neither yes nor no."""


def elsewhere(root: Path) -> dict[str, str]:
    """The pins whose files lie at NVIDIA's index, with their versions: an index of all else cannot tell what is newer."""
    lines = [
        line
        for one in pins.SETS
        if one.file == pins.TENSORRT
        for line in pins.split(pins.direct(root, one), one.apart)[1]
    ]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in map(Requirement, lines)}


def newest(root: Path, sets: list[pins.Set], scratch: Path) -> list[tuple[str, str, str]]:
    """(package, our pin, the newest release for this Python) for each direct pin that has a newer one; asks the index.

    Those of `elsewhere` are left out.
    """
    ours: dict[str, str] = {}
    for one in sets:
        for requirement in map(Requirement, pins.direct(root, one)):
            ours[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    ours = {name: version for name, version in ours.items() if name not in elsewhere(root)}
    python = lock.tools(root, scratch / "tools", sys.executable, "pip")
    report = scratch / "newest.json"
    done = lock.dry_run(python, "--report", report, *sorted(ours))
    if done.returncode:
        raise Unknown(
            f"the index could not be asked:\n{done.stderr.strip()[-1500:]}\nCure: see `pip config list`; try again"
        )
    found = []
    for item in json.loads(report.read_text())["install"]:
        name, version = canonicalize_name(item["metadata"]["name"]), item["metadata"]["version"]
        if Version(version.split("+")[0]) > Version(ours[name]):
            found.append((name, ours[name], version.split("+")[0]))
    return sorted(found)


def copied(root: Path, to: Path) -> Path:
    """A copy of the working tree as it is, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    return to


def pinned(tree: Path, package: str) -> re.Match[str]:
    """Where the copy's pyproject.toml pins a package: its name with extras, its version."""
    name = "[-_.]+".join(map(re.escape, canonicalize_name(package).split("-")))
    found = re.search(rf'"({name}(?:\[[^\]]*\])?)==([^"]+)"', (tree / "pyproject.toml").read_text(), re.IGNORECASE)
    if not found:
        raise Unknown(
            f"pyproject.toml does not pin {package}. What others require moves by: make lock UPGRADE={package}"
        )
    return found


def repinned(tree: Path, package: str, version: str) -> str:
    """Changes the pin of a package in the copy's pyproject.toml; what it was."""
    found = pinned(tree, package)
    path = tree / "pyproject.toml"
    path.write_text(path.read_text().replace(found[0], f'"{found[1]}=={version}"'))
    return found[2]


def locked(tree: Path, names: list[str], upgrade: list[str], torch_cpu_links: str) -> str:
    """Locks anew in the copy; what has moved."""
    try:
        lock.lock(tree, names, upgrade, torch_cpu_links)
    except SystemExit as error:
        raise Failed(f"{error}\nCure: another version, or move together with it what it conflicts with") from None
    return f"{', '.join(names)}: what moved stands above"


def checked(tree: Path, names: list[str]) -> str:
    """The locks' own check, in the copy."""
    left = [line for line in findings(tree) if any(f"requirements/{name}." in line for name in names)]
    if left:
        raise Failed("\n".join(left))
    return "complete, exact, hashed"


def installed(tree: Path, one: pins.Set, into: Path, torch_cpu_links: str) -> str:
    """Installs a lock into an environment of its own, and asks pip whether all fits together."""
    subprocess.run([sys.executable, "-m", "venv", into], check=True)
    pip = [str(into / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    folder = tree / "requirements"
    calls = [[*pip, "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(folder / f"{one.name}.txt")]]
    if one.file:
        source = lock.beside_source(one, torch_cpu_links)
        calls.insert(0, [*pip, "install", "--quiet", "--no-deps", *source, "-r", str(folder / one.file)])
    for call in [*calls, [*pip, "check"]]:
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"pip {' '.join(call[4:])}:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    size_mb = sum(path.lstat().st_size for path in into.rglob("*") if path.is_file()) / 1e6
    return f"pip check: {done.stdout.strip()} {size_mb:.0f} MB"


def tested(tree: Path, environment: Path, tests: list[str]) -> str:
    """Runs tests of the copy in that environment, where the copy is installed as `make setup` installs the tree."""
    python = environment / "bin" / "python"
    ours = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--editable",
        str(tree),
    ]
    done = subprocess.run(ours, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"our own package cannot be installed:\n{done.stderr.strip()[-2000:]}")
    packages = next(environment.glob("lib/python3.*/site-packages"))
    (packages / "ai4thai-source.pth").write_text(f"{tree / 'clients'}\n{tree}\n")
    environ = {**os.environ, "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(python), "-m", "pytest", *tests], cwd=tree, env=environ, capture_output=True, text=True)
    tail = done.stdout.strip().splitlines()[-15:]
    if done.returncode:
        raise Failed("\n".join(tail))
    return tail[-1]


def audited(tree: Path, one: pins.Set) -> str:
    """Asks PyPI which versions of a lock have known holes."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        tree / "requirements" / f"{one.name}.txt",
    ]
    done = subprocess.run(
        [*command, "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"],
        capture_output=True,
        text=True,
    )
    try:
        asked = json.loads(done.stdout)["dependencies"]
    except ValueError:
        raise Unknown(
            f"pip-audit could not ask: {done.stderr.strip().splitlines()[-1:]}. Cure: a network that reaches PyPI"
        ) from None
    holes = [
        f"{item['name']} {item['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for item in asked
        for hole in item.get("vulns", ())
    ]
    if holes:
        raise Failed("\n".join([*holes, "Cure: make upgrade-check PACKAGE=… VERSION=…"]))
    skipped = [item["name"] for item in asked if "skip_reason" in item]
    if skipped:
        # pip-audit itself ends with 0 here, which would read as "no holes".
        raise Unknown(
            f"{len(skipped)} of {len(asked)} packages could not be asked about: this index lacks PyPI's JSON interface, and "
            "silence is no good news. Cure: run it where pypi.org itself is reached"
        )
    return f"{len(asked)} packages, no known holes"


def resolved(tree: Path, name: str, torch_cpu_links: str) -> str:
    """Asks the index, as `lock.py --resolve` does."""
    code = lock.resolve(tree, [name], sys.executable, torch_cpu_links)
    if code == lock.NOT_ASKED:
        raise Unknown(
            "the lock, each file with its hash; what was not asked stands above. Cure: a network that reaches it"
        )
    if code:
        raise Failed("pip says why above")
    return (
        "each file with its hash, and what is installed beside the lock"
        if pins.named(name).file
        else "each file with its hash"
    )


def validated(tree: Path) -> str:
    """Runs the validation of everything that delivers."""
    done = subprocess.run(["./validate-docker.sh"], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise Failed((done.stdout + done.stderr).strip()[-3000:])
    return done.stdout.strip().splitlines()[-1]
