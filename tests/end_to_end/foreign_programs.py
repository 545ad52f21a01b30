"""What programs that are not ours print about a picture."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.end_to_end.pictures import Picture
from tests.processes import ROOT
from tests.programs import needed
from vision_server.shapes.boxes import matched_boxes


def output_of(*command: str | Path, stdin: str | None = None, cwd: Path = ROOT) -> str:
    needed(command[0])
    done = subprocess.run(command, input=stdin, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def assert_found(answer: dict[str, Any], picture: Picture) -> None:
    """A DetectResponse in JSON, under the proto's field names or in camelCase, tells what is in the picture."""

    def edge(box: dict[str, float], name: str) -> float:
        return box.get(f"{name}_px", box.get(name.replace("_m", "M") + "Px", 0))

    boxes = [
        (d["label"], d["confidence"], tuple(edge(d["box"], name) for name in ("x_min", "y_min", "x_max", "y_max")))
        for d in answer["detections"]
    ]
    assert len(boxes) == len(picture.truth) == len(matched_boxes(boxes, picture.truth, 0.5)), (boxes, picture.truth)
