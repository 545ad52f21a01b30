"""The word a question is about is found in it, with what it should bring to mind."""

import numpy as np
import pytest
import torch

from vision_server.shapes.palette import COLOURS
from vision_server.shapes.questions import KINDS, LANGUAGES, ask
from vision_server.shapes.scenes import LABELS, Shape
from vision_server.shapes.subject_truth import IGNORED, LEVELS, SubjectHeads, item_starts, subject_end, subject_truth
from vision_server.shapes.wordings import THAI_COLOURS, THAI_SHAPES


def shape(colour: str, label: str) -> Shape:
    return Shape(label, colour, (0, 0, 1, 1), (), (0, 0, 0))


SHAPES = [shape("red", "circle"), shape("blue", "square"), shape("orange", "star"), shape("blue", "star")]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_named_word_ends_where_it_says(kind: str, language: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        pair = ask(rng, SHAPES, kind, language)
        assert pair is not None
        end = subject_end(pair)
        assert (end is None) == (kind in ("describe", "total"))
        if end is None:
            continue
        names = (*LABELS, *COLOURS) if language == "en" else (*THAI_SHAPES.values(), *THAI_COLOURS.values())
        assert pair.question.lower()[: end + 1].endswith(names)


def test_the_truth_is_what_the_scene_holds() -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        pair = ask(rng, SHAPES, KINDS[2 + rng.integers(4)], "en")
        assert pair is not None
        count, label, colour = subject_truth(pair, SHAPES)
        if pair.kind == "count":
            assert pair.answer.rstrip(".").endswith(f" {count}")
        if pair.kind == "exists":
            assert (pair.answer == "Yes.") == (count > 0)
        if pair.kind == "which":
            assert (label == IGNORED) == (count == 0)
            assert label == IGNORED or LABELS[label] in pair.answer
        if pair.kind == "colour":
            assert (colour == IGNORED) == (count == 0)
            assert colour == IGNORED or COLOURS[colour] in pair.answer


def test_each_shape_of_a_description_starts_where_it_says() -> None:
    twice = [SHAPES[0], SHAPES[0], SHAPES[1]]
    for language, first in (("en", ["red circle", "red circle", "blue square"]), ("th", ["วงกลม", "วงกลม", "สี่เหลี่ยม"])):
        pair = ask(np.random.default_rng(5), twice, "describe", language)
        assert pair is not None
        starts = item_starts(pair, twice)
        assert starts == sorted(set(starts))
        assert all(pair.answer[start:].startswith(name) for start, name in zip(starts, first, strict=True))


def test_the_heads_learn_from_what_is_known_only() -> None:
    heads = SubjectHeads(8)
    words = [torch.randn(2, 8, requires_grad=True) for _ in LEVELS]
    loss, accuracies = heads.loss(words, torch.tensor([[1, IGNORED, 2], [0, IGNORED, IGNORED]]))
    assert torch.isfinite(loss)
    assert accuracies[1] != accuracies[1]  # no shape was asked for: there is no share of right ones
