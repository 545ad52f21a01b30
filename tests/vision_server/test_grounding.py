"""What a detector found stands before the question, in the same words whenever the same was found."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from vision_server.grounding import MAX_CLASSES, MAX_POSITIONS, ground
from vision_server.results import Box, Classification, Detection

WIDTH_PX, HEIGHT_PX = 640, 480


def at(label: str, x0: float, y0: float, x1: float, y1: float, confidence: float = 0.9) -> Detection:
    return Detection(label, 0, confidence, Box(x0, y0, x1, y1))


def asked(detections: list[Detection], question: str = "Why?", size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX)) -> str:
    return ground(question, detections, width_px=size_px[0], height_px=size_px[1])


coordinates = st.floats(-1000, 10_000, allow_nan=False)
objects = st.lists(
    st.builds(
        at,
        st.text(min_size=1, max_size=12),
        coordinates,
        coordinates,
        coordinates,
        coordinates,
        st.floats(0, 1),
    ),
    max_size=60,
)


def test_objects_are_counted_by_label_then_placed_from_left_to_right() -> None:
    found = [at("star", 480, 0, 640, 480), at("circle", 320, 120, 480, 240), at("circle", 0, 48, 64, 96)]
    assert asked(found) == (
        "Detected objects: 2 circle, 1 star.\n"
        "Positions from left to right, in percent of width (x) and height (y): "
        "circle x 0-10, y 10-20; circle x 50-75, y 25-50; star x 75-100, y 0-100.\n"
        "Why?"
    )


def test_nothing_found_is_said_too() -> None:
    assert asked([]) == "Detected objects: none.\nWhy?"


def test_a_classifiers_answer_is_the_likeliest_classes() -> None:
    classes = [Classification(f"class {n}", n, 0.5**n) for n in range(1, MAX_CLASSES + 3)]
    said = ground("Why?", (), classes, width_px=WIDTH_PX, height_px=HEIGHT_PX)
    assert said == "Image classes: class 1 50%, class 2 25%, class 3 12%, class 4 6%, class 5 3%.\nWhy?"


def test_of_very_many_all_are_counted_and_the_surest_placed() -> None:
    sure = [at("star", 6 * n, 0, 6 * n + 6, 48, confidence=0.9) for n in range(MAX_POSITIONS)]
    unsure = [at("circle", 6 * n, 0, 6 * n + 6, 48, confidence=0.3) for n in range(40)]
    counts, positions, question = asked([*unsure, *sure]).split("\n")
    assert counts == "Detected objects: 40 circle, 20 star."
    assert positions.startswith("Positions of the 20 surest from left to right, ")
    assert positions.count("star") == positions.count("; ") + 1 == MAX_POSITIONS
    assert "circle" not in positions
    assert question == "Why?"


def test_a_box_beyond_the_pictures_edge_ends_there() -> None:
    assert "circle x 0-100, y 0-100" in asked([at("circle", -20, -1, 700, 480.4)])


def test_the_text_does_not_depend_on_the_pictures_size() -> None:
    found = [at("circle", 64, 48, 320, 240), at("star", 10, 400, 90, 470)]
    twice = [
        at(one.label, 2 * one.box.x_min_px, 2 * one.box.y_min_px, 2 * one.box.x_max_px, 2 * one.box.y_max_px)
        for one in found
    ]
    assert asked(found) == asked(twice, size_px=(2 * WIDTH_PX, 2 * HEIGHT_PX))


def test_a_label_of_several_lines_stays_in_its_own() -> None:
    said = asked([at("one\ntwo\r\n three", 0, 0, 64, 48)])
    assert said.split("\n")[0] == "Detected objects: 1 one two three."
    assert said.count("\n") == 2


@given(objects, st.text(max_size=40))
def test_whatever_was_found_the_question_comes_last_and_every_position_lies_in_the_picture(
    found: list[Detection], question: str
) -> None:
    said = asked(found, question)
    assert said.endswith(f"\n{question}")
    before = said.removesuffix(f"\n{question}")
    counts, *positions = before.splitlines() if found else [before]
    assert counts.startswith("Detected objects: ")
    assert len(positions) == bool(found)
    # The last two spans are those of the rightmost object, whatever its label says.
    for line in positions:
        spans = re.search(r" x (\d+)-(\d+), y (\d+)-(\d+)\.$", line)
        assert spans is not None
        assert all(0 <= int(edge) <= 100 for edge in spans.groups())
        assert line.count(", y ") >= min(len(found), MAX_POSITIONS)


@given(objects, st.integers(0, 1000))
def test_what_was_found_in_another_order_gives_the_same_counts(found: list[Detection], seed: int) -> None:
    mixed = list(found)
    random.Random(seed).shuffle(mixed)
    assert asked(mixed).splitlines()[0] == asked(found).splitlines()[0]
