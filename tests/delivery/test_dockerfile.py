"""What the Dockerfile relies on: a queue without GPU libraries, layers that outlast a change of code, data in wheels, a probe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy.validation.dockerfile_model import Stage, read_stages
from tests.processes import ROOT

# Of a GPU, of models, or of the other server; numpy and Pillow are of models too, and the queue handles pictures as bytes.
FOREIGN = (
    *("torch", "torchvision", "transformers", "accelerate", "bitsandbytes", "ultralytics", "openvino", "onnxruntime"),
    *("tensorrt", "cv2", "numpy", "PIL", "pynvml", "vision_server"),
)
FOREIGN_PACKAGES = (
    *("torch", "torchvision", "transformers", "accelerate", "bitsandbytes", "ultralytics", "openvino", "onnxruntime"),
    *("tensorrt", "nvidia-", "cuda-", "triton", "opencv", "numpy"),
)
SERVERS = {
    "production": ("vision_server", "VISION_SERVICE_PORT"),
    "h100-optimized": ("vision_server", "VISION_SERVICE_PORT"),
    "queue": ("queue_server", "QUEUE_WORKER_PORT"),
}

# Imports every module of three packages where nothing foreign can be imported.
_IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, sys
class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FOREIGN:
            raise ModuleNotFoundError(f"{name} is not in the queue's image", name=name)
FOREIGN = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Wall())
count = 0
for package in ("queue_server", "serving", "ai4thai"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
print(count)
"""
# What is imported of ours must lie in the folder it is run in: an editable installation finds the rest elsewhere.
_PREFETCH = """
import os, sys
from vision_server import prefetch
code = prefetch.main()
ours = {"serving", "vision_server", "queue_server", "ai4thai"}
files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in ours]
sys.exit(code or " ".join(file for file in files if not file.startswith(os.getcwd())) or 0)
"""


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return {stage.name: stage for stage in read_stages((ROOT / "Dockerfile").read_text())}


def test_every_module_of_the_queues_image_imports_without_a_gpu_library() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, ",".join(FOREIGN)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "clients"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 100


def test_the_queues_lock_has_no_gpu_library() -> None:
    locked = re.findall(r"^([a-z0-9][\w.-]*)==", (ROOT / "requirements" / "queue.txt").read_text(), re.MULTILINE)
    assert "dramatiq" in locked
    assert not [name for name in locked if name.startswith(FOREIGN_PACKAGES)]


def test_the_queues_image_gets_nothing_of_the_vision_server(stages: dict[str, Stage]) -> None:
    """Also not by what its stages copy from others."""
    seen, copied = {"queue"}, set[str]()
    for name in (waiting := ["queue"]):
        for copy in stages[name].all("COPY"):
            source = copy.flag("from")
            if source is None:
                copied.update(copy.words[:-1])
            elif source not in seen:
                seen.add(source)
                waiting.append(source)
    assert "queue_server" in copied
    assert not {name for name in seen if "vision" in name}
    assert not {word for word in copied if "vision" in word}


def test_packages_hang_on_their_lock_alone(stages: dict[str, Stage]) -> None:
    """With our own code in between, each change of it would install CUDA and TensorRT anew."""
    found = [stage for stage in stages.values() if stage.name.endswith("-packages")]
    assert len(found) == 4
    for stage in found:
        copied = [word for copy in stage.all("COPY") for word in copy.words[:-1]]
        assert not [word for word in copied if not word.startswith("requirements/")], stage.name
        assert not [copy for copy in stage.all("COPY") if copy.flag("from")], stage.name


@pytest.mark.parametrize("target", SERVERS)
def test_our_own_code_is_the_last_layer_with_anything_in_it(stages: dict[str, Stage], target: str) -> None:
    chain = stages[target].chain
    writing = [instruction for instruction in chain if instruction.name in ("COPY", "ADD", "RUN")]
    *below, code, check = writing
    code_stage = "queue-code" if target == "queue" else "vision-code"
    assert code.flag("from") == code_stage
    assert check.text.startswith("pip check ")
    for copy in below:
        source = copy.flag("from")
        assert copy.name == "RUN" or (source and (source == "models" or source.endswith("-packages"))), copy.text
    # They differ in each commit, and one that stands before a RUN is a part of what that layer is looked up by.
    for argument in ("VERSION", "REVISION", "CREATED"):
        (declared,) = (i for i in chain if i.name == "ARG" and i.words[0].startswith(f"{argument}="))
        assert chain.index(declared) > chain.index(check)


def test_fetching_models_takes_no_more_of_our_code_than_its_stage_has(stages: dict[str, Stage], tmp_path: Path) -> None:
    # given the files that the stage copies, a detector and a describer that lie there already
    for copy in stages["models"].own:
        if copy.name == "COPY":
            for word in copy.words[:-1]:
                assert Path(word).parent == Path(copy.words[-1])
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / word, tmp_path / word)
    models = tmp_path / "models"
    (models / "some/describer").mkdir(parents=True)
    (models / "yolo11s.pt").touch()

    ended = subprocess.run(
        [sys.executable, "-c", _PREFETCH, "--into", str(models), "yolo11s.pt", "some/describer"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "AI4THAI_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(" MB in ") == 2


@pytest.mark.parametrize("target", SERVERS)
def test_the_health_check_asks_the_port_that_is_served(stages: dict[str, Stage], target: str) -> None:
    module, port = SERVERS[target]
    check, command = stages[target].last("HEALTHCHECK"), stages[target].last("CMD")
    assert check is not None
    assert command is not None
    assert command.words == ("python", "-m", module)
    assert f"localhost:${port}" in check.text + " ".join(check.words)
    # The probe gives up, and says why, before the engine kills it without a word.
    probe_s = re.search(r"--timeout (\d+)", check.text + " ".join(check.words))
    assert probe_s
    assert int(probe_s[1]) + 5 <= int((check.flag("timeout") or "0s").removesuffix("s"))


def test_what_is_copied_is_there_and_nothing_else_is_sent(stages: dict[str, Stage]) -> None:
    copied = {
        word.rstrip("/")
        for stage in stages.values()
        for copy in stage.own
        if copy.name == "COPY" and copy.flag("from") is None
        for word in copy.words[:-1]
    }
    sent = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    folders = {name for name in copied if "/" not in name and (ROOT / name).is_dir()}
    files = {name for name in copied if "/" not in name} - folders
    assert folders | files | {"requirements/*.txt"} == sent
    for accelerator in ("cpu", "gpu"):
        missing = [name for name in copied if not (ROOT / name.replace("${ACCELERATOR}", accelerator)).exists()]
        assert not missing


def test_each_wheels_packages_have_their_data() -> None:
    """By pyproject's list of endings: weights, fonts, scripts, samples. What it forgets would be left out without a word."""
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    tracked = subprocess.run(
        ["git", "ls-files", "serving", "queue_server", "vision_server", "clients/ai4thai"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    data = [Path(name) for name in tracked if not name.endswith((".py", ".pyi"))]
    assert data
    assert not [str(file) for file in data if not any(file.match(pattern) for pattern in configured)]


def test_the_command_line_of_the_images_is_the_one_with_the_quick_probe() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ai4thai": "ai4thai.__main__:main"}
