"""The checks by their names, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deploy.validation import (
    compose,
    context,
    dockerfile_rules,
    hadolint,
    images,
    kubernetes,
    locks,
    pipeline,
    protos,
    scripts,
    secret_scan,
    yaml_files,
)
from deploy.validation.findings import Outcome
from deploy.validation.tree import Options, Tree


@dataclass(frozen=True)
class Check:
    """One concern."""

    name: str
    title: str
    run: Callable[[Tree, Options], Outcome]


CHECKS = (
    Check("hadolint", "Dockerfile: hadolint", hadolint.check),
    Check("dockerfile", "Dockerfile: stages, users, ports, health, pins, no secrets", dockerfile_rules.check),
    Check("context", "Build context: what .dockerignore keeps out", context.check),
    Check("compose", "compose.yaml: schema, Docker Compose, rights, limits, start order", compose.check),
    Check("locks", "Locks: as fresh as pyproject.toml", locks.check_fresh),
    Check("resolve", "Locks: pip can install them on Python 3.11", locks.check_resolvable),
    Check("yaml", "YAML: can be read", yaml_files.check),
    Check("pipeline", ".gitlab-ci.yml: GitLab's schema", pipeline.check),
    Check("kubernetes", "Kubernetes: schemas and rules of every overlay", kubernetes.check),
    Check("shell", "Shell: shellcheck over scripts and the pipeline", scripts.check),
    Check("protos", "Contract: buf lint", protos.check),
    Check("secrets", "Secrets: none in the sources", secret_scan.check),
    Check("build", "Images: build every target, start it, ask its health", images.check),
)
