"""No two parts of the platform give different things the same metric's name: a dashboard shows them side by side."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def names_in(package: str) -> set[str]:
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("ai4thai_"):
                found.add(node.value)
    return found


def test_metric_names_are_of_one_server_each() -> None:
    vision, queue, serving = names_in("vision_server"), names_in("queue_server"), names_in("serving")
    assert len(vision) > 5 and len(queue) > 5 and len(serving) > 2
    assert not vision & queue
    assert not serving & (vision | queue)
