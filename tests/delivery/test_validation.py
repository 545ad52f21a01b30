"""validate-docker.sh: right of the sources as they are, and each fault planted into a copy is named with its cure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.validation.__main__ import main
from tests.delivery import planted
from tests.delivery.planted import ROOT, Fault, copy_sources, plant

VENV = Path(sys.prefix)


def validate(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [root / "validate-docker.sh", *arguments],
        cwd="/",
        env={**os.environ, "VENV": str(VENV), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def checked(
    root: Path, check: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """What `./validate-docker.sh --only CHECK --json` prints there, with its exit code."""
    monkeypatch.chdir(root)
    capsys.readouterr()
    code = main(["--only", check, "--offline", "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == code
    return answer


def assert_told(answer: dict[str, Any], fault: Fault) -> None:
    assert answer["exit_code"] == 1
    findings = answer["checks"][0]["findings"]
    said = [finding for finding in findings if fault.says in finding["wrong"]]
    assert said, f"{fault.name}: nobody says {fault.says!r}; said was {findings}"
    assert any(fault.cure in finding["cure"] for finding in said), said
    assert all(finding["path"] for finding in said)


@pytest.mark.timeout(400)
def test_the_sources_are_right() -> None:
    done = validate(ROOT, "--offline", "--json")

    answer = json.loads(done.stdout)
    wrong = {
        check["name"]: check["findings"] or check["missing"]
        for check in answer["checks"]
        if check["findings"] or check["missing"]
    }
    assert not wrong
    assert done.returncode == answer["exit_code"] == 0
    states = {check["name"]: check["state"] for check in answer["checks"]}
    assert states.pop("resolve") == "left out"
    assert set(states.values()) == {"right"}
    assert len(states) == 11


@pytest.mark.parametrize("fault", planted.SINGLE, ids=lambda fault: f"{fault.check}: {fault.name}")
def test_a_planted_fault_is_named_with_its_cure(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_sources(tmp_path, *planted.READS[fault.check])
    if fault.check == "context":
        add_history_and_tools(tmp_path)
    plant(tmp_path, fault)

    answer = checked(tmp_path, fault.check, monkeypatch, capsys)

    assert_told(answer, fault)


def add_history_and_tools(root: Path) -> None:
    """What lies beside the sources in a checkout: history and tools, here without content."""
    for name, size in (
        (".git/HEAD", 100),
        (".git/objects/pack/pack-1.pack", 30_000_000),
        (".venv/lib/torch.so", 300_000_000),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)  # takes no room on the disk


@pytest.mark.parametrize(
    "faults",
    [planted.COMPOSE, planted.SHELL],
    ids=["compose.yaml", "shell scripts"],
)
def test_faults_planted_together_are_all_named(
    faults: tuple[Fault, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_sources(tmp_path, *planted.READS[faults[0].check])
    for fault in faults:
        plant(tmp_path, fault)

    answer = checked(tmp_path, faults[0].check, monkeypatch, capsys)

    for fault in faults:
        assert_told(answer, fault)


def test_planted_secrets_are_found_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_sources(tmp_path, *planted.READS["secrets"])
    for fault in planted.SECRETS:
        plant(tmp_path, fault)

    answer = checked(tmp_path, "secrets", monkeypatch, capsys)

    for fault in planted.SECRETS:
        assert_told(answer, fault)
    assert {finding["path"] for finding in answer["checks"][0]["findings"]} == {fault.file for fault in planted.SECRETS}


def test_a_context_that_leaves_out_next_to_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below the ceiling, and yet no reduction by 60 %: there is nothing here but what images need."""
    copy_sources(tmp_path, *planted.READS["context"])

    answer = checked(tmp_path, "context", monkeypatch, capsys)

    assert answer["exit_code"] == 1
    assert any("and 60% less than all" in finding["wrong"] for finding in answer["checks"][0]["findings"])


def test_a_manifest_that_kubernetes_would_refuse_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_sources(tmp_path, *planted.READS["kubernetes"])
    for overlay in (tmp_path / "deploy/kubernetes/overlays").iterdir():
        if overlay.name != "cpu":
            shutil.rmtree(overlay)
    plant(tmp_path, planted.KUBERNETES)

    answer = checked(tmp_path, "kubernetes", monkeypatch, capsys)

    assert_told(answer, planted.KUBERNETES)


def test_the_script_tells_file_line_and_cure_and_sums_up(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    fault = next(fault for fault in planted.SINGLE if fault.name == "root")
    plant(tmp_path, fault)
    line = (tmp_path / "Dockerfile").read_text().splitlines().index("USER root") + 1

    done = validate(tmp_path, "--only", "dockerfile", "--only", "yaml")

    assert done.returncode == 1, done.stdout + done.stderr
    assert f"Dockerfile:{line} the target 'queue' runs as root" in done.stdout
    assert "→ End it with `USER 10001:10001`." in done.stdout
    assert "✓ YAML: can be read" in done.stdout
    assert "Failed: dockerfile. One alone: ./validate-docker.sh --only dockerfile" in done.stdout


def test_an_index_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    copy_sources(tmp_path, "validate-docker.sh", "deploy/validation", "deploy/kubernetes", "requirements")
    nobody = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}

    done = validate(tmp_path, "--only", "resolve", **nobody)

    assert done.returncode == 1
    assert "the package index cannot be reached" in done.stdout
    assert "--offline" in done.stdout


def test_without_the_tools_it_says_how_to_get_them(tmp_path: Path) -> None:
    nothing = validate(ROOT, VENV=str(tmp_path / "nowhere"))
    assert nothing.returncode == 2
    assert "run 'make setup' first" in nothing.stderr

    unknown = validate(ROOT, "--only", "nothing")
    assert unknown.returncode == 2
    assert "invalid choice: 'nothing'" in unknown.stderr

    assert "exit codes:" in validate(ROOT, "--help").stdout


def engine(folder: Path, script: str) -> str:
    """A PATH with nothing on it but what the script itself needs, and a `docker` that says what it is told to say."""
    folder.mkdir()
    for program in ("bash", "dirname", "git"):
        (folder / program).symlink_to(str(shutil.which(program)))
    if script:
        (folder / "docker").write_text(f"#!{shutil.which('bash')}\n{script}")
        (folder / "docker").chmod(0o755)
    return str(folder)


def test_without_an_engine_the_build_says_so(tmp_path: Path) -> None:
    done = validate(ROOT, "--build", "--only", "build", PATH=engine(tmp_path / "bin", ""))

    assert done.returncode == 2, done.stdout
    assert "docker, or buildah" in done.stdout
    assert "Install Docker Engine" in done.stdout
    assert "Could not run: build." in done.stdout


def test_the_build_goes_through_every_target_and_names_those_that_fail(tmp_path: Path) -> None:
    # given an engine that cannot build one target, and an image that does not become healthy
    root = copy_sources(tmp_path / "tree")
    says = """case "$1" in
  info) ;;
  image) echo 123456789 ;;
  build)
    echo "$*" >> "${BASH_SOURCE[0]%/*}/log"
    case "$*" in *"--target h100-optimized"*) echo "no space left"; exit 1 ;; esac ;;
esac
"""
    unhealthy = 'case "$2" in queue) echo "does not drain"; exit 1 ;; *) echo "$1 is well" ;; esac\n'
    plant(root, Fault("", "", "deploy/image-check.sh", (root / "deploy/image-check.sh").read_text(), unhealthy, "", ""))

    # when everything is built
    path = engine(tmp_path / "bin", says)
    done = validate(root, "--only", "build", PATH=path, BUILD_ARGUMENTS="--build-arg PYTHON_IMAGE=mirror/python:3.11")

    # then each target was asked for, and both faults are told with the command to look closer
    assert done.returncode == 1, done.stdout + done.stderr
    builds = (tmp_path / "bin/log").read_text().splitlines()
    assert [line.split("--target ")[1].split()[0] for line in builds] == [
        "base",
        "development",
        "production",
        "h100-optimized",
        "queue",
    ]
    assert all("--build-arg ACCELERATOR=cpu --build-arg PYTHON_IMAGE=mirror/python:3.11 ." in line for line in builds)
    assert "the target 'h100-optimized' does not build: exit code 1: no space left" in done.stdout
    assert "the image of 'queue' does not start as it should: exit code 1: does not drain" in done.stdout
    assert "production 123 MB in" in done.stdout
