"""The locks say what pyproject.toml pins, and whatever is wrong with them is named together with its cure."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "lock.py"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, LOCK, "--check", "--root", root], capture_output=True, text=True, timeout=60)


def packages(name: str) -> dict[str, str]:
    """The lock's blocks by package, read by a rule of this test's own."""
    text = (ROOT / "requirements" / name).read_text()
    return {block.split("==")[0]: block for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the locks are checked against."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    for name in ("pyproject.toml", "docs/compatibility.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_committed_locks_and_the_matrix_are_fresh() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(tree: Path) -> None:
        path = tree / name
        changed = re.sub(old, new, path.read_text(), count=1, flags=re.MULTILINE)
        assert changed != path.read_text(), f"{old} is not in {name}: the fault was not planted"
        path.write_text(changed)

    return plant


def repinned_without_locking(tree: Path) -> None:
    """Somebody changes a pin, and SET.in with it by hand, and forgets the lock."""
    replaced("pyproject.toml", r'"hiredis==[^"]+"', '"hiredis==3.4.0"')(tree)
    replaced("requirements/queue.in", r"^hiredis==.*$", "hiredis==3.4.0")(tree)
    replaced("requirements/dev.in", r"^hiredis==.*$", "hiredis==3.4.0")(tree)


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        pytest.param(
            replaced("pyproject.toml", r'"redis==[^"]+"', '"redis==8.0.0"'),
            ["requirements/queue.in does not say what pyproject.toml says: redis==8.0.0 is missing", "make lock"],
            id="stale-pin",
        ),
        pytest.param(
            repinned_without_locking,
            [
                "queue.txt was not made from queue.in as it is now",
                "pyproject.toml asks for hiredis==3.4.0",
                "make lock",
            ],
            id="lock-forgotten",
        ),
        pytest.param(
            replaced("requirements/queue.txt", r"^anyio==", "anyio>="),
            ["queue.txt: anyio>=", "is not pinned to one version", "make lock"],
            id="unpinned",
        ),
        pytest.param(
            replaced("requirements/vision-gpu.txt", r"^torch==(\S+) \\\n(    --hash=\S+( \\)?\n)+", r"torch==\1\n"),
            ["vision-gpu.txt: torch has no hash", "make lock"],
            id="missing-hash",
        ),
        pytest.param(
            replaced("requirements/vision-cpu.in", r"\Z", "requests==2.34.2\n"),
            [
                "vision-cpu.in does not say what pyproject.toml says: requests==2.34.2 is not in pyproject.toml",
                "make lock",
            ],
            id="edited-in",
        ),
        pytest.param(
            replaced(
                "requirements/queue.txt", r"\Z", f"torch==2.13.0 \\\n    --hash=sha256:{'0' * 64}\n    # via dramatiq\n"
            ),
            ["queue.txt: torch is a GPU library (dramatiq)", "take out of pyproject.toml's extra queue"],
            id="gpu-in-the-queue",
        ),
        pytest.param(
            replaced("requirements/vision-cpu.txt", r"^triton==|^urllib3==(\S+)", r"urllib3==\1+local"),
            ["is a local build that PyPI does not have", "make lock"],
            id="local-build",
        ),
        pytest.param(
            replaced("requirements/queue.txt", r"\A", "--find-links /somewhere\n"),
            ["queue.txt has '--find-links /somewhere', which is one machine's own configuration", "take the line out"],
            id="one-machine's",
        ),
        pytest.param(
            replaced("requirements/queue.txt", r"^anyio==\S+", "anyio==4.0.0"),
            ["anyio is locked at several versions: 4.0.0 in queue.txt", "make lock UPGRADE=anyio"],
            id="two-versions",
        ),
        pytest.param(
            replaced("docs/compatibility.md", r"\| torch \| 2\.2\.2", "| torch | 2.3.0"),
            ["docs/compatibility.md does not say what the locks say", "lock.py --matrix"],
            id="edited-matrix",
        ),
        pytest.param(
            lambda tree: (tree / "requirements" / "h100.txt").unlink(),
            ["requirements/h100.txt is missing", "make lock"],
            id="missing",
        ),
    ],
)
def test_a_planted_fault_is_named_with_its_cure(tree: Path, plant: Callable[[Path], None], named: list[str]) -> None:
    plant(tree)
    done = check(tree)
    assert done.returncode == 1
    for text in named:
        assert text in done.stderr


def test_the_queue_has_no_gpu_library_and_the_cpu_locks_no_cuda() -> None:
    forbidden = re.compile(
        r"torch|torchvision|transformers|bitsandbytes|ultralytics|nvidia|triton|cuda|tensorrt|onnx|openvino"
    )
    assert not [name for name in packages("queue.txt") if forbidden.match(name)]
    for name in ("vision-cpu.txt", "dev.txt"):
        assert {package for package in packages(name) if re.match("nvidia|triton|cuda|tensorrt", package)} == {
            "nvidia-ml-py"
        }
        assert "torch" not in packages(name)


def test_the_gpu_locks_are_whole_with_torch_for_cuda_and_every_file_hashed() -> None:
    gpu, h100 = packages("vision-gpu.txt"), packages("h100.txt")
    assert {"torch", "triton", "nvidia-cudnn-cu13", "cuda-toolkit", "transformers", "bitsandbytes"} <= gpu.keys()
    # Over the layer of vision-gpu, h100 only adds.
    assert {name: block.split()[0] for name, block in gpu.items()}.items() <= {
        name: block.split()[0] for name, block in h100.items()
    }.items()
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in h100.values())


@pytest.fixture
def ask_beside(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], tuple[int, str]]:
    """`beside` of lock.py for a set, with a place of its files: whether pip would install what has no hash."""
    monkeypatch.syspath_prepend(ROOT / "requirements")
    import lock
    import pins

    def ask(name: str, place: Path) -> tuple[int, str]:
        monkeypatch.setattr(pins, "NVIDIA_INDEX", place.as_uri())
        answer: tuple[int, str] = lock.beside(Path(sys.executable), tree, pins.named(name), str(place))
        return answer

    (tree / "nothing").mkdir()
    for variable, value in {
        "CONFIG_FILE": os.devnull,
        "FIND_LINKS": "",
        "EXTRA_INDEX_URL": "",
        "INDEX_URL": (tree / "nothing").as_uri(),
    }.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    return ask


def index(place: Path, *wheels: tuple[str, str]) -> Path:
    """A package index of such wheels, with nothing in them; it is a folder of files besides."""
    for name, version in wheels:
        file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        (place / name).mkdir(parents=True, exist_ok=True)
        with (place / name / "index.html").open("a") as page:
            page.write(f'<a href="../{file}">{file}</a>')
        with zipfile.ZipFile(place / file, "w") as wheel:
            info = f"{name.replace('-', '_')}-{version}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return place


def test_what_is_beside_the_locks_is_asked_for_too(
    tree: Path, ask_beside: Callable[[str, Path], tuple[int, str]]
) -> None:
    version = re.findall(r"tensorrt-cu13==(\S+)", (tree / "requirements/tensorrt.txt").read_text())[0]
    parts = ("tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu13-libs")
    nvidia = index(tree / "nvidia", *((part, version) for part in parts))
    code, text = ask_beside("h100", nvidia)
    assert code == 0 and f"tensorrt-cu13-libs {version}" in text

    replaced("requirements/tensorrt.txt", rf"libs=={version}", "libs==99")(tree)
    code, text = ask_beside("h100", nvidia)
    assert code == 1 and "requirements/tensorrt.txt cannot be installed" in text and "tensorrt-cu13-libs==99" in text

    code, text = ask_beside("h100", tree / "nowhere")
    assert code == 3 and "requirements/tensorrt.txt, since file:" in text and "cannot be reached" in text


def test_torch_for_the_cpu_is_the_one_that_is_asked_for(
    tree: Path, ask_beside: Callable[[str, Path], tuple[int, str]]
) -> None:
    version = re.findall(r"^torch==(\S+)", (tree / "requirements/torch-cpu.txt").read_text(), re.MULTILINE)[0]
    code, text = ask_beside("dev", index(tree / "cpu", ("torch", f"{version}+cpu")))
    assert (code, text) == (0, f"torch {version}+cpu")

    code, text = ask_beside("dev", index(tree / "cuda", ("torch", version)))
    assert code == 1 and "pip would take the build for CUDA" in text and "TORCH_CPU_LINKS" in text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["urllib3", "--version", "1.0"], ["pyproject.toml does not pin urllib3", "make lock UPGRADE=urllib3"]),
        (["tensorrt-cu13"], ["what is newer was not asked: say VERSION=…", "pypi.nvidia.com/tensorrt-cu13/"]),
    ],
    ids=["not-pinned", "elsewhere"],
)
def test_an_upgrade_that_cannot_be_tried_is_refused_and_nothing_in_the_tree_changes(
    asked: list[str], said: list[str]
) -> None:
    before = {path: path.read_bytes() for path in [ROOT / "pyproject.toml", *(ROOT / "requirements").glob("*.txt")]}
    command = [sys.executable, ROOT / "requirements" / "upgrade_check.py", "--package", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    for text in said:
        assert text in done.stdout
    assert before == {path: path.read_bytes() for path in before}
