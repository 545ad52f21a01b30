"""With --build: every target is built for real, started, and asked for its health."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.validation import tools
from deploy.validation.dockerfile_model import read_stages
from deploy.validation.dockerfile_rules import FILE, SERVING, STAGES
from deploy.validation.findings import Finding, Outcome, ToolMissing
from deploy.validation.tree import Options, Tree

CHECK_SCRIPT = "deploy/image-check.sh"
_NO_ENGINE = (
    "Install Docker Engine (https://docs.docker.com/engine/install/) and start it, or `apt-get install buildah`; "
    "without --build all other checks run."
)


@dataclass(frozen=True)
class Engine:
    """What builds: Docker with BuildKit, or buildah."""

    name: str
    program: str

    def build(self, target: str, tag: str, accelerator: str) -> list[str]:
        """The command that builds a target."""
        command = [self.program, "build" if self.name == "docker" else "bud"]
        if self.name == "buildah":
            # HEALTHCHECK is of Docker's format alone; with layers, what one target has built the next one takes.
            command += ["--format", "docker", "--layers"]
        command += ["--target", target, "--tag", tag, "--build-arg", f"ACCELERATOR={accelerator}"]
        return [*command, *shlex.split(os.environ.get("BUILD_ARGUMENTS", "")), "."]

    def size_bytes(self, tag: str, tree: Tree) -> int:
        """How large the image is, unpacked."""
        if self.name == "docker":
            done = tools.run([self.program, "image", "inspect", "--format", "{{.Size}}", tag], tree.root)
            return int(done.stdout or 0)
        done = tools.run([self.program, "images", "--json", tag], tree.root)
        sizes = [image["size"] for image in json.loads(done.stdout or "[]")]
        return _bytes(sizes[0]) if sizes else 0


def check(tree: Tree, options: Options) -> Outcome:
    """Times and sizes are in the note; a target that does not build does not keep the others from it."""
    del options
    engine = find_engine()
    # What is deployed is gpu, which takes gigabytes and a GPU to be tried; the note tells which of the two was.
    accelerator = os.environ.get("ACCELERATOR", "cpu")
    there = {stage.name for stage in read_stages(tree.read(FILE))}
    wanted = os.environ.get("BUILD_TARGETS", "").split() or [name for name in STAGES if name in there]
    findings: list[Finding] = []
    notes = [f"{engine.name}, ACCELERATOR={accelerator}"]
    for target in wanted:
        tag = f"localhost/team10-validation:{target}"
        _say(f"building {target} with {engine.name} …")
        begun = time.monotonic()
        command = engine.build(target, tag, accelerator)
        failure = _run_aloud(command, tree, {"DOCKER_BUILDKIT": "1"})
        seconds = time.monotonic() - begun
        if failure:
            wrong = f"the target {target!r} does not build: {failure}"
            cure = f"Build it by hand to see all of it: {shlex.join(command)}"
            findings.append(Finding(FILE, tree.line_of(FILE, f"AS {target}"), wrong, cure))
            continue
        note = f"{target} {engine.size_bytes(tag, tree) / 1e6:,.0f} MB in {seconds:.0f} s"
        if target in (*SERVING, "development") and tree.exists(CHECK_SCRIPT):
            _say(f"starting {target} …")
            begun = time.monotonic()
            environment = {"ENGINE": engine.name, "ACCELERATOR": accelerator}
            failure = _run_aloud(["bash", CHECK_SCRIPT, tag, target], tree, environment)
            if failure:
                wrong = f"the image of {target!r} does not start as it should: {failure}"
                cure = f"Try it by hand: ENGINE={engine.name} ACCELERATOR={accelerator} {CHECK_SCRIPT} {tag} {target}"
                findings.append(Finding(CHECK_SCRIPT, 0, wrong, cure))
            else:
                note += f", healthy and checked in {time.monotonic() - begun:.0f} s"
        notes.append(note)
    return Outcome.of(findings, note="; ".join(notes))


def find_engine() -> Engine:
    """Docker where its engine answers, else buildah; raises ToolMissing when neither is there."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "info"], capture_output=True).returncode == 0:
        return Engine("docker", docker)
    if buildah := shutil.which("buildah"):
        return Engine("buildah", buildah)
    raise ToolMissing("An engine that builds images (docker, or buildah)", _NO_ENGINE)


def _run_aloud(command: Sequence[str], tree: Tree, environment: dict[str, str]) -> str:
    """Shows what the command says as it says it; empty when it went well, else its last lines."""
    with subprocess.Popen(
        command,
        cwd=tree.root,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as running:
        assert running.stdout
        last: list[str] = []
        for line in running.stdout:
            sys.stderr.write(f"  {line}")
            if line.strip():
                last = [*last[-4:], line.strip()]
    return "" if running.returncode == 0 else f"exit code {running.returncode}: " + " | ".join(last)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bytes(text: str) -> int:
    """buildah's `1.23 GB` as a number."""
    number, _, unit = text.partition(" ")
    return round(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}.get(unit.upper(), 1))
