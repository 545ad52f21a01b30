"""Runs the examples of the README and the docs against a running platform, and holds its tables against the code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.programs import needed

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# A block follows a comment with what it must print; blocks of `sh` set the platform up and are not run from within a test of it.
EXAMPLE = re.compile(r"<!-- prints: (?P<words>.+?) -->\n```(?P<language>\w+)\n(?P<code>.+?)```", re.DOTALL)


@dataclass(frozen=True)
class Example:
    language: str
    code: str
    words: tuple[str, ...]


PAGES = (README, *(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))))
EXAMPLES = [
    Example(match["language"], match["code"], tuple(match["words"].split(", ")))
    for page in PAGES
    for match in EXAMPLE.finditer(page)
]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The platform as `ai4thai up` starts it; the README's addresses with those it has really got."""
    folder = tmp_path_factory.mktemp("readme")
    output = folder / "up.txt"
    env = {**_env(), "AI4THAI_DATA_DIR": str(folder / "data")}
    command = [sys.executable, "-m", "ai4thai.cli", "up", "--free-ports"]
    with output.open("w") as file:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        until_s = time.monotonic() + 100
        while "Ctrl-C stops everything" not in output.read_text("utf-8"):
            if process.poll() is not None or time.monotonic() > until_s:
                raise AssertionError(output.read_text("utf-8"))
            time.sleep(0.1)
        found = re.search(r"AI4THAI_VISION_ADDRESS=(\S+) AI4THAI_QUEUE_ADDRESS=(\S+)", output.read_text("utf-8"))
        assert found is not None
        yield {"localhost:2001": found[1], "localhost:2003": found[2]}
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like the root, where examples may write."""
    for name in ("clients", "protos"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_every_block_is_an_example_or_sets_up() -> None:
    languages = [language for page in PAGES for language in re.findall(r"^```(\w+)", page, re.MULTILINE)]
    assert len(EXAMPLES) == sum(language in ("python", "bash") for language in languages)
    assert {example.language for example in EXAMPLES} == {"python", "bash"}
    assert set(languages) <= {"python", "bash", "sh", "text", "console", "yaml"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: " ".join(example.code.split()[:2]))
def test_examples_print_what_they_promise(example: Example, addresses: dict[str, str], folder: Path) -> None:
    code = example.code
    if re.search(r"\bcurl ", code):
        needed("curl")
    for written, real in addresses.items():
        code = code.replace(written, real)
    command = [sys.executable, "-c", code] if example.language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    env = {
        **_env(),
        "AI4THAI_VISION_ADDRESS": addresses["localhost:2001"],
        "AI4THAI_QUEUE_ADDRESS": addresses["localhost:2003"],
        "COLUMNS": "140",
    }

    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=110, check=False)

    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    for word in example.words:
        assert word in printed, printed


def test_python_needs_ten_lines() -> None:
    example = next(example for example in EXAMPLES if example.language == "python")
    assert len([line for line in example.code.splitlines() if line.strip()]) <= 10


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets


def test_the_tree_is_there() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    paths = [match[1] for match in re.finditer(r"^(\S+)  +\S", tree, re.MULTILINE)]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_settings_exist() -> None:
    code = "".join(
        (ROOT / path).read_text("utf-8")
        for path in (
            "vision_server/settings.py",
            "queue_server/settings.py",
            "serving/settings.py",
            "clients/ai4thai/cli_options.py",
        )
    )
    for name in re.findall(r"`([A-Z0-9]+_[A-Z_0-9]+)`", README.split("## Settings")[1].split("## ")[0]):
        prefix, _, rest = name.partition("_")
        field = rest.lower() if prefix in ("VISION", "QUEUE", "SERVING") else name
        assert name in code or f"{field}:" in code, name


def test_what_is_to_come_is_what_the_contract_says() -> None:
    """The contract marks each method, field and value that is not served yet; the table lists these and no others."""
    told = "".join(re.findall(r"^\|(.+)\| to come", README, re.MULTILINE))
    protos = "".join(path.read_text("utf-8") for path in sorted((ROOT / "protos/ai4thai").rglob("*_service.proto")))
    methods = re.findall(r"Not served yet: UNIMPLEMENTED\.\n\s+rpc (\w+)", protos)
    assert set(re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", told)) - {"DetectOptions", "StreamConfig"} == set(methods)
    values = re.findall(r"Not served yet: UNIMPLEMENTED\.\n\s+(?:TRACKER|OVERFLOW)_(\w+) =", protos)
    assert set(re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)?\b", told)) - {"UNIMPLEMENTED"} == set(values)


def _env() -> dict[str, str]:
    paths = [str(ROOT / "clients"), str(ROOT)]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AI4THAI_", "REDIS_"))},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(paths),
    }
