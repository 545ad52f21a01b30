"""What lies in each patch of a scene, as a loss that teaches the vision tower to see before it has to speak."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vision_server.shapes.palette import COLOURS
from vision_server.shapes.scenes import LABELS, Scene

MAX_SHAPES = 5
# A patch counts as part of a shape when the shape covers this much of it.
COVERAGE = 0.2
# Columns of the truth: shape and colour (0 is background), whether a shape's centre lies here, and, there only,
# that shape's place from the left, how many share its label, how many shapes there are.
COLUMNS = ("shape", "colour", "centre", "place", "same", "total")

# The first row of patches also keeps a summary that the language model can read without searching the picture:
# patch 0 the leftmost shape, patch 1 the next, and so on; after these one patch a label with how many there are.
SLOTS = slice(0, MAX_SHAPES)
TALLIES = slice(MAX_SHAPES, MAX_SHAPES + len(LABELS))
SUMMARY_WEIGHT = 1.0
# Descriptions go from left to right: place weighs more than its few patches would.
CENTRE_WEIGHT = 0.3


@dataclass(frozen=True)
class PatchLoss:
    """The loss to minimise, with shares of right answers to watch."""

    total: torch.Tensor
    shape_accuracy: float
    colour_accuracy: float
    centre_recall: float
    place_accuracy: float
    slot_accuracy: float
    tally_accuracy: float


def patch_truth(scene: Scene, image_px: int, patch_px: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """(patches, 6) integers, row by row, for the scene squashed to image_px x image_px."""
    grid = image_px // patch_px
    truth = np.zeros((grid * grid, len(COLUMNS)), np.int64)
    height_px, width_px = scene.image.shape[:2]
    scale = np.array([image_px / width_px, image_px / height_px])
    covered = np.full(grid * grid, COVERAGE)
    for shape in scene.shapes:
        mask = np.zeros((image_px, image_px), np.float32)
        corners = np.round(np.array(shape.polygon) * scale * 16).astype(np.int32)
        cv2.fillPoly(mask, [corners], 1.0, cv2.LINE_8, shift=4)
        coverage = mask.reshape(grid, patch_px, grid, patch_px).mean((1, 3)).ravel()
        mine = coverage > covered
        covered[mine] = coverage[mine]
        truth[mine, 0] = 1 + LABELS.index(shape.label)
        truth[mine, 1] = 1 + COLOURS.index(shape.colour)
    for place, shape in enumerate(scene.shapes):
        column, row = (int(value) for value in np.array(shape.centre) * scale / patch_px)
        same = sum(other.label == shape.label for other in scene.shapes)
        truth[row * grid + column] = (
            1 + LABELS.index(shape.label),
            1 + COLOURS.index(shape.colour),
            1,
            place,
            same - 1,
            len(scene.shapes) - 1,
        )
    return truth


@dataclass(frozen=True)
class Summary:
    """What the first row of patches should know about each scene of a batch."""

    slots: torch.Tensor  # (images, 5, 2): shape and colour of the shapes from left to right, 0 where there is none
    tallies: torch.Tensor  # (images, 4): how many of each label


def summarise(scenes: Sequence[Scene]) -> Summary:
    """The truth for the summary patches."""
    slots = np.zeros((len(scenes), MAX_SHAPES, 2), np.int64)
    tallies = np.zeros((len(scenes), len(LABELS)), np.int64)
    for row, scene in enumerate(scenes):
        for place, shape in enumerate(scene.shapes):
            slots[row, place] = 1 + LABELS.index(shape.label), 1 + COLOURS.index(shape.colour)
            tallies[row, LABELS.index(shape.label)] += 1
    return Summary(torch.from_numpy(slots), torch.from_numpy(tallies))


class PatchHeads(nn.Module):
    """One linear layer that reads the patch truth off the vision features; it is not part of the shipped model."""

    SIZES = (1 + len(LABELS), 1 + len(COLOURS), 1, MAX_SHAPES, MAX_SHAPES, MAX_SHAPES)
    SLOT_SIZES = (1 + len(LABELS), 1 + len(COLOURS))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(self.SIZES))
        self.slot = nn.Linear(width, sum(self.SLOT_SIZES))
        self.tally = nn.Linear(width, 1 + MAX_SHAPES)

    def _summary_loss(self, features: torch.Tensor, summary: Summary) -> tuple[torch.Tensor, float, float]:
        shape, colour = self.slot(features[:, SLOTS]).split(self.SLOT_SIZES, -1)
        tally = self.tally(features[:, TALLIES])
        loss = functional.cross_entropy(shape.flatten(0, 1), summary.slots[..., 0].flatten())
        loss = loss + functional.cross_entropy(colour.flatten(0, 1), summary.slots[..., 1].flatten())
        loss = loss + functional.cross_entropy(tally.flatten(0, 1), summary.tallies.flatten())
        filled = summary.slots[..., 0] > 0
        right = (shape.argmax(-1) == summary.slots[..., 0]) & (colour.argmax(-1) == summary.slots[..., 1])
        counted = tally.argmax(-1) == summary.tallies
        return loss, right[filled].float().mean().item(), counted.float().mean().item()

    def loss(self, features: torch.Tensor, truth: torch.Tensor, summary: Summary) -> PatchLoss:
        """`features` is (images, patches, width), `truth` (images, patches, 6)."""
        shape, colour, centre, place, same, total = self.linear(features).split(self.SIZES, -1)
        inside = truth[..., 0] > 0
        # Background is most of every picture; without the weight it would be most of the loss.
        weight = (0.3 + 2.0 * inside.float()).flatten()

        def per_patch(logits: torch.Tensor, column: int) -> torch.Tensor:
            wanted = truth[..., column].flatten()
            return (functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="none") * weight).mean()

        here = truth[..., 2] > 0
        centre_loss = functional.binary_cross_entropy_with_logits(
            centre[..., 0], here.float(), pos_weight=torch.tensor(5.0)
        )
        loss = per_patch(shape, 0) + per_patch(colour, 1) + centre_loss
        place_accuracy = 0.0
        if here.any():
            for logits, column in ((place, 3), (same, 4), (total, 5)):
                loss = loss + CENTRE_WEIGHT * functional.cross_entropy(logits[here], truth[..., column][here])
            place_accuracy = (place[here].argmax(-1) == truth[..., 3][here]).float().mean().item()
        summary_loss, slots_right, tallies_right = self._summary_loss(features, summary)
        loss = loss + SUMMARY_WEIGHT * summary_loss
        shape_right = shape.argmax(-1)[inside] == truth[..., 0][inside]
        colour_right = colour.argmax(-1)[inside] == truth[..., 1][inside]
        return PatchLoss(
            loss,
            shape_right.float().mean().item(),
            colour_right.float().mean().item(),
            (centre[..., 0][here] > 0).float().mean().item(),
            place_accuracy,
            slots_right,
            tallies_right,
        )
