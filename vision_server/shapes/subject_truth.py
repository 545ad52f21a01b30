"""What the word that a question is about should bring to mind, as a loss that teaches the language model to look."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from vision_server.shapes.palette import COLOURS
from vision_server.shapes.patch_truth import MAX_SHAPES
from vision_server.shapes.questions import Pair
from vision_server.shapes.scenes import LABELS, Shape
from vision_server.shapes.wordings import THAI_COLOURS, THAI_SHAPES

IGNORED = -100
# After these layers the word should know; the layers behind them carry it to the answer.
LEVELS = (2, 3)


def subject_end(pair: Pair) -> int | None:
    """Where in the question the last letter of what it names stands; None where it names nothing."""
    thai = pair.language == "th"
    names = []
    if pair.label:
        names.append(THAI_SHAPES[pair.label] if thai else pair.label)
    if pair.colour:
        names.append(THAI_COLOURS[pair.colour] if thai else pair.colour)
    asked = pair.question.lower()
    return max((asked.rindex(name) + len(name) - 1 for name in names), default=None)


def subject_truth(pair: Pair, shapes: Sequence[Shape]) -> tuple[int, int, int]:
    """How many shapes the named fits; where it is one, its shape if a colour was named, its colour if a shape was."""
    fitting = [s for s in shapes if pair.label in ("", s.label) and pair.colour in ("", s.colour)]
    label = colour = IGNORED
    if len(fitting) == 1 and not pair.label:
        label = LABELS.index(fitting[0].label)
    if len(fitting) == 1 and not pair.colour:
        colour = COLOURS.index(fitting[0].colour)
    return len(fitting), label, colour


def item_starts(pair: Pair, shapes: Sequence[Shape]) -> list[int]:
    """Where in a description the first letter of each shape stands."""
    starts: list[int] = []
    after = 0
    for shape in shapes:
        thai = THAI_SHAPES[shape.label] + THAI_COLOURS[shape.colour]
        start = pair.answer.index(thai if pair.language == "th" else f"{shape.colour} {shape.label}", after)
        starts.append(start)
        after = start + 1
    return starts


def item_truth(shape: Shape) -> tuple[int, int, int]:
    """What the token before a shape is named should know: as for a word, but without a number."""
    return IGNORED, LABELS.index(shape.label), COLOURS.index(shape.colour)


class SubjectHeads(nn.Module):
    """One linear layer a level that reads the truth off the word; it is not part of the shipped model."""

    SIZES = (1 + MAX_SHAPES, len(LABELS), len(COLOURS))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.SIZES))) for _ in LEVELS
        )

    def loss(self, words: Sequence[torch.Tensor], truth: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        """`words` is (words, width) for each level, `truth` (words, 3); also the last level's accuracies."""
        total = torch.zeros(())
        accuracies: list[float] = []
        for head, known in zip(self.levels, words, strict=True):
            accuracies = []
            for logits, wanted in zip(head(known).split(self.SIZES, -1), truth.unbind(-1), strict=True):
                has_one = wanted != IGNORED
                total = total + functional.cross_entropy(logits[has_one], wanted[has_one], reduction="sum") / len(truth)
                accuracies.append((logits.argmax(-1) == wanted)[has_one].float().mean().item())
        return total, accuracies
