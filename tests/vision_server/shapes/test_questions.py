"""Questions have the answers that the scene gives."""

import numpy as np
import pytest

from vision_server.shapes.boxes import matched_boxes
from vision_server.shapes.imagined_detections import imagine_detections
from vision_server.shapes.questions import KINDS, LANGUAGES, answer, ask, describe, detection, grounded
from vision_server.shapes.scenes import Shape, draw_scene
from vision_server.shapes.wordings import WORDINGS


def shape(colour: str, label: str) -> Shape:
    return Shape(label, colour, (0, 0, 1, 1), (), (0, 0, 0))


SHAPES = [shape("red", "circle"), shape("blue", "square"), shape("orange", "star"), shape("blue", "star")]


def test_a_description_goes_from_left_to_right() -> None:
    assert describe(SHAPES, "en") == (
        "There are 4 shapes: a red circle, a blue square, an orange star and a blue star."
    )
    assert describe(SHAPES[:2], "th") == "มีรูปทรง 2 ชิ้น ได้แก่ วงกลมสีแดง และสี่เหลี่ยมสีน้ำเงิน"
    assert describe(SHAPES[:1], "en") == "There is 1 shape: a red circle."
    assert describe([], "en") == "There are no shapes."
    assert describe([], "th") == "ไม่มีรูปทรง"


@pytest.mark.parametrize(
    ("kind", "label", "colour", "english", "thai"),
    [
        ("total", "", "", "There are 4.", "มี 4 ชิ้น"),
        ("count", "star", "", "There are 2.", "มี 2 ชิ้น"),
        ("count", "circle", "", "There is 1.", "มี 1 ชิ้น"),
        ("count", "triangle", "", "There are 0.", "มี 0 ชิ้น"),
        ("colour", "circle", "", "The circle is red.", "วงกลมสีแดง"),
        ("colour", "triangle", "", "There is no triangle.", "ไม่มีสามเหลี่ยม"),
        ("exists", "square", "", "Yes.", "มี"),
        ("exists", "triangle", "", "No.", "ไม่มี"),
        ("exists", "square", "red", "No.", "ไม่มี"),
        ("which", "", "orange", "The star is orange.", "ดาว"),
        ("which", "", "green", "There is no green shape.", "ไม่มีรูปทรงสีเขียว"),
    ],
)
def test_each_kind_has_one_answer(kind: str, label: str, colour: str, english: str, thai: str) -> None:
    assert answer(kind, "en", SHAPES, label, colour) == english
    assert answer(kind, "th", SHAPES, label, colour) == thai


def test_what_is_asked_has_one_answer() -> None:
    rng = np.random.default_rng(1)
    for _ in range(400):
        pair = ask(rng, SHAPES, KINDS[rng.integers(len(KINDS))], LANGUAGES[rng.integers(2)])
        if pair is None or pair.kind not in ("colour", "which"):
            continue
        # Two stars and two blue shapes: no question about "the star" or "the blue one".
        if pair.kind == "colour":
            assert "star" not in pair.question.lower()
            assert "ดาว" not in pair.question
        else:
            assert "blue" not in pair.question.lower()
            assert "สีน้ำเงิน" not in pair.question


def test_there_are_many_wordings() -> None:
    for kind in KINDS:
        for language in LANGUAGES:
            assert len(set(WORDINGS[kind][language])) >= 6


def test_questions_leave_no_placeholder() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        pair = ask(rng, SHAPES, KINDS[rng.integers(len(KINDS))], LANGUAGES[rng.integers(2)])
        assert pair is None or ("{" not in pair.question and pair.question.strip() == pair.question)


def test_what_was_found_stands_before_the_question() -> None:
    picture = np.zeros((100, 200, 3), np.uint8)
    found = [detection("star", 0.5, (100, 50, 200, 100)), detection("circle", 0.9, (0, 10, 50, 60))]
    assert grounded("Why?", found, picture) == (
        "Detected objects: 1 circle, 1 star.\n"
        "Positions from left to right, in percent of width (x) and height (y): circle x 0-25, y 10-60; star x 50-100, y 50-100.\n"
        "Why?"
    )


def test_the_detections_of_training_are_mostly_the_truth() -> None:
    rng = np.random.default_rng(3)
    true = found_count = exact = 0
    for _ in range(200):
        scene = draw_scene(rng, 192, 144)
        found = imagine_detections(rng, scene)
        truth = [(shape.label, shape.box) for shape in scene.shapes]
        boxes = [
            (o.label, o.confidence, (o.box.x_min_px, o.box.y_min_px, o.box.x_max_px, o.box.y_max_px)) for o in found
        ]
        hits = len(matched_boxes(boxes, truth, 0.5))
        true, found_count, exact = true + hits, found_count + len(found), exact + (hits == len(truth) == len(found))
    # Some mistakes, as a detector makes them, and not many.
    assert 0.88 < true / found_count < 0.99
    assert 0.7 < exact / 200 < 0.9
