"""deploy/image-check.sh against a stand-in for docker: a server that ends at its start, GPUs, and what --build says of both."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from deploy.image.__main__ import ON_A_GPU
from deploy.validation import images
from deploy.validation.tree import Options, Tree
from tests.processes import ROOT

LABELS = ("title", "description", "licenses", "version", "revision", "created")
IMAGE = {
    "User": "10001:10001",
    "Entrypoint": ["tini", "--"],
    "Cmd": ["python", "-m", "vision_server"],
    "Healthcheck": {"Test": ["CMD", "ai4thai", "health"]},
    "Labels": {f"org.opencontainers.image.{name}": "x" for name in LABELS},
    "StopSignal": "SIGTERM",
}
# A container whose main process has ended: nothing can be run in it, it has no ports, its log is all that is left.
ENDED = """
case $1 in
  create) echo c1 ;;
  start|rm) ;;
  exec) echo "container c1 is not running" >&2; exit 1 ;;
  port) echo "no public port" >&2; exit 1 ;;
  inspect) echo false ;;
  logs) echo "ValueError: VISION_MAX_BATCH is no number" ;;
esac
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` on PATH that notes each command in `log` and answers as `says` lets it."""
    folder = tmp_path / "docker"
    folder.mkdir()
    program = folder / "docker"
    image = json.dumps([{"Config": IMAGE}])
    program.write_text(
        "#!/usr/bin/env bash\n"
        'echo "$*" >> "${0%/*}/log"\n'
        f"""case $* in "image inspect --format"*) echo 1000000 ;; "image inspect"*) echo '{image}' ;; esac\n"""
        '. "${0%/*}/says"\n'
    )
    program.chmod(0o755)
    (folder / "says").write_text(ENDED)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("ENGINE", "docker")
    monkeypatch.delenv("ACCELERATOR", raising=False)
    return folder


def image_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "image-check.sh", "team10-vision:1", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def told(docker: Path, command: str) -> list[str]:
    return [line for line in (docker / "log").read_text().splitlines() if line.startswith(f"{command} ")]


@pytest.mark.parametrize("target", ["production", "queue"])
def test_a_server_that_ends_at_its_start_is_told_at_once_with_its_log(docker: Path, target: str) -> None:
    began_s = time.monotonic()
    done = image_check(target)

    assert done.returncode == 1
    assert time.monotonic() - began_s < 20  # not the 15 minutes that models may take
    assert "HEALTHCHECK passes: its main process has ended; the log tells why" in done.stderr
    assert "ValueError: VISION_MAX_BATCH is no number" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(told(docker, "rm")) == len(told(docker, "create"))


def test_a_server_that_ends_after_it_was_healthy_is_a_fault_with_its_log(docker: Path) -> None:
    # given one whose commands succeed, and whose port is gone when it is asked for
    (docker / "says").write_text(ENDED.replace('exec) echo "container c1 is not running" >&2; exit 1', "exec) exit 0"))

    done = image_check("production")

    assert done.returncode == 1
    assert "docker port: no public port" in done.stderr
    assert "ValueError: VISION_MAX_BATCH is no number" in done.stderr
    assert "Traceback" not in done.stderr
    assert told(docker, "rm")


def test_a_container_that_cannot_be_started_is_removed(docker: Path) -> None:
    (docker / "says").write_text(ENDED.replace("start|rm) ;;", 'rm) ;; start) echo "no such device" >&2; exit 1 ;;'))

    done = image_check("production")

    assert done.returncode == 1
    assert "no such device" in done.stderr
    assert "Traceback" not in done.stderr
    assert told(docker, "rm")


@pytest.mark.parametrize("target", ON_A_GPU)
def test_an_image_for_gpus_is_given_them_and_must_compute_there(
    docker: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setenv("ACCELERATOR", "gpu")
    done = image_check(target)

    (created,) = told(docker, "create")
    assert "--gpus all" in created
    assert "VISION_DEVICE=cuda" in created
    (asked,) = (line for line in told(docker, "exec") if "torch.cuda.is_available()" in line)
    assert ("tensorrt" in asked) == (target == "h100-optimized")
    assert f"a GPU for {', '.join(ON_A_GPU[target])}: " in done.stderr


def test_which_gpus_can_be_said_and_the_cpu_is_given_none(docker: Path) -> None:
    image_check("production", "--gpus", "device=1")
    image_check("production")
    image_check("queue", "--gpus", "all")

    with_gpu, *without = told(docker, "create")
    assert "--gpus device=1" in with_gpu
    assert not [line for line in without if "--gpus" in line or "VISION_DEVICE" in line]


def test_a_chroot_has_no_gpu_to_give(tmp_path: Path, docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (docker / "buildah").write_text("#!/bin/sh\n")
    (docker / "buildah").chmod(0o755)
    monkeypatch.setenv("ENGINE", "buildah")
    done = image_check("h100-optimized", "--gpus", "all")

    assert done.returncode == 2
    assert "GPUs need ENGINE=docker" in done.stderr


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_a_build_says_which_of_the_two_variants_was_tried(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str
) -> None:
    # given a tree whose check notes what it is told
    root = tmp_path / "tree"
    (root / "deploy").mkdir(parents=True)
    (root / "Dockerfile").write_text("FROM python:3.11-slim-bookworm AS h100-optimized\n")
    (root / images.CHECK_SCRIPT).write_text('echo "$ENGINE $ACCELERATOR" > told\n')
    if accelerator == "gpu":
        monkeypatch.setenv("ACCELERATOR", "gpu")

    outcome = images.check(Tree(root), Options(build=True))

    assert outcome.note.startswith(f"docker, ACCELERATOR={accelerator}; h100-optimized ")
    assert f"--build-arg ACCELERATOR={accelerator}" in told(docker, "build")[0]
    assert (root / "told").read_text().split() == ["docker", accelerator]
