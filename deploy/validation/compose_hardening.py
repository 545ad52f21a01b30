"""What every container of compose.yaml is held to: rights, limits, logs, restarts, health."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from deploy.validation.compose_model import Model, Service, seconds
from deploy.validation.findings import Finding

# Longer than the servers drain (SERVING_DRAIN_SECONDS, 30 s) and than a worker gives its jobs back (QUEUE_STOP_S, 10 s).
_LEAST_GRACE_S = {"vision": 31.0, "queue": 31.0, "worker": 11.0, "redis": 11.0}
_RESTARTS = ("unless-stopped", "always", "on-failure")


def hardening_findings(model: Model) -> Iterator[Finding]:
    """Over every service."""
    for name, service in model.services.items():
        yield from _right_findings(model, name, service)
        yield from _limit_findings(model, name, service)
        once = _runs_once(model, name)
        if not once:
            yield from _life_findings(model, name, service)
        yield from _image_findings(model, name, service)


def _runs_once(model: Model, name: str) -> bool:
    """A service that others wait for to end, not to become healthy."""
    waits = [other.get("depends_on", {}).get(name, {}).get("condition") for other in model.services.values()]
    return "service_completed_successfully" in waits


def _right_findings(model: Model, name: str, service: Service) -> Iterator[Finding]:
    def wrong(key: str, what: str, cure: str) -> Finding:
        return model.finding(("services", name, key), f"{name}: {what}", cure)

    if service.get("read_only") is not True:
        yield wrong(
            "read_only",
            "its root file system can be written (read_only is not true)",
            "Write `read_only: true`.",
        )
    if "ALL" not in service.get("cap_drop", []):
        yield wrong(
            "cap_drop",
            f"cap_drop is {service.get('cap_drop')}: it keeps rights that it does not need",
            "Write `cap_drop: [ALL]`.",
        )
    if service.get("cap_add"):
        yield wrong("cap_add", f"cap_add is {service['cap_add']}", "Remove it: nothing here needs a capability.")
    if not {"no-new-privileges:true", "no-new-privileges"} & set(service.get("security_opt", [])):
        yield wrong(
            "security_opt",
            "a program in it could gain rights by setuid",
            'Write `security_opt: ["no-new-privileges:true"]`.',
        )
    if service.get("privileged"):
        yield wrong("privileged", "it is privileged: root on the host", "Remove `privileged`.")
    for key in ("network_mode", "pid", "ipc", "userns_mode"):
        if service.get(key) == "host":
            yield wrong(key, f"{key} is host", f"Remove `{key}: host`.")
    user = str(service.get("user", ""))
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user):
        yield wrong("user", f"user is {user!r}: it may run as root", 'Write `user: "10001:10001"` (Redis: "999:999").')
    for volume in service.get("volumes", []):
        if "docker.sock" in f"{volume.get('source')}{volume.get('target')}":
            yield wrong("volumes", "it is given the engine's socket: root on the host", "Remove that volume.")


def _limit_findings(model: Model, name: str, service: Service) -> Iterator[Finding]:
    limits: dict[str, Any] = service.get("deploy", {}).get("resources", {}).get("limits", {})
    memory, cpus = limits.get("memory") or service.get("mem_limit"), limits.get("cpus") or service.get("cpus")
    path = ("services", name, "deploy", "resources", "limits")
    cure = 'Write `deploy: {resources: {limits: {cpus: "1", memory: 1g, pids: 256}}}`.'
    for what, value, why in (
        ("memory", memory, "the kernel would end others when it grows"),
        ("cpus", cpus, "it may starve the others"),
        ("pids", limits.get("pids") or service.get("pids_limit"), "a fork bomb in it would reach the host"),
    ):
        if not value or float(value) <= 0:
            yield model.finding(path, f"{name}: it has no limit of {what}: {why}", cure)


def _life_findings(model: Model, name: str, service: Service) -> Iterator[Finding]:
    def wrong(key: str, what: str, cure: str) -> Finding:
        return model.finding(("services", name, key), f"{name}: {what}", cure)

    if service.get("restart") not in _RESTARTS:
        yield wrong(
            "restart",
            f"restart is {service.get('restart', 'no')!r}: it stays away after a crash",
            "Write `restart: unless-stopped`.",
        )
    options = service.get("logging", {}).get("options", {})
    if not {"max-size", "max-file"} <= set(options):
        yield wrong(
            "logging",
            f"its log is not rotated (options {options or 'none'}): it fills the disk",
            'Write `logging: {driver: json-file, options: {max-size: 20m, max-file: "5"}}`.',
        )
    health = service.get("healthcheck", {})
    if not health.get("test") or health.get("disable") or health["test"][0] == "NONE":
        yield wrong(
            "healthcheck",
            "it has no health check, so that nothing can wait for it",
            "Write `healthcheck:` with test, interval, timeout, retries, start_period.",
        )
    else:
        for key in ("timeout", "interval", "start_period"):
            if not seconds(health.get(key)):
                yield wrong(
                    "healthcheck", f"its health check has no {key}", f"Write `{key}:` with a unit, such as 15s."
                )
    least_s = _LEAST_GRACE_S.get(name, 0.0)
    grace_s = seconds(service.get("stop_grace_period")) or 10.0
    if grace_s < least_s:
        yield wrong(
            "stop_grace_period",
            f"it is killed {grace_s:g} s after SIGTERM, before it has drained",
            f"Write `stop_grace_period: {2 * round(least_s - 1)}s`.",
        )


def _image_findings(model: Model, name: str, service: Service) -> Iterator[Finding]:
    image = str(service.get("image", ""))
    # Our own images are `latest` until the pipeline names a release.
    if not image.startswith("team10-") and (":" not in image.rpartition("/")[2] or image.endswith(":latest")):
        wrong = f"{name}: the image {image!r} has no fixed release: it changes from one day to the next"
        yield model.finding(("services", name, "image"), wrong, "Name a release: `IMAGE:VERSION`.")
