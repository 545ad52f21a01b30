"""The stand-in for torchvision's operators gives torchvision's answers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vision_server import torchvision_ops
from vision_server.torchvision_ops import install, suppress_overlaps

BOXES = torch.tensor(
    [
        (0.0, 0.0, 10.0, 10.0),  # best of a pair
        (1.0, 0.0, 11.0, 10.0),  # 90 / 110 = 0.82 of it
        (5.0, 0.0, 15.0, 10.0),  # 50 / 150 = 0.33 of the first
        (100.0, 100.0, 120.0, 120.0),  # far away, surest
    ]
)
SCORES = torch.tensor([0.8, 0.7, 0.6, 0.9])


def test_the_lesser_of_two_close_boxes_goes() -> None:
    assert suppress_overlaps(BOXES, SCORES, 0.5).tolist() == [3, 0, 2]


def test_a_lower_threshold_suppresses_more() -> None:
    assert suppress_overlaps(BOXES, SCORES, 0.3).tolist() == [3, 0]


def test_a_box_exactly_at_the_threshold_stays() -> None:
    boxes = torch.tensor([(0.0, 0.0, 2.0, 1.0), (0.0, 0.0, 1.0, 1.0)])
    assert suppress_overlaps(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]


def test_no_boxes_give_no_indices() -> None:
    kept = suppress_overlaps(torch.empty(0, 4), torch.empty(0), 0.5)
    assert kept.tolist() == []
    assert kept.dtype == torch.long


def test_torchvision_works_after_install() -> None:
    # In a process of its own: whether torchvision is imported already decides what is tested.
    program = (
        "from vision_server.torchvision_ops import install; install(); install()\n"
        "import torch, torchvision\n"
        "boxes = torch.tensor([(0., 0., 10., 10.), (1., 0., 11., 10.), (20., 20., 30., 30.)])\n"
        "print(torchvision.ops.nms(boxes, torch.tensor([.5, .9, .8]), 0.5).tolist())\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[1, 2]", done.stderr


def test_nothing_happens_where_the_real_operators_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_ops, "_library", None)
    monkeypatch.setattr(torchvision_ops, "_real_operators_load", lambda package: True)
    assert install() is False
    assert torchvision_ops._library is None


def test_nothing_happens_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_ops, "_library", None)
    monkeypatch.setattr(torchvision_ops.importlib.util, "find_spec", lambda name: None)
    assert install() is False
