"""Has the machine, or the container's share of it, the memory, cores, disk and open files that are needed?"""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ai4thai.doctor.findings import Finding, Level, Situation, gigabytes
from ai4thai.doctor.model_access import hub_cache

# The deployment guide's machine. What is measured is in docs/deployment.md.
GUIDE_MEMORY_BYTES: Final = 8_000_000_000
GUIDE_CORES: Final = 4
LEAST_MEMORY_BYTES: Final = 1_500_000_000
"""The included models, the queue server and a worker."""
LEAST_MEMORY_WITHOUT_MODELS_BYTES: Final = 400_000_000
"""The queue server, or a worker, some 90 MB each, and uploads or frames in their hands."""
COMFORT: Final = 5
"""So many times what is the least is enough for a while."""
_WRITTEN_BYTES = 1 << 20
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(_situation: Situation) -> Iterator[Finding]:
    """Memory and cores against the sizing; what the kernel has killed for want of memory."""
    total, limited = _memory_bytes()
    cores = _cores()
    place = "of this container" if limited else "of this machine"
    told = f"{gigabytes(total)} {place}, {cores:g} cores"
    # A container is judged by what runs in it; a machine by the platform, whatever this Python has.
    if limited and importlib.util.find_spec("torch") is None:
        if total < LEAST_MEMORY_WITHOUT_MODELS_BYTES:
            yield Finding(
                "memory",
                Level.FAILURE,
                f"{told}; the queue server and a worker need {gigabytes(LEAST_MEMORY_WITHOUT_MODELS_BYTES)} each",
                "Give it more memory (compose: QUEUE_MEMORY, WORKER_MEMORY; Kubernetes: resources.limits.memory).",
            )
        else:
            yield Finding("memory", Level.OK, f"{told}; no models compute here")
    elif total < LEAST_MEMORY_BYTES:
        yield Finding(
            "memory",
            Level.FAILURE,
            f"{told}; the included models alone need {gigabytes(LEAST_MEMORY_BYTES)}",
            "Give it more memory (compose: VISION_MEMORY; Kubernetes: resources.limits.memory).",
        )
    elif total < GUIDE_MEMORY_BYTES * 0.9 or cores < GUIDE_CORES:  # 8 GiB machines show a little less than 8 GB
        yield Finding(
            "memory",
            Level.WARNING,
            f"{told}; enough for the included models, not for production models",
            f"A production machine has {gigabytes(GUIDE_MEMORY_BYTES)} and {GUIDE_CORES} cores or more: docs/deployment.md",
        )
    else:
        yield Finding("memory", Level.OK, told)
    if (killed := _number(_CGROUP / "memory.events", "oom_kill")) > 0:
        yield Finding(
            "memory",
            Level.WARNING,
            f"the kernel has killed {killed} processes of this container for want of memory",
            "Raise its limit, or lower QUEUE_WORKER_THREADS, VISION_MAX_QUEUED_BYTES, VISION_MAX_MODEL_BYTES.",
        )


def check_disk(situation: Situation) -> Iterator[Finding]:
    """The data directory, the models' cache and the workers' temporary directory: writable, with room."""
    data = situation.data_dir
    yield from _check_folder(situation, "data", data, "AI4THAI_DATA_DIR")
    cache = hub_cache(situation)
    models = [path for path in _entries(cache) if path.name.startswith("models--")]
    if _device(cache) != _device(data) and models:
        yield from _check_folder(situation, "the hub's cache", cache, "HF_HOME")
    elif models:
        yield Finding("disk", Level.OK, f"the hub's cache {cache}: {len(models)} models")
    temporary = Path(situation.env.get("TMPDIR") or tempfile.gettempdir())
    if _device(temporary) != _device(data):
        yield from _check_folder(situation, "temporary", temporary, "TMPDIR", least_bytes=100_000_000)


def check_open_files(_situation: Situation) -> Iterator[Finding]:
    """A connection takes two; the servers raise their own limit as far as they may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # SERVING_MAX_CONNECTIONS is 4096; the rest is for models and libraries.
    if hard == resource.RLIM_INFINITY or hard >= 10_000:
        yield Finding("files", Level.OK, f"{'any number of' if hard == resource.RLIM_INFINITY else hard} open files")
        return
    yield Finding(
        "files",
        Level.FAILURE if hard < 1024 else Level.WARNING,
        f"at most {hard} open files, which is some {max(0, hard - 200) // 2} connections",
        "ulimit -Hn 65536 (systemd: LimitNOFILE=65536; compose: ulimits: {nofile: 65536})",
    )


def _check_folder(
    situation: Situation, what: str, folder: Path, variable: str, least_bytes: int = 0
) -> Iterator[Finding]:
    least = least_bytes or situation.min_free_bytes
    try:
        there = _nearest(folder)
        usage = shutil.disk_usage(there)
        nodes = os.statvfs(there)
        if there == folder:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\0" * _WRITTEN_BYTES)
                file.flush()
                os.fsync(file.fileno())
        elif not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(13, f"it is to be made in {there}, where this user may not write")
    except OSError as error:
        yield Finding(
            "disk",
            Level.FAILURE,
            f"{what} {folder}: cannot be written: {error.strerror or error}",
            f"Free room there, let user {os.getuid()} write (chown {os.getuid()} {folder}), or set {variable} to another "
            "directory.",
        )
        return
    told = f"{what} {folder}: {gigabytes(usage.free)} free of {gigabytes(usage.total)}"
    cure = f"Free room there, or set {variable} to a larger disk. du -xh --max-depth=2 {folder} | sort -h tells what takes it."
    if usage.free < least:
        yield Finding("disk", Level.FAILURE, f"{told}; {gigabytes(least)} are the least", cure)
    elif nodes.f_files and nodes.f_favail < 1000:
        yield Finding("disk", Level.FAILURE, f"{told}, but room for {nodes.f_favail} files only", cure)
    elif usage.free < least * COMFORT:
        yield Finding("disk", Level.WARNING, f"{told}; that is soon full", cure)
    else:
        yield Finding("disk", Level.OK, told)


def _memory_bytes() -> tuple[int, bool]:
    """Memory, and whether a container's limit says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _text(_CGROUP / "memory.max")
    return (int(limit), True) if limit.isdecimal() and int(limit) < total else (total, False)


def _cores() -> float:
    """Cores that this process may use: bound to, or its container's share where that is less."""
    bound = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _text(_CGROUP / "cpu.max").partition(" ")
    return min(bound, int(quota) / int(period)) if quota.isdecimal() and period.isdecimal() else bound


def _number(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _text(path).splitlines() if line.startswith(f"{name} ")), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _device(path: Path) -> int | None:
    """The disk that it is on, or will be on; None: nobody can tell."""
    try:
        return _nearest(path).stat().st_dev
    except OSError:
        return None


def _nearest(path: Path) -> Path:
    """The folder itself, or the first one above that there is.

    Raises:
        OSError: what is on the way cannot be entered.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return _nearest(path.parent) if path != path.parent else path
    return path
