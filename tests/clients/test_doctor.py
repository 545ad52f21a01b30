"""`ai4thai doctor` on machines with one thing wrong: it is found, told with its value, and with what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ai4thai.cli import app
from ai4thai.doctor import examination, gpu_cards, machine
from ai4thai.doctor.findings import Finding, Level, Situation
from typer.testing import CliRunner

from tests.clients.asking_doctor import Ask, Told, ask
from tests.clients.doctor_doubles import SLICE, write_nvidia_smi, write_program, write_torch
from tests.processes import ROOT

__all__ = ["ask"]  # a fixture


# ---- Python and packages


def test_python_and_every_pin_are_as_they_are_to_be(ask: Ask) -> None:
    told = ask("python", "packages")
    told.ok("python", "3.11.")
    told.ok("packages", "pins are kept (client, serving, vision, export, queue")


def test_a_package_of_another_version_is_told_with_its_pin(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "httpx-0.20.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: httpx\nVersion: 0.20.0\nRequires-Dist: notthere>=3\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    told = ask("packages")

    told.failure("packages", "httpx 0.20.0 (pinned: 0.28.1)", "pip install httpx==0.28.1")
    told.warning("packages", "httpx needs notthere>=3, here is none", "pip check")


# ---- GPU


@pytest.fixture
def machine_with_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs in front of PATH, no pynvml, and a torch for CUDA 13.0."""
    programs = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    write_torch(tmp_path / "packages", "13.0")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return programs


def test_no_gpu_is_told_and_is_a_failure_only_where_one_is_asked_for(ask: Ask, machine_with_gpu: Path) -> None:
    write_program(machine_with_gpu, "nvidia-smi", "#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    told = ask("gpu")
    told.ok("gpu", "no GPU: the CPU computes")
    assert told.exit_code == 0
    ask("gpu", VISION_DEVICE="cuda").failure("gpu", "VISION_DEVICE is cuda, and there is no GPU", "--gpus all")


def test_a_gpu_its_driver_and_what_is_visible(ask: Ask, machine_with_gpu: Path) -> None:
    write_nvidia_smi(machine_with_gpu)

    told = ask("gpu", VISION_DEVICE="cuda:0", CUDA_VISIBLE_DEVICES="0")

    told.ok("gpu", "driver 580.95.05, CUDA 13.0; torch is built for CUDA 13.0")
    told.ok("gpu", "0: NVIDIA H100 80GB HBM3, 1.3 GB of 85.5 GB used")
    ask("gpu", CUDA_VISIBLE_DEVICES="1").failure("gpu", "there is no 1", "nvidia-smi -L")
    ask("gpu", VISION_DEVICE="cuda:1").failure("gpu", "sees 1 GPU, counted from 0", "CUDA_VISIBLE_DEVICES")
    ask("gpu", VISION_DEVICE="cuda", CUDA_VISIBLE_DEVICES="").failure("gpu", "it hides every GPU", "nvidia-smi -L")


def test_a_driver_that_is_too_old(ask: Ask, machine_with_gpu: Path) -> None:
    write_nvidia_smi(machine_with_gpu, driver="550.54.15", cuda="12.4")
    ask("gpu").failure("gpu", "driver 550.54.15, CUDA 12.4, which is too old: torch is built for CUDA 13.0", "580.65")


def test_a_cpu_build_of_torch_beside_a_gpu(ask: Ask, machine_with_gpu: Path, tmp_path: Path) -> None:
    write_nvidia_smi(machine_with_gpu)
    (tmp_path / "packages/torch/version.py").write_text("cuda: Optional[str] = None\n")
    ask("gpu").warning("gpu", "torch is its CPU build", "ACCELERATOR=gpu")
    ask("gpu", VISION_DEVICE="cuda").failure("gpu", "torch is its CPU build", "requirements/vision-gpu.txt")


def test_mig_without_and_with_a_slice(ask: Ask, machine_with_gpu: Path) -> None:
    write_nvidia_smi(machine_with_gpu, mig="Enabled")
    ask("gpu").failure("gpu", "MIG is on, but there is no slice", "nvidia-smi mig -cgi")
    write_nvidia_smi(machine_with_gpu, mig="Enabled", slices=SLICE)
    told = ask("gpu", CUDA_VISIBLE_DEVICES="MIG-22222222-bbbb")
    told.ok("gpu", "MIG slices: MIG-22222222-bbbb")
    told.ok("gpu", "CUDA_VISIBLE_DEVICES is MIG-22222222-bbbb")


def test_a_driver_that_answers_with_an_error_or_not_at_all(
    ask: Ask, machine_with_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "Failed to initialize NVML: Driver/library version mismatch"
    write_program(machine_with_gpu, "nvidia-smi", f"#!/bin/sh\necho '{words}'\nexit 18\n")
    ask("gpu").failure("gpu", words, "restart the machine")
    write_program(machine_with_gpu, "nvidia-smi", "#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(gpu_cards, "SMI_S", 0.5)
    ask("gpu").failure("gpu", "nvidia-smi does not answer within 0.5 s", "dmesg")


@pytest.mark.parametrize("count", [0, 1])
def test_a_driver_that_python_asks_and_the_gpus_it_finds(
    ask: Ask, machine_with_gpu: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    nvml = types.ModuleType("pynvml")
    nvml.__dict__.update(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.95.05",
        nvmlSystemGetCudaDriverVersion=lambda: 13000,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda _: types.SimpleNamespace(total=80e9, used=1e9),
        nvmlDeviceGetUUID=lambda _: "GPU-1",
        nvmlDeviceGetName=lambda _: "NVIDIA H100",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    if count:
        ask("gpu", VISION_DEVICE="cuda").ok("gpu", "0: NVIDIA H100, 1.0 GB of 80.0 GB used")
    else:
        ask("gpu").ok("gpu", "no GPU: the CPU computes (the driver finds no GPU)")
        ask("gpu", VISION_DEVICE="cuda").failure("gpu", "VISION_DEVICE is cuda, and there is no GPU", "--gpus all")


# ---- memory


def test_a_container_is_judged_by_what_runs_in_it(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"bytes": 1 << 30, "limited": True}
    monkeypatch.setattr(machine, "_memory_bytes", lambda: (memory["bytes"], memory["limited"]))
    monkeypatch.setattr(machine, "_cores", lambda: 1.0)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)  # where nothing was killed
    write_torch(tmp_path / "packages", "13.0")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    ask("memory").failure("memory", "the included models alone need 1.5 GB", "VISION_MEMORY")

    monkeypatch.setitem(sys.modules, "torch", None)  # as in the queue server's and the worker's image
    told = ask("memory")
    told.ok("memory", "1.1 GB of this container, 1 cores; no models compute here")
    assert told.exit_code == 0
    memory["bytes"] = 256 << 20
    ask("memory").failure("memory", "268 MB of this container", "QUEUE_MEMORY, WORKER_MEMORY")
    # A machine without a limit is to carry all of the platform, whatever the Python has that asks.
    memory.update(bytes=1 << 30, limited=False)
    ask("memory").failure("memory", "1.1 GB of this machine", "VISION_MEMORY")


# ---- disk and open files


def test_a_disk_with_less_room_than_asked_for(ask: Ask, tmp_path: Path) -> None:
    ask("disk").ok("disk", f"data {tmp_path / 'data'}")
    ask("disk", "--min-free-gb", "9000000").failure("disk", "9000000 GB are the least", "AI4THAI_DATA_DIR")


def test_a_disk_that_takes_nothing_more(ask: Ask, tmp_path: Path) -> None:
    # The smallest full disk that every machine has: writing beyond the limit on files fails like a full one.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from ai4thai.cli import app; app(['doctor', 'disk', '--json'])"
    )
    env = {**os.environ, "AI4THAI_DATA_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT / 'clients'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    Told(done.returncode, done.stdout).failure("disk", "cannot be written: File too large", "Free room there")


def test_a_data_directory_that_is_a_file(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ask("disk", AI4THAI_DATA_DIR=str(tmp_path / "file")).failure("disk", "cannot be written", "AI4THAI_DATA_DIR")


@pytest.mark.parametrize("variable", ["AI4THAI_DATA_DIR", "TMPDIR"])
def test_a_directory_behind_a_folder_that_this_user_may_not_enter(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    real = os.stat

    def stat(path: str, **options: Any) -> os.stat_result:  # root, who may run this, may enter everywhere
        if "closed/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, **options)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", stat)
    told = ask("disk", **{variable: str(tmp_path / "closed/data")})
    told.failure("disk", "cannot be written: Permission denied", "chown")
    assert not [one for one in told.findings if "could not be looked at" in one["found"]]


# ---- containers


def test_containers(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        {"Names": "team10-redis", "State": "running", "Status": "Up 2 hours (healthy)"},
        {"Names": "team10-vision", "State": "running", "Status": "Up 1 minute (health: starting)"},
        {"Names": "team10-queue", "State": "running", "Status": "Up 2 hours (unhealthy)"},
        {"Names": "team10-worker", "State": "exited", "Status": "Exited (137) 3 minutes ago"},
        {"Names": "team10-preflight", "State": "exited", "Status": "Exited (0) 2 hours ago"},
    )
    lines = "\n".join(json.dumps(row) for row in rows)
    write_program(tmp_path / "bin", "docker", f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    told = ask("containers")

    told.ok("containers", "team10-redis: Up 2 hours (healthy)")
    told.warning("containers", "team10-vision: Up 1 minute (health: starting)", "Wait")
    told.failure("containers", "team10-queue: Up 2 hours (unhealthy)", "docker logs --tail 50 team10-queue")
    told.failure("containers", "team10-worker: Exited (137)", "OOMKilled")
    assert len(told.findings) == 4

    denied = "permission denied while trying to connect to the Docker daemon socket"
    write_program(tmp_path / "bin", "docker", f"#!/bin/sh\necho '{denied}' >&2\nexit 1\n")
    ask("containers").warning("containers", "this user may not ask Docker", "usermod -aG docker")


# ---- the examination itself


def test_a_check_that_hangs_or_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(_: Situation) -> Iterator[Finding]:
        yield Finding("hangs", Level.OK, "so far")
        time.sleep(60)

    def breaks(_: Situation) -> Iterator[Finding]:
        raise OSError("broken")
        yield

    def works(_: Situation) -> Iterator[Finding]:
        yield Finding("works", Level.OK, "it does")

    monkeypatch.setattr(examination, "CHECKS", {"hangs": hangs, "breaks": breaks, "works": works})
    begun_s = time.monotonic()
    result = CliRunner().invoke(app, ["doctor", "--time", "1"], env={"COLUMNS": "160"})

    assert result.exit_code == 1 and time.monotonic() - begun_s < 30
    words = " ".join(result.stdout.split())
    for part in (
        "✓ hangs so far",
        "✗ hangs no answer within 1 s",
        "! breaks could not be looked at",
        "✓ works it does",
    ):
        assert part in words
    assert "1 to mend, 1 to look at." in words


def test_a_check_that_there_is_not(ask: Ask) -> None:
    result = CliRunner().invoke(app, ["doctor", "weather"])
    assert result.exit_code == 1 and "There is no check 'weather'; there are python, packages" in result.stderr


def test_it_imports_nothing_of_the_servers_nor_what_the_queue_has_not() -> None:
    code = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "torch numpy psutil redis packaging serving vision_server queue_server".split():
            raise ImportError(name)
sys.meta_path.insert(0, Without())
from ai4thai.cli import app
app(["doctor", "python", "packages", "gpu", "ports", "redis", "clock", "files", "memory"])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "clients"), "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert "not asked: nothing in this environment talks to Redis" in done.stdout, done.stdout + done.stderr
    assert "could not be looked at" not in done.stdout
