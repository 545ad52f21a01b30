"""Of candidates that lie over each other, keeps the surest one (non-maximum suppression)."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Each class is moved so far away that boxes of two classes never meet; more pixels than any input has.
_CLASS_DISTANCE_PX = 1 << 16


def keep_upright(boxes: Floats, confidences: Floats, class_ids: NDArray[np.intp], iou_threshold: float) -> list[int]:
    """The places of the boxes that stay, the surest first; equally sure ones stay in their order.

    `boxes` is n × 4: centre x, centre y, width, height. A box goes when a surer one of its class stays and overlaps it by more
    than `iou_threshold`. OpenCV's loop over plain lists: for the few dozen candidates of a picture many times as quick as tensor
    operations, or as handing it arrays. (Its NMSBoxesBatched lets classes meet where boxes reach beyond the left or top edge.)
    """
    lefts_and_tops = boxes[:, :2] - boxes[:, 2:] / 2
    apart = np.concatenate((lefts_and_tops, boxes[:, 2:]), 1, dtype=np.float64)
    apart[:, 0] += class_ids * _CLASS_DISTANCE_PX
    # Who is a candidate was decided before: here only those go that are sure of nothing at all.
    kept = cv2.dnn.NMSBoxes(apart.tolist(), confidences.tolist(), 0.0, iou_threshold)
    return np.asarray(kept).tolist()  # type: ignore[no-any-return]


def keep_turned(
    boxes: Floats, angles: Floats, confidences: Floats, class_ids: NDArray[np.intp], iou_threshold: float
) -> list[int]:
    """keep_upright for boxes turned by `angles` (radians), as Ultralytics does it: overlap is that of Gaussians (ProbIoU)."""
    import torch
    from ultralytics.utils.metrics import batch_probiou
    from ultralytics.utils.nms import TorchNMS

    apart = np.column_stack((boxes, angles)).astype(np.float64)
    apart[:, 0] += class_ids * _CLASS_DISTANCE_PX
    kept = TorchNMS.fast_nms(
        torch.from_numpy(apart), torch.from_numpy(confidences), iou_threshold, iou_func=batch_probiou
    )
    return kept.tolist()  # type: ignore[no-any-return]
