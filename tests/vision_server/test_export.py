"""Exporting a model for another engine: what the command makes is what the server takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from ai4thai.cli_export import export as export_command
from typer.testing import CliRunner, Result

from vision_server import export
from vision_server.detector import Detector
from vision_server.weights import SHIPPED, SHIPPED_DETECTOR, Available, find_detector, list_models

SMALL = "shapes-classifier"

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`ai4thai models export` with a data directory of its own, in the terminal of an ordinary user."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'clients'}")
    monkeypatch.setenv("VISION_OFFLINE", "true")
    app = typer.Typer()
    app.command()(export_command)
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--data-dir", str(tmp_path)])


def test_an_export_lies_where_the_server_looks_and_answers(run: Run, data_dir: Path, tmp_path: Path) -> None:
    made = run(SMALL, "--engine", "openvino", "--image-size", "128")
    assert made.exit_code == 0, made.output
    export_dir = tmp_path / "models" / f"{SMALL}_openvino_model"
    assert str(export_dir) in made.output and "128 px" in made.output
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [export_dir.name]
    assert find_detector(SMALL, tmp_path / "models", offline=True) == export_dir
    card = Detector(export_dir, "cpu").load()
    assert (card.engine, card.input_size_px) == ("openvino", 128)
    assert card.labels == Detector(SHIPPED[SMALL], "cpu", engine="pytorch").load().labels


def test_a_failed_export_is_one_red_line(run: Run) -> None:
    failed = run("no-such-model", "--engine", "openvino")
    assert failed.exit_code == 1
    assert "Error: 'no-such-model' is not shipped" in failed.output
    assert "Traceback" not in failed.output


def test_an_unknown_engine_is_a_matter_of_usage(run: Run) -> None:
    assert run(SMALL, "--engine", "coreml").exit_code == 2


@pytest.fixture
def main(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """What the command runs, in this process."""
    monkeypatch.setenv("AI4THAI_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("VISION_OFFLINE", "true")
    return lambda *arguments: export.main(arguments)


def test_a_model_of_the_model_directory_is_exported_beside_its_weights(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(SHIPPED[SMALL], models / "mine@2.pt")
    assert main("mine@2.pt", "--engine", "onnx", "--half") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "reading mine@2.pt"
    assert told[-1].startswith(f"{models / 'mine@2.onnx'}: ")
    assert (models / "mine@2.onnx").stat().st_size < 0.7 * 4 * 250_000  # its parameters, in 16 bits
    assert Available("mine@2", generates=False) in list_models(models)
    path = find_detector("mine@2", models, offline=True, engine="onnxruntime")
    assert Detector(path, "cpu", engine="onnxruntime").load().precision == "fp16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("shapes-describer", "--engine", "onnx"), "is a describer"),
        (("../elsewhere", "--engine", "onnx"), "model directory"),
        (("yolo11s", "--engine", "onnx"), "VISION_OFFLINE"),
        (
            ("foreign", "--engine", "openvino"),
            "only .pt files are exported, and of foreign there is foreign.onnx alone",
        ),
        (("bad", "--engine", "onnx"), "bad.pt could not be exported to onnx"),
    ],
)
def test_what_cannot_be_exported_is_said(
    main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "foreign.onnx").write_bytes(b"onnx")
    (models / "bad.pt").write_bytes(b"no zip, no pickle")
    assert main(*arguments) == 1
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in models.iterdir()) == ["bad.pt", "foreign.onnx"]


def test_a_tensorrt_engine_is_built_on_the_gpu_that_runs_it(
    main: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(SHIPPED_DETECTOR, "--engine", "engine") == 1
    assert "NVIDIA GPU" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(
    main: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert main(SHIPPED_DETECTOR, "--engine", "onnx") == 1
    assert "pip install onnx" in capsys.readouterr().err
