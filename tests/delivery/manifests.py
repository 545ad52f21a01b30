"""The rendered overlays, and where in them a test finds what it asks for or spoils."""

from __future__ import annotations

import functools
import re
from typing import Any

from deploy.kubernetes import objects
from deploy.kubernetes.objects import HERE, Objects, Workload

OVERLAYS = ("cpu", "h100", "mig", "production")


@functools.cache
def rendered(overlay: str) -> Objects:
    """What kubectl makes of it; to be copied before it is changed."""
    return objects.render(HERE / "overlays" / overlay)


def of(found: Objects, component: str) -> Workload:
    workload = found.workload(component)
    assert workload
    return workload


def at(found: Objects, kind: str, name: str) -> Any:
    document = found.named(kind, name)
    assert document, f"{kind} {name}"
    return document


def pod(found: Objects, name: str) -> Any:
    return at(found, "StatefulSet" if name == "redis" else "Deployment", f"ai4thai-{name}")["spec"]["template"]["spec"]


def container(found: Objects, name: str) -> Any:
    return pod(found, name)["containers"][0]


def environment(found: Objects, name: str) -> Any:
    [document] = [one for one in found.of("ConfigMap") if re.fullmatch(rf"ai4thai-{name}-\w+", one["metadata"]["name"])]
    return document["data"]


def policy(found: Objects, name: str) -> Any:
    return at(found, "NetworkPolicy", name)["spec"]


def without(found: Objects, kind: str, name: str) -> Objects:
    return Objects(found.overlay, tuple(one for one in found.documents if one is not found.named(kind, name)))
