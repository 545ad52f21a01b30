"""Locks what pyproject.toml pins, tells whether a lock is stale, and tries whether it can be installed; see --help."""

import argparse
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import compatibility
import pins
from check import findings

HERE = Path(__file__).resolve().parent
# pip reads the few bytes of a wheel that say what it requires, where an index does not state that itself: without this,
# locking the GPU's set would download 3 GB. (pip 23.3 and newer; pyproject.toml's extra `build` pins which.)
PIP_ARGUMENTS = "--use-feature=fast-deps"
TORCH_CPU_LINKS = "https://download.pytorch.org/whl/cpu/torch/"
# What --resolve ends with when nothing is wrong, but not all could be asked.
NOT_ASKED = 3
_REACH_S = 15.0


def tools(root: Path, folder: Path, python: str, *names: str) -> Path:
    """An environment with these tools of the extras build and dev, at the versions that pyproject.toml pins; its Python."""
    lines = pins.direct(root, pins.named("build")) + pins.direct(root, pins.named("dev"))
    wanted = [line for line in lines if line.split("==")[0] in names]
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    subprocess.run([inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
    return inside


def compiled(python: Path, root: Path, one: pins.Set, upgrade: list[str], torch_cpu_links: str) -> str:
    """The text of SET.txt: pip-compile's answer to SET.in, keeping every version of the present lock that still suits."""
    folder = root / "requirements"
    source = (folder / f"{one.name}.in").read_text()
    lock = folder / f"{one.name}.txt"
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch, f"{one.name}.in"), Path(scratch, f"{one.name}.txt")
        more = ""
        if "torch" in one.apart:
            # The resolver has to know the CPU build, to follow what it requires and not what CUDA's does; it is taken out below.
            more = "".join(f"{line}\n" for line in pins.split(pins.direct(root, one), one.apart)[1])
        asked.write_text(source + more)
        if lock.exists():
            answer.write_text(lock.read_text())
        command: list[str | Path] = [
            python,
            HERE / "pip_compile.py",
            "--quiet",
            "--no-config",
            "--resolver=backtracking",
            "--generate-hashes",
        ]
        command += ["--allow-unsafe", "--strip-extras", "--no-header", "--no-emit-options", "--no-emit-index-url"]
        command += ["--no-emit-find-links", "--no-emit-trusted-host", "--pip-args", PIP_ARGUMENTS]
        command += ["--find-links", torch_cpu_links] if more else []
        command += ["--upgrade"] if upgrade == ["all"] else [f"--upgrade-package={name}" for name in upgrade]
        done = subprocess.run(
            [*command, "--output-file", answer.name, asked.name], cwd=scratch, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{one.name} cannot be locked:\n{reason(done.stderr)}")
        text = answer.read_text()
    if more:
        text, found = re.subn(r"^torch==[^+\s]+\+cpu .*?(?=^[a-z0-9])", "", text, flags=re.MULTILINE | re.DOTALL)
        if not found:
            raise SystemExit(
                f"{one.name} cannot be locked: no CPU build of torch was found at {torch_cpu_links}. "
                "Name a page or folder that has it: make lock TORCH_CPU_LINKS=…"
            )
    head = [
        f"# {one.says}",
        "# Locked by `make lock` (pip-compile, Python 3.11, Linux on x86-64); not to be edited by hand.",
        f"# made from {one.name}.in sha256:{pins.digest(source)}",
    ]
    if one.file:
        head.insert(1, f"# {', '.join(one.apart)}: installed by {one.file}, which says why.")
    return (
        "\n".join(head)
        + "\n"
        + re.sub(r"^# The following packages are considered.*\n|^#?\s*$\n", "", text, flags=re.MULTILINE).lstrip("\n")
    )


def reason(stderr: str) -> str:
    """Why pip-compile found no answer: which requirements exclude each other, else its last lines."""
    pattern = r"SpecifierRequirement\('([^']+)'\), parent=(?:None|\w+\('(?:[^' ]*/)?([^' /]+))"
    found = [
        f"{asked} is asked for by {(by or 'pyproject.toml').removesuffix('.whl')}"
        for asked, by in re.findall(pattern, stderr)
        if re.search(r"[<>=~!]", asked)
    ]
    if found and "ResolutionImpossible" in stderr:
        return "\n".join(["These exclude each other:", *(f"  {line}" for line in dict.fromkeys(found))])
    return "\n".join(stderr.strip().splitlines()[-5:])


def write_sources(root: Path, names: list[str]) -> None:
    """Writes SET.in and what is installed beside the locks, from pyproject.toml."""
    for one in map(pins.named, names):
        (root / "requirements" / f"{one.name}.in").write_text(pins.written_in(root, one))
        if one.file:
            (root / "requirements" / one.file).write_text(pins.written_beside(root, one.file))


def lock(root: Path, names: list[str], upgrade: list[str], torch_cpu_links: str) -> None:
    """Locks these sets anew below `root`, and writes the compatibility matrix."""
    write_sources(root, names)
    with tempfile.TemporaryDirectory() as scratch:
        python = tools(root, Path(scratch), sys.executable, "pip", "pip-tools")
        for one in map(pins.named, names):
            target = root / "requirements" / f"{one.name}.txt"
            before = {pin.name: pin.version for pin in pins.read(target.read_text())} if target.exists() else {}
            text = compiled(python, root, one, upgrade, torch_cpu_links)
            target.write_text(text)
            now = {pin.name: pin.version for pin in pins.read(text)}
            print(f"{one.name}: {len(now)} packages", *(told(before, now) if before else ()), sep="\n  ", flush=True)
    compatibility.write(root)


def told(before: dict[str, str | None], now: dict[str, str | None]) -> list[str]:
    """What has changed between two states of a lock, one line each."""
    lines = [f"{name} {before.get(name, '(new)')} → {now[name]}" for name in now if before.get(name) != now[name]]
    return lines + [f"{name} {before[name]} → (gone)" for name in before if name not in now]


def dry_run(tool: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Has pip say what it would install, of the packages named alone, whatever is there already; installs nothing."""
    command: list[str | Path] = [
        tool,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--ignore-installed",
        "--no-deps",
    ]
    command += [*PIP_ARGUMENTS.split(), "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def beside_source(one: pins.Set, torch_cpu_links: str) -> tuple[str, str]:
    """pip's option, and the address, by which it finds what is installed beside a lock."""
    return ("--find-links", torch_cpu_links) if one.file == pins.TORCH_CPU else ("--extra-index-url", pins.NVIDIA_INDEX)


def beside(tool: Path, root: Path, one: pins.Set, torch_cpu_links: str) -> tuple[int, str]:
    """Whether pip would install what a set has beside its lock: 0 and which files, 1 and why not, NOT_ASKED and why."""
    path = root / "requirements" / one.file
    packages = [pin.name for pin in pins.read(path.read_text())]
    option, address = beside_source(one, torch_cpu_links)
    reached = _reached(address)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        # Without it nothing is lost that pip has by its own configuration, and nobody waits for pip's retries.
        source = [option, address] if reached else []
        if one.file == pins.TENSORRT:  # PyPI's placeholders of the libraries are sources
            source += ["--only-binary", ",".join(packages[1:])]
        done = dry_run(tool, "--report", report, "-r", path, *source)
        found = json.loads(report.read_text())["install"] if done.returncode == 0 else []
    versions = {item["metadata"]["name"]: item["metadata"]["version"] for item in found}
    wrong = "" if found else done.stderr.strip()[-2000:]
    if one.file == pins.TORCH_CPU and found and not all("+cpu" in version for version in versions.values()):
        wrong = (
            f"pip would take the build for CUDA; {address} has none for the CPU. Name another place: TORCH_CPU_LINKS=…"
        )
    if not wrong:
        return 0, ", ".join(f"{name} {version}" for name, version in versions.items())
    if not reached:
        return NOT_ASKED, f"requirements/{one.file}, since {address} cannot be reached"
    return 1, f"requirements/{one.file} cannot be installed:\n{wrong}"


def _reached(address: str) -> bool:
    """Whether a page's server answers, or a folder is there."""
    if "://" not in (path := address.removeprefix("file://")):
        return Path(path).exists()
    try:
        urllib.request.urlopen(address, timeout=_REACH_S).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError as error:
        # Somebody is there; pip may have other certificates.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def resolve(root: Path, names: list[str], python: str, torch_cpu_links: str) -> int:
    """Whether pip would install these locks, hashes and all, on this machine's Python 3.11: asks the index, installs nothing.

    What is installed beside a lock is asked for too. 0: it would; 1: not; 2: it is another Python; NOT_ASKED: it would, as far as
    it could be asked.
    """
    failed, not_asked = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        tool = tools(root, Path(scratch), python, "pip")
        version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
        if not version.startswith("3.11."):
            print(
                f"The locks are for Python 3.11; {python} is {version}. Name another: --python python3.11",
                file=sys.stderr,
            )
            return 2
        for name in names:
            path = root / "requirements" / f"{pins.named(name).name}.txt"
            done = dry_run(tool, "--require-hashes", "-r", path)
            if done.returncode:
                failed = 1
                print(f"{name} cannot be installed as locked:\n{done.stderr.strip()[-2000:]}", file=sys.stderr)
                print(
                    "Either the index cannot be reached, or a release was withdrawn. Cure: make lock", file=sys.stderr
                )
            else:
                count = len(pins.read(path.read_text()))
                print(
                    f"{name}: pip on Python {version} would install all {count} packages, each with a hash from the lock."
                )
            if pins.named(name).file:
                code, text = beside(tool, root, pins.named(name), torch_cpu_links)
                if code == 1:
                    failed = 1
                    print(f"{name}: {text}\nCure: another version in pyproject.toml, then make lock", file=sys.stderr)
                elif code == NOT_ASKED:
                    not_asked = NOT_ASKED
                    print(f"not asked: {text}")
                else:
                    print(f"{name}: and beside the lock, without a hash: {text}")
    return failed or not_asked


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sets", nargs="*", metavar="SET", help="the sets to lock: " + ", ".join(one.name for one in pins.SETS)
    )
    parser.add_argument(
        "--upgrade", default="", metavar="PACKAGES", help="packages, or 'all', that may move to newer versions"
    )
    parser.add_argument(
        "--check", action="store_true", help="tell what is stale, offline and in a second; exit 1 if anything is"
    )
    parser.add_argument("--matrix", action="store_true", help="only write docs/compatibility.md")
    parser.add_argument(
        "--resolve", nargs="+", metavar="SET", help="try whether pip would install these locks; installs nothing"
    )
    parser.add_argument("--python", default=sys.executable, help="the Python 3.11 that --resolve tries it with")
    parser.add_argument("--root", type=Path, default=pins.ROOT, help=argparse.SUPPRESS)
    parser.add_argument(
        "--torch-cpu-links",
        default=os.environ.get("TORCH_CPU_LINKS") or TORCH_CPU_LINKS,
        metavar="LINKS",
        help="a page or folder with torch's build for the CPU (also TORCH_CPU_LINKS; default %(default)s)",
    )
    asked = parser.parse_args()
    root: Path = asked.root.resolve()
    try:
        for name in [*asked.sets, *(asked.resolve or ())]:
            pins.named(name)
    except KeyError as error:
        parser.error(error.args[0])
    if asked.resolve:
        return resolve(root, asked.resolve, asked.python, asked.torch_cpu_links)
    if asked.check:
        found = findings(root)
        print(
            *found or ["The locks are fresh: they say what pyproject.toml pins."],
            sep="\n",
            file=sys.stderr if found else None,
        )
        return 1 if found else 0
    if asked.matrix:
        compatibility.write(root)
        return 0
    lock(
        root,
        asked.sets or [one.name for one in pins.SETS],
        asked.upgrade.replace(",", " ").split(),
        asked.torch_cpu_links,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
