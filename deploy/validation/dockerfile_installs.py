"""That what the image installs is pinned: by a lock file, or by its exact version."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from deploy.validation.dockerfile_model import Instruction, Stage, shell_commands, substitute
from deploy.validation.findings import Finding
from deploy.validation.tree import Tree

# pip's options that take the next word as their value.
_TAKES_VALUE = {
    "-c", "--constraint", "-i", "--index-url", "--extra-index-url", "-f", "--find-links", "-t", "--target", "--prefix", "--root",
    "-w", "--wheel-dir", "-d", "--dest", "--python-version", "--platform", "--only-binary", "--no-binary", "--progress-bar",
    "--timeout", "--retries", "--config-settings", "--cache-dir", "--src", "--python", "--trusted-host", "--cert", "--report",
}  # fmt: skip
# A package from this folder or a wheel that an earlier line built: it is as it is.
_LOCAL = re.compile(r"(\.{0,2}/|\.$|\.\[|.*\.whl$|file:)")
_PINNED = re.compile(r"[\w.-]+(\[[\w,.-]+\])?\s*(===?)\s*[^*\s]+$|[\w.-]+(\[[\w,.-]+\])?\s*@\s")


def install_findings(tree: Tree, file: str, stages: list[Stage]) -> Iterator[Finding]:
    """Over every RUN of every stage."""
    for stage in stages:
        values = stage.values
        for instruction in stage.own:
            if instruction.name != "RUN":
                continue
            text = substitute(instruction.text, values)
            for command in shell_commands(text):
                line = _line(tree, file, instruction, command)
                yield from _purge_findings(file, line, command)
                if (arguments := _pip_arguments(command)) is not None:
                    yield from _cache_findings(file, line, stage, instruction, arguments)
                    yield from _pin_findings(tree, file, line, arguments)


def _line(tree: Tree, file: str, instruction: Instruction, command: Sequence[str]) -> int:
    """The line of a command within its RUN, which may be many lines long."""
    lines = tree.read(file).splitlines()
    for number in range(instruction.line, len(lines) + 1):
        if all(word in lines[number - 1] for word in command[:3]):
            return number
        if number > instruction.line and re.match(r"(RUN|FROM|COPY|ENV|USER|LABEL|WORKDIR)\s", lines[number - 1]):
            break
    return instruction.line


def _pip_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows `pip install` or `pip wheel`; None when the command is something else."""
    for position, word in enumerate(command[:-1]):
        if re.fullmatch(r"pip[\d.]*", PurePosixPath(word).name):  # also behind `python -m`, `uv`, `xargs`
            rest = list(command[position + 1 :])
            while rest and rest[0].startswith("-"):  # options before the command's name
                rest = rest[2:] if rest[0] in _TAKES_VALUE else rest[1:]
            if rest and rest[0] in ("install", "wheel", "download"):
                return rest[1:]
    return None


def _purge_findings(file: str, line: int, command: Sequence[str]) -> Iterator[Finding]:
    words = " ".join(command)
    if re.search(r"\bpip[\d.]*\s+cache\s+purge\b", words):
        wrong = "`pip cache purge` fails where the cache is switched off, and removes nothing from the layers before it"
        yield Finding(file, line, wrong, "Remove it: `--no-cache-dir` leaves nothing to purge.")


def _cache_findings(
    file: str, line: int, stage: Stage, instruction: Instruction, arguments: Sequence[str]
) -> Iterator[Finding]:
    mounted = any("type=cache" in flag and "pip" in flag for flag in instruction.flags)
    switched_off = stage.environment.get("PIP_NO_CACHE_DIR", ("", 0))[0].lower() in ("1", "true", "yes", "on")
    if not ("--no-cache-dir" in arguments or mounted or switched_off):
        wrong = f"`pip install {' '.join(arguments)}` leaves its cache in the layer"
        yield Finding(file, line, wrong, "Add `--no-cache-dir`.")


def _pin_findings(tree: Tree, file: str, line: int, arguments: Sequence[str]) -> Iterator[Finding]:
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if word in ("-r", "--requirement") or word.startswith(("--requirement=", "-r")):
            if word in ("-r", "--requirement"):
                lock, position = arguments[position], position + 1
            else:
                lock = word.removeprefix("--requirement=").removeprefix("-r")
            yield from _lock_findings(tree, file, line, lock)
        elif word in ("-e", "--editable"):
            continue  # what is installed follows as the next word
        elif word in _TAKES_VALUE:
            position += 1
        elif re.match(r"\d*[<>]", word):  # where the shell sends the output
            break
        elif not word.startswith("-") and not _LOCAL.match(word) and not _PINNED.match(word):
            wrong = f"`pip install {word}` takes whatever version is newest on the day of the build"
            yield Finding(
                file,
                line,
                wrong,
                f"Put it into a lock file (requirements/*.in, `make lock`) or write `{_bare(word)}==VERSION`.",
            )


def _lock_findings(tree: Tree, file: str, line: int, lock: str) -> Iterator[Finding]:
    name = PurePosixPath(lock).name
    if "$" in name:
        wrong = f"which lock file `-r {lock}` means depends on a build argument without a default"
        yield Finding(file, line, wrong, "Give the build argument a default.")
    elif not tree.exists(f"requirements/{name}") or not name.endswith(".txt"):
        wrong = f"`-r {lock}` is no lock file: there is no requirements/{name}, or it is not what pip-compile writes (*.txt)"
        yield Finding(file, line, wrong, "Install from requirements/*.txt, which `make lock` writes.")


def _bare(requirement: str) -> str:
    found = re.match(r"[\w.-]+(\[[\w,.-]+\])?", requirement)
    return found[0] if found else requirement
