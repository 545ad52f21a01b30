"""Lets torchvision import where its compiled operators cannot be loaded.

The torchvision wheel on PyPI is linked against CUDA. Beside a CPU build of torch its operator library does not load,
so that `import torchvision` ends with "operator torchvision::nms does not exist". Ultralytics' predictor and the
image processors of transformers both import it. `install()` registers the missing operators with a pure-torch
implementation; it must run before torchvision is first imported.
"""

import importlib
import importlib.util
from pathlib import Path

import torch

# Held for the life of the process: the operators disappear when their library object is collected.
_library: torch.library.Library | None = None


def suppress_overlaps(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression.

    `boxes` is (n, 4) as x0, y0, x1, y1; the answer holds indices into it, best score first. A box goes when its
    intersection over union with a better kept one is above the threshold, as in torchvision.
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    boxes = boxes.float()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = scores.argsort(descending=True, stable=True)
    kept: list[torch.Tensor] = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        top_left = torch.maximum(boxes[best, :2], boxes[rest, :2])
        bottom_right = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (bottom_right - top_left).clamp(min=0).prod(1)
        order = rest[shared / (areas[best] + areas[rest] - shared) <= iou_threshold]
    return torch.stack(kept)


def _real_operators_load(package: Path) -> bool:
    try:
        torch.ops.load_library(str(package / "_C.so"))  # type: ignore[no-untyped-call]
    except OSError:  # libtorch_cuda.so or libcudart.so is missing: a CPU build of torch
        return False
    return True


def install() -> bool:
    """Register the operators if they are missing; True when this process uses the replacement."""
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.cuda.is_available():
        return False
    if _real_operators_load(Path(spec.origin).parent):
        return False
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    # qnms is never called here, but torchvision's import asks for its schema.
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl("nms", suppress_overlaps, "CPU")  # type: ignore[no-untyped-call]
    # torchvision.ops asks this before each call; it knows only about its own library file.
    extension = importlib.import_module("torchvision.extension")
    extension.__dict__["_has_ops"] = lambda: True
    return True
