"""A host to deploy to, without processes: docker only records, and verify.sh says what a test says of the version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import programs
from tests.delivery.docker_engine import Engine, Version
from tests.processes import ROOT

REGISTRY = "registry.example/team10"
VERIFY = """\
#!/bin/bash
source "$(dirname "$0")/../release.env"
echo "verifying $VISION_IMAGE $*"
! grep -qxF "${VISION_IMAGE##*@}" "$BAD_VERSIONS"
"""


class RecordingEngine(Engine):
    """Docker without processes: `compose up` is recorded, with the images that the release names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.live: list[str] = []
        self.did: list[str] = []
        """What compose was told to change: `stop worker`, `up redis vision queue`."""
        self.recreated: list[str] = []
        """The releases for which every container was made anew, changed or not."""
        self.restarts = 0
        """By how many each look at a container finds it started again."""
        self._looks = 0

    def _compose(self, words: list[str], told: dict[str, Any]) -> str:
        release = Path(words[words.index("--env-file") + 1])
        if "up" in words and "worker" not in words:
            self.live.append(release.parent.name)
        for command in {"up", "stop"} & set(words):
            rest = words[words.index(command) :]
            self.did.append(" ".join(word for word in rest if not word.startswith("--")))
        if "--force-recreate" in words and "worker" in words:
            self.recreated.append(release.parent.name)
        return "team10-vision | ImportError: last words\n" if "logs" in words else ""

    def _inspect(self, words: list[str], told: dict[str, Any]) -> str:
        if "Mounts" in words[1]:
            return super()._inspect(words, told)
        self._looks += self.restarts
        return f"{self._looks}\n"


@dataclass
class Host:
    """A host to deploy to, from a checkout of its own."""

    engine: RecordingEngine
    root: Path
    state: Path
    bad: Path
    environment: dict[str, str] = field(default_factory=dict)

    def deploy(self, tag: str, environment: str = "production", **variables: str) -> subprocess.CompletedProcess[str]:
        return self._run("deploy.sh", environment, tag, **variables)

    def rollback(
        self, *arguments: str, script: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return self._run(script or "rollback.sh", *arguments, **variables)

    def built(self, *tags: str) -> None:
        for tag in tags:
            self.engine.push(REGISTRY, tag, Version(vision=tag, queue=tag))

    def is_bad(self, *tags: str) -> None:
        digests = [self.engine.registry[f"{REGISTRY}/vision:{tag}"].digest for tag in tags]
        self.bad.write_text("".join(f"{digest}\n" for digest in digests))

    def kept(self) -> dict[str, bytes]:
        """The lists and secrets of production, by name."""
        home = self.state / "production"
        return {
            str(path.relative_to(home)): path.read_bytes()
            for path in [*home.iterdir(), *home.glob("secrets/*")]
            if path.is_file()
        }

    def _run(self, script: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.root / "deploy" / script), *arguments]
        return subprocess.run(
            command, env=self.env(**variables), cwd="/", capture_output=True, text=True, timeout=100, check=False
        )

    def env(self, **variables: str) -> dict[str, str]:
        """What a person, or a job, has in the environment."""
        path = [self.engine.path, "/usr/bin", "/bin", Path(sys.executable).parent]
        return {
            "PATH": os.pathsep.join(map(str, path)),
            "HOME": str(self.state),
            "AI4THAI_STATE_DIR": str(self.state),
            "CI_REGISTRY_IMAGE": REGISTRY,
            "COMPOSE_PROFILES": "cpu",
            "BAD_VERSIONS": str(self.bad),
            **variables,
        }

    def plain_compose(self, environment: str, *added: str) -> dict[str, Any]:
        """What the real compose makes of the release that is live, in its folder and told nothing but further files."""
        current = self.state / environment / "current"
        command = [str(Path(sys.executable).with_name("docker-compose"))]
        command += [word for file in ("compose.yaml", *added) for word in ("--file", file)] if added else []
        command += ["config", "--format", "json"]
        env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PWD": str(current)}
        done = subprocess.run(command, cwd=current, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def verified(self, environment: str = "production") -> list[str]:
        return (self.state / environment / "verified").read_text().split()

    def running(self, environment: str = "production") -> str:
        return (self.state / environment / "running").read_text().strip()


@contextmanager
def recording_host(tmp_path: Path) -> Iterator[Host]:
    """With v1, v2 and v3 in the registry."""
    programs.needed("curl")
    root = tmp_path / "checkout"
    (root / "deploy").mkdir(parents=True)
    for name in ("compose.yaml", "clients"):
        (root / name).symlink_to(ROOT / name)
    for name in ("compose", "envoy", "prometheus", "grafana", "ci", "deploy.sh", "rollback.sh"):
        (root / "deploy" / name).symlink_to(ROOT / "deploy" / name)
    (root / "deploy/verify.sh").write_text(VERIFY)
    (root / "deploy/verify.sh").chmod(0o755)
    (tmp_path / "bad").write_text("")
    with RecordingEngine(tmp_path / "engine") as engine:
        host = Host(engine, root, tmp_path / "state", tmp_path / "bad")
        host.built("v1", "v2", "v3")
        yield host
        assert engine.faults == []
