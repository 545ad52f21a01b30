"""How compose.yaml's services hang together: names, start order, ports, networks, secrets, Redis' promises, the GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.validation.compose_model import FILE, Model
from deploy.validation.findings import Finding
from deploy.validation.ports import QUEUE_PORT, VISION_PORT
from deploy.validation.tree import Tree

SERVICES = ("redis", "vision", "queue", "worker")
_PUBLISHED = {"vision": VISION_PORT, "queue": QUEUE_PORT}
_PORT_VARIABLE = {"vision": "VISION_SERVICE_PORT", "queue": "QUEUE_WORKER_PORT"}
# redis → vision → queue → worker, who waits for whom and how. The queue takes jobs while models load.
_HEALTHY = "service_healthy"
_ORDER = (
    ("vision", "redis", (_HEALTHY,)),
    ("queue", "redis", (_HEALTHY,)),
    ("queue", "vision", ("service_started", _HEALTHY)),
    ("worker", "vision", (_HEALTHY,)),
    ("worker", "queue", (_HEALTHY,)),
)
_SECRET_NAME = re.compile(r"(^|_)(PASSWORD|SECRET|TOKEN|API_KEY|ACCESS_KEY|PRIVATE_KEY)$", re.I)
_NEEDS_PASSWORD = ("redis", "queue", "worker")


def wiring_findings(tree: Tree, model: Model) -> Iterator[Finding]:
    """Of the services together."""
    for name in SERVICES:
        if name not in model.services:
            cure = f"Add it; the services are {', '.join(SERVICES)}."
            yield model.finding(("services",), f"there is no service {name!r}", cure)
            return
    for name in SERVICES:
        container = model.services[name].get("container_name")
        if container != f"team10-{name}":
            wrong = f"{name}: its container is called {container!r}; the runbook looks for team10-{name}"
            yield model.finding(("services", name, "container_name"), wrong, f"Write `container_name: team10-{name}`.")
    yield from _order_findings(model)
    yield from _port_findings(model)
    yield from _network_findings(model)
    yield from _secret_findings(model)
    yield from _redis_findings(tree, model)
    yield from _gpu_findings(model)


def _order_findings(model: Model) -> Iterator[Finding]:
    for name, before, conditions in _ORDER:
        found = model.services[name].get("depends_on", {}).get(before, {}).get("condition")
        if found not in conditions:
            says = f"waits for {before} by {found!r}" if found else f"does not wait for {before}"
            wrong = f"{name}: it {says}; the start order is redis → vision → queue → worker, by health"
            cure = f"Write `depends_on: {{{before}: {{condition: {conditions[0]}}}}}`."
            yield model.finding(("services", name, "depends_on", before), wrong, cure)


def _port_findings(model: Model) -> Iterator[Finding]:
    for name, service in model.services.items():
        wanted = _PUBLISHED.get(name)
        ports: list[dict[str, Any]] = service.get("ports", [])
        for port in ports:
            both = (str(port.get("published", "")), str(port["target"]))
            if both != (str(wanted), str(wanted)):
                wrong = f"{name}: the port {both[0] or 'any'}:{both[1]} is published; only vision's 2001 and queue's 2003 may be"
                cure = (
                    f"Write `{wanted}:{wanted}`."
                    if wanted
                    else "Remove `ports`: the others reach it by the internal network."
                )
                yield model.finding(("services", name, "ports"), wrong, cure)
        if wanted and not ports:
            wrong = f"{name}: its port {wanted} is not published"
            yield model.finding(("services", name, "ports"), wrong, f'Write `ports: ["{wanted}:{wanted}"]`.')
    for name, variable in _PORT_VARIABLE.items():
        value = str(model.services[name].get("environment", {}).get(variable, _PUBLISHED[name]))
        if value != str(_PUBLISHED[name]):
            wrong = f"{name}: {variable} is {value}, but the port {_PUBLISHED[name]} is published"
            yield model.finding(("services", name, "environment", variable), wrong, f"Write {_PUBLISHED[name]}.")


def _network_findings(model: Model) -> Iterator[Finding]:
    networks = model.content.get("networks", {})
    inner = {name for name, network in networks.items() if (network or {}).get("internal")}
    if not inner:
        wrong = "no network is internal: Redis could be reached from outside"
        yield model.finding(("networks",), wrong, "Write `networks: {internal: {internal: true}}`.")
        return
    for name in SERVICES:
        on = set(model.services[name].get("networks", {}))
        if not on & inner:
            wrong = f"{name}: it is on {sorted(on)}, not on the internal network"
            yield model.finding(("services", name, "networks"), wrong, "Write `networks: [internal]`.")
        if name not in _PUBLISHED and on - inner:
            wrong = f"{name}: it is on {sorted(on - inner)}, which is not internal"
            yield model.finding(("services", name, "networks"), wrong, "Write `networks: [internal]` alone.")


def _secret_findings(model: Model) -> Iterator[Finding]:
    for name, secret in model.content.get("secrets", {}).items():
        if not secret.get("file") and not secret.get("external"):
            wrong = f"the secret {name!r} is not from a file"
            yield model.finding(("secrets", name), wrong, f"Write `{name}: {{file: …}}`.")
    for name, service in model.services.items():
        for variable, value in service.get("environment", {}).items():
            if value and _SECRET_NAME.search(variable):
                wrong = f"{name}: {variable} has its value in {FILE}; `docker inspect` shows it"
                yield model.finding(("services", name, "environment", variable), wrong, "Make it a secret from a file.")
            elif value and re.search(r"://[^/\s]*:[^/\s]+@", str(value)):
                wrong = f"{name}: {variable} has a password in its URL"
                yield model.finding(
                    ("services", name, "environment", variable), wrong, "Use the secret redis_password."
                )
    for name in _NEEDS_PASSWORD:
        if "redis_password" not in {secret["source"] for secret in model.services[name].get("secrets", [])}:
            wrong = f"{name}: it is not given the secret redis_password"
            yield model.finding(("services", name, "secrets"), wrong, "Write `secrets: [redis_password]`.")


def _redis_findings(tree: Tree, model: Model) -> Iterator[Finding]:
    """Nothing accepted is lost: on disk, never thrown away, behind a password."""
    redis = model.services["redis"]
    says = " ".join(map(str, [*(redis.get("entrypoint") or []), *(redis.get("command") or [])]))
    # What the container runs may be a script that it is given.
    for config in redis.get("configs", []):
        file = Path(model.content["configs"][config["source"]].get("file", ""))
        says += " " + (file if file.is_absolute() else tree.root / file).read_text(encoding="utf-8")
    for pattern, wrong, flag in (
        (r"--?appendonly\s+yes\b|^appendonly yes", "what it accepts is not on disk", "--appendonly yes"),
        (r"maxmemory-policy\s+noeviction\b", "it throws jobs away when its memory is full", "--maxmemory-policy noeviction"),
        (r"--maxmemory\s+\S", "it grows until the kernel ends it", "--maxmemory 1gb"),
        (r"\brequirepass\b", "it asks for no password", "requirepass"),
    ):  # fmt: skip
        if not re.search(pattern, says):
            cure = f"Give it `{flag}`."
            yield model.finding(("services", "redis", "command"), f"redis: {wrong}: its command has no {flag}", cure)
    if not any(volume.get("target") == "/data" for volume in redis.get("volumes", [])):
        wrong = "redis: /data is no volume: all jobs are gone with the container"
        yield model.finding(("services", "redis", "volumes"), wrong, 'Write `volumes: ["redis-data:/data"]`.')


def _gpu_findings(model: Model) -> Iterator[Finding]:
    vision = model.services["vision"]
    devices = vision.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    has_gpu = any("gpu" in device.get("capabilities", []) for device in devices)
    path = ("services", "vision", "deploy")
    if model.profile == "gpu" and not has_gpu:
        cure = "Reserve it in deploy/compose/gpu.yaml: `devices: [{driver: nvidia, capabilities: [gpu]}]`."
        yield model.finding(path, "vision: no GPU is reserved for it", cure)
    if model.profile == "cpu" and has_gpu:
        cure = "Move the reservation into deploy/compose/gpu.yaml."
        yield model.finding(path, "vision: a GPU is reserved for it, so that it does not start without one", cure)
