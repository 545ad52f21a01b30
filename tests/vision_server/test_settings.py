"""How many cores there are is what the container may use, not what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from vision_server.settings import VisionSettings, container_cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param({"cpu.max": "400000 100000\n"}, 4, id="--cpus 4"),
        pytest.param({"cpu.max": "150000 100000\n"}, 1, id="one and a half"),
        pytest.param({"cpu.max": "50000 100000\n"}, 1, id="half a core"),
        pytest.param({"cpu.max": "max 100000\n"}, None, id="no limit"),
        pytest.param({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2, id="version 1"),
        pytest.param({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, id="version 1, no limit"),
        pytest.param({}, None, id="no control groups"),
    ],
)
def test_a_containers_share_of_the_cores_is_read(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert container_cores(tmp_path) == cores


def test_there_is_at_least_one_core() -> None:
    assert VisionSettings().core_count >= 1
