"""Measures how well a YOLO model finds, or names, the shapes of scenes whose truth is known."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic

import numpy as np

from vision_server.shapes import boxes
from vision_server.shapes.agreement import PlacedPoints, mask_overlap, point_similarity, turned_overlap
from vision_server.shapes.held_out import HeldOutScene
from vision_server.shapes.matching import Agreement, Thing, average_precision, matched
from vision_server.shapes.scenes import LABELS, Points, Shape
from vision_server.shapes.task_truth import Mask, mask, named_points, turned_box
from vision_server.shapes.yolo_dataset import POINT_SIGMA
from vision_server.torchvision_ops import install

CONFIDENCE = 0.25
# Surest first; what lies beyond these moves no figure.
MAX_FOUND = 100


def load_yolo(weights: Path) -> Any:
    """Ultralytics reads its settings at import: they go to scratch, and it neither fetches nor installs."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
    install()
    from ultralytics import YOLO

    return YOLO(str(weights))


@dataclass(frozen=True)
class Finding(Generic[Thing]):
    """What a task finds of a shape, besides its label."""

    # The things in one answer of Ultralytics, in its order (surest first).
    things: Callable[[Any], Sequence[Thing]]
    # The true one, in a picture so many pixels wide and high.
    truth: Callable[[Shape, int, int], Thing]
    agreement: Agreement[Thing]
    # Which part of Ultralytics' answer has labels and confidences.
    part: str = "boxes"


def _found_points(result: Any) -> list[PlacedPoints]:
    sides = (result.boxes.xyxy[:, 2:] - result.boxes.xyxy[:, :2]).tolist()
    placed = zip(result.keypoints.xy.numpy(), sides, strict=True)
    return [PlacedPoints(points, width * height) for points, (width, height) in placed]


def _true_points(shape: Shape, width_px: int, height_px: int) -> PlacedPoints:
    x0, y0, x1, y1 = shape.box
    return PlacedPoints(named_points(shape), (x1 - x0) * (y1 - y0))


BOXES: Finding[boxes.Box] = Finding(
    things=lambda result: [tuple(box) for box in result.boxes.xyxy.tolist()],
    truth=lambda shape, width_px, height_px: shape.box,
    agreement=boxes.overlap,
)
MASKS: Finding[Mask] = Finding(
    things=lambda result: [] if result.masks is None else list(result.masks.data.numpy().astype(bool)),
    truth=mask,
    agreement=mask_overlap,
)
TURNED_BOXES: Finding[Points] = Finding(
    things=lambda result: list(result.obb.xyxyxyxy.numpy()),
    truth=lambda shape, width_px, height_px: turned_box(shape),
    agreement=turned_overlap,
    part="obb",
)
NAMED_POINTS: Finding[PlacedPoints] = Finding(
    things=_found_points, truth=_true_points, agreement=partial(point_similarity, sigma=POINT_SIGMA)
)
EXACT_POINTS = replace(NAMED_POINTS, agreement=partial(point_similarity, sigma=POINT_SIGMA / 2))


def find(
    model: Any, scene: HeldOutScene, finding: Finding[Thing], confidence: float = CONFIDENCE
) -> list[tuple[str, float, Thing]]:
    """What the model finds in one scene: label, confidence, thing (in the picture's pixels)."""
    # Ultralytics takes arrays as BGR. rect=False pads to the full square, as the server does.
    result = model.predict(
        scene.image[..., ::-1],
        conf=confidence,
        iou=0.6,
        rect=False,
        retina_masks=True,
        max_det=MAX_FOUND,
        verbose=False,
    )[0].cpu()
    found = getattr(result, finding.part)
    labels, scores = found.cls.tolist(), found.conf.tolist()
    return [
        (LABELS[int(label)], score, thing)
        for label, score, thing in zip(labels, scores, finding.things(result), strict=True)
    ]


def true_things(scene: HeldOutScene, finding: Finding[Thing]) -> list[tuple[str, Thing]]:
    """What there is to find in one scene: label, thing."""
    height_px, width_px = scene.image.shape[:2]
    return [(shape.label, finding.truth(shape, width_px, height_px)) for shape in scene.shapes]


def measure_finding(model: Any, scenes: Sequence[HeldOutScene], finding: Finding[Thing]) -> dict[str, float]:
    """mAP over all confidences; recall, false finds and confidences at the usual threshold."""
    found, truths, true_confidences, agreements = [], [], [], []
    missed = false_finds = empty = false_on_empty = 0
    for scene in scenes:
        things, truth = find(model, scene, finding, confidence=0.001), true_things(scene, finding)
        found.append(things)
        truths.append(truth)
        kept = [thing for thing in things if thing[1] >= CONFIDENCE]
        hits = matched(kept, truth, 0.5, finding.agreement)
        true_confidences += [kept[index][1] for index, _, _ in hits]
        agreements += [agreed for _, _, agreed in hits]
        missed += len(truth) - len(hits)
        false_finds += len(kept) - len(hits)
        if not truth:
            empty += 1
            false_on_empty += len(kept)
    levels = np.arange(0.5, 1.0, 0.05)
    precision = [average_precision(found, truths, LABELS, level, finding.agreement) for level in levels]
    total = sum(len(truth) for truth in truths)
    return {
        "scenes": len(scenes),
        "objects": total,
        "map50": round(precision[0], 4),
        "map50_95": round(float(np.mean(precision)), 4),
        "recall": round(1 - missed / max(1, total), 4),
        "median_agreement": round(float(np.median(agreements)), 4),
        "false_boxes_per_scene": round(false_finds / len(scenes), 4),
        "empty_scenes": empty,
        "false_boxes_per_empty_scene": round(false_on_empty / max(1, empty), 4),
        "median_confidence": round(float(np.median(true_confidences)), 3),
        "share_above_half_confidence": round(float(np.mean(np.array(true_confidences) > 0.5)), 4),
    }


def measure_naming(model: Any, scenes: Sequence[HeldOutScene]) -> dict[str, float]:
    """How often a classifier's first class is the label of the only shape, for all and by label."""
    right: dict[str, list[bool]] = {label: [] for label in LABELS}
    confidences = []
    for scene in scenes:
        classes = model.predict(scene.image[..., ::-1], verbose=False)[0].probs
        label = scene.shapes[0].label
        right[label].append(model.names[classes.top1] == label)
        confidences.append(float(classes.top1conf))
    every = [value for values in right.values() for value in values]
    return {
        "scenes": len(scenes),
        "top1": round(float(np.mean(every)), 4),
        **{f"top1_{label}": round(float(np.mean(values)), 4) for label, values in right.items()},
        "median_confidence": round(float(np.median(confidences)), 3),
    }
