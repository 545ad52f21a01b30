"""`ai4thai demo` as a newcomer runs it, with the real models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

from tests.processes import ROOT


def test_the_demo_shows_everything_and_leaves_nothing_running(tmp_path: Path, short_folder: Path) -> None:
    command = [sys.executable, "-m", "ai4thai.cli", "demo", "--save", "shown/picture.jpg"]
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AI4THAI_", "REDIS_"))},
        "PYTHONPATH": os.pathsep.join([str(ROOT / "clients"), str(ROOT)]),
        "TMPDIR": str(short_folder),
        "COLUMNS": "120",
    }

    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110, check=False)

    printed = done.stdout
    assert done.returncode == 0, printed + done.stderr
    assert "10 pictures through one stream" in printed and "images/s" in printed
    assert re.search(r"→ There (is|are) \d", printed)
    assert re.search(r"→ มีรูปทรง \d+ ชิ้น", printed)
    assert "SUCCEEDED" in printed
    assert (tmp_path / "shown" / "picture.jpg").read_bytes().startswith(b"\xff\xd8")
    assert str(tmp_path / "shown" / "picture.jpg") in printed
    assert b"ftyp" in (tmp_path / "shown" / "picture.mp4").read_bytes()[:16] and "45 frames" in printed
    assert "ai4thai up" in printed and "All of it worked" in printed
    # torch leaves an empty cache folder behind; of ours there is nothing.
    assert [path.name for path in short_folder.iterdir() if not path.name.startswith("torchinductor_")] == []
    ours = [process for process in psutil.process_iter(["environ"]) if _belongs(process, str(short_folder))]
    assert ours == []


def _belongs(process: psutil.Process, scratch: str) -> bool:
    return (process.info["environ"] or {}).get("TMPDIR") == scratch
