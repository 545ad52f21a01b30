"""The environments in the manifests, read by the very classes that the servers read them with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from pydantic import AliasChoices, ValidationError
from pydantic_settings import BaseSettings

from deploy.kubernetes.objects import Objects, Workload, amount
from deploy.validation.findings import Finding
from queue_server.settings import QueueSettings, WorkerSettings
from serving.relay import LINGER_SECONDS
from serving.settings import ServingSettings
from vision_server.settings import VisionSettings

CLASSES: dict[str, tuple[type[BaseSettings], ...]] = {
    "vision": (VisionSettings, ServingSettings),
    "queue": (QueueSettings, ServingSettings),
    "worker": (WorkerSettings,),
}
# Of the libraries that the servers stand on.
OTHERS = re.compile(
    r"CUDA_VISIBLE_DEVICES|PYTORCH_CUDA_ALLOC_CONF|HF_\w+|(AWS|GOOGLE|AZURE)_\w+|TMPDIR|SSL_CERT_FILE|TZ"
)
# Redis keeps this much more than maxmemory while it rewrites its AOF.
REWRITE = 1.5

Kind = TypeVar("Kind", bound=BaseSettings)


def check(objects: Objects) -> Iterator[Finding]:
    """Variables that no server knows, values that it refuses, files that find no room; Redis' settings besides."""
    for workload in objects.workloads:
        for wrong, cure in _problems(objects, workload):
            yield objects.wrong(workload.document, wrong, cure)


def _problems(objects: Objects, workload: Workload) -> Iterator[tuple[str, str]]:
    environment = objects.environment(workload)
    known: set[str] = set()
    for kind in CLASSES.get(workload.component, ()):
        known |= names(kind)
        try:
            _read(kind, environment)
        except (ValidationError, ValueError) as error:
            yield (
                f"{kind.__name__} refuses its environment: {_first_line(error)}",
                "Give the variable a value it takes.",
            )
            return
    for name in sorted(environment):
        if workload.component in CLASSES and name not in known and not OTHERS.fullmatch(name):
            yield f"{name} is no setting of this server", "Names and defaults stand in the server's settings.py."
    if workload.component == "worker":
        yield from _room(objects, workload)
    if workload.component == "redis":
        yield from _redis(objects, workload)


def names(kind: type[BaseSettings]) -> set[str]:
    """The variables that a class reads."""
    prefix, found = str(kind.model_config.get("env_prefix", "")), set()
    for name, field in kind.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias or f"{prefix}{name}".upper()]
        found |= {str(choice) for choice in choices if str(choice).isupper()}
    return found


def worker(objects: Objects, workload: Workload) -> WorkerSettings:
    """A worker's settings."""
    return _read(WorkerSettings, objects.environment(workload))


def drain_s(objects: Objects, workload: Workload) -> float:
    """How long a server lets running calls go on."""
    return _read(ServingSettings, objects.environment(workload)).drain_seconds


def stop_s(objects: Objects, workload: Workload) -> float:
    """How long the process takes to end by its own settings; 0: it has none."""
    if workload.component == "worker":
        return worker(objects, workload).stop_s
    if workload.component in CLASSES:
        serving = _read(ServingSettings, objects.environment(workload))
        return serving.unready_seconds + serving.drain_seconds + LINGER_SECONDS
    return 0.0


def _room(objects: Objects, workload: Workload) -> Iterator[tuple[str, str]]:
    chosen = worker(objects, workload)
    file_bytes = chosen.max_media_bytes if chosen.media_url else chosen.max_redis_media_bytes
    needed = chosen.worker_threads * (file_bytes + chosen.video_max_temp_bytes)
    room = amount((workload.volume("tmp").get("emptyDir") or {}).get("sizeLimit", "0"))
    if room < needed:
        yield (
            f"/tmp has room for {room / 2**30:.1f} GiB, and {chosen.worker_threads} videos may take {needed / 2**30:.1f} GiB",
            "Raise the volume's sizeLimit, or lower QUEUE_WORKER_THREADS, QUEUE_MAX_MEDIA_BYTES, QUEUE_VIDEO_MAX_TEMP_BYTES.",
        )


def _redis(objects: Objects, workload: Workload) -> Iterator[tuple[str, str]]:
    name = workload.volume("configuration").get("configMap", {}).get("name", "")
    text = ((objects.named("ConfigMap", name) or {}).get("data") or {}).get("redis.conf", "")
    told = dict(line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#"))
    for setting, value in (("appendonly", "yes"), ("maxmemory-policy", "noeviction")):
        if told.get(setting) != value:
            yield (
                f"redis.conf does not say `{setting} {value}`",
                "Without it accepted jobs are lost; see docs/queue.md, Redis.",
            )
    most = told.get("maxmemory", "0").upper().replace("GB", "Gi").replace("MB", "Mi")
    limit = amount(workload.container["resources"]["limits"]["memory"])
    if not amount(most) or amount(most) * REWRITE > limit:
        yield (
            "its memory limit leaves no room for a rewrite of the AOF",
            f"limits.memory: {REWRITE} × maxmemory or more.",
        )


def _read(kind: type[Kind], environment: dict[str, str]) -> Kind:
    with _only(environment):
        return kind()


@contextmanager
def _only(environment: dict[str, str]) -> Iterator[None]:
    """This environment and no other: what the caller's shell has set must not count."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        # VisionSettings looks for a home when nothing names its data directory.
        os.environ.update({"HOME": "/", **environment})
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{problem['loc'][0] if problem['loc'] else ''}: {problem['msg']}"
    return str(error).splitlines()[0]
