"""compose.yaml as Docker Compose itself understands it, and where in the file a value stands."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from deploy.validation import tools, yaml_lines
from deploy.validation.findings import Finding
from deploy.validation.tree import Tree

FILE = "compose.yaml"
Service = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """One profile's services with every variable, anchor and `extends` carried out."""

    profile: str
    content: Mapping[str, Any]
    documents: tuple[yaml.Node, ...]

    @property
    def services(self) -> Mapping[str, Service]:
        """By their names."""
        services: Mapping[str, Service] = self.content["services"]
        return services

    def finding(self, path: tuple[str, ...], wrong: str, cure: str) -> Finding:
        """A finding at the line of the value, or of the nearest thing around it that compose.yaml says itself."""
        return Finding(FILE, yaml_lines.line_of(self.documents, *path), f"{wrong} (profile {self.profile})", cure)


def read(tree: Tree, profile: str, *, password: bool) -> Model | Finding:
    """The model of `cpu` or `gpu`, with or without a password's file; the finding is Compose's own complaint.

    Variables and .env of this machine do not count.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "/")}
        if profile != "cpu":
            environment["COMPOSE_PROFILES"] = profile
        if password:
            environment["REDIS_PASSWORD_FILE"] = file.name
        command = [_compose(), "--file", FILE, "--env-file", os.devnull, "config", "--format", "json"]
        done = tools.run(command, tree.root, environment=environment)
    if done.returncode:
        complaint = done.stderr.strip().replace(str(tree.root), ".")
        found = re.search(r"line (\d+)", complaint)
        cure = "Correct it; `docker compose config` shows what Compose makes of the file."
        return Finding(
            FILE, int(found[1]) if found else 0, f"Compose refuses it (profile {profile}): {complaint}", cure
        )
    return Model(profile, json.loads(done.stdout), tuple(yaml_lines.read_all(tree.read(FILE))))


def _compose() -> str:
    return tools.find("docker-compose")


def seconds(duration: str | None) -> float:
    """Compose's `1m30s` in seconds; 0 for none."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|us|h|m|s)", duration or ""))
