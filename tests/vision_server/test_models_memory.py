"""What models may take and need in memory, by their files and by the machine's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from vision_server import memory
from vision_server.describers.language_model import LanguageModel
from vision_server.detector import Detector
from vision_server.weights import SHIPPED, SHIPPED_DESCRIBER, SHIPPED_DETECTOR


def test_a_describers_weights_are_known_before_they_are_read(describer: LanguageModel) -> None:
    folder = SHIPPED[SHIPPED_DESCRIBER]
    told_bytes = memory.describer_weights_bytes(folder, quantization="none", value_bytes=4)
    assert told_bytes == pytest.approx(describer.card.memory_bytes, rel=0.02)
    half_bytes = memory.describer_weights_bytes(folder, quantization="none", value_bytes=2)
    assert half_bytes * 2 == told_bytes
    by_kind = [memory.describer_weights_bytes(folder, quantization=kind, value_bytes=2) for kind in ("nf4", "int8")]
    assert by_kind[0] < by_kind[1] < half_bytes
    assert memory.describer_bytes(told_bytes) > told_bytes


def test_numbers_of_every_width_are_counted_once(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [10, 10], "data_offsets": [0, 200]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [200, 220]},
        "c": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [220, 224]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model-00001.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(224))
    assert memory.describer_weights_bytes(tmp_path, quantization="none", value_bytes=2) == (100 + 5 + 4) * 2


def test_a_folder_of_old_files_is_guessed_from_its_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    assert memory.describer_weights_bytes(tmp_path, quantization="none", value_bytes=4) == 2000


def test_a_detector_takes_its_weights_and_more_with_each_image(detector: Detector) -> None:
    path = SHIPPED[SHIPPED_DETECTOR]
    weights_bytes = memory.detector_weights_bytes(path, value_bytes=4)
    # The file has 16 bits a number and the network's code besides.
    assert detector.card.memory_bytes < weights_bytes < 3 * detector.card.memory_bytes
    one, eight = (memory.detector_bytes(weights_bytes, side_px=640, images=n, value_bytes=4) for n in (1, 8))
    assert weights_bytes < one < eight < 9 * one
    # yolo11n at 640 px with a batch of 8, measured: 322 MB on PyTorch, 575 MB on ONNX Runtime.
    assert 300e6 < memory.detector_bytes(2 * 5_500_000, side_px=640, images=8, value_bytes=4) < 600e6
    folder = path.parent
    assert memory.detector_weights_bytes(folder, value_bytes=4) >= path.stat().st_size


@pytest.mark.parametrize(
    ("files", "free_bytes"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 150\n"}, [450]),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 150\n"}, []),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": "anon 5\n"}, [0]),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "400",
                "memory/memory.stat": "inactive_file 9\ntotal_inactive_file 50\n",
            },
            [650],
        ),
        ({}, []),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], free_bytes: list[int]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory._container_free_bytes(tmp_path) == free_bytes


def test_on_the_cpu_nine_tenths_of_what_is_free_may_be_taken() -> None:
    assert memory.limit_bytes(["cpu"]) == pytest.approx(0.9 * memory.free_bytes(), rel=0.2)
    assert memory.free_bytes() > 0


def test_outside_any_container_the_machines_free_memory_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A laptop's own control group sets no limit and has no such files."""
    # Given a machine without a limit
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path)

    # Then what is available on it is what is free
    assert memory.free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
