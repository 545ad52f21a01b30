"""Questions about a scene with their exact answers, in English and Thai."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vision_server.grounding import ground
from vision_server.results import Box, Detection
from vision_server.shapes.palette import COLOURS
from vision_server.shapes.scenes import LABELS, Image, Shape
from vision_server.shapes.wordings import (
    ENGLISH_PICTURES,
    ENGLISH_PLURALS,
    THAI_COLOURS,
    THAI_PICTURES,
    THAI_SHAPE_SYNONYMS,
    THAI_SHAPES,
    THAI_UNITS,
    WORDINGS,
)

KINDS = ("describe", "total", "count", "colour", "exists", "which")
LANGUAGES = ("en", "th")

# Some questions ask about what is not there, else "yes" and a colour would always be safe guesses.
ABSENT_SHARE = 0.1


@dataclass(frozen=True)
class Pair:
    """A question with its only right answer, and the shape and colour it names."""

    kind: str
    language: str
    question: str
    answer: str
    label: str = ""
    colour: str = ""


def grounded(question: str, found: Sequence[Detection], picture: Image) -> str:
    """The question as a server asks it after its detector has looked."""
    height_px, width_px = picture.shape[:2]
    return ground(question, found, width_px=width_px, height_px=height_px)


def detection(label: str, confidence: float, box: Sequence[float]) -> Detection:
    """What a detector says of a shape; the box is x0, y0, x1, y1 in pixels."""
    return Detection(label, LABELS.index(label), confidence, Box(*box))


def _english_list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _thai_list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else " ".join(words[:-1]) + " และ" + words[-1]


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _amount(count: int, language: str) -> str:
    if language == "th":
        return f"มี {count} ชิ้น"
    return f"There {'is' if count == 1 else 'are'} {count}."


def describe(shapes: Sequence[Shape], language: str) -> str:
    """Everything in the picture, left to right."""
    count = len(shapes)
    if language == "th":
        named = [THAI_SHAPES[shape.label] + THAI_COLOURS[shape.colour] for shape in shapes]
        return f"มีรูปทรง {count} ชิ้น ได้แก่ {_thai_list(named)}" if count else "ไม่มีรูปทรง"
    if not count:
        return "There are no shapes."
    named = [_with_article(f"{shape.colour} {shape.label}") for shape in shapes]
    verb, noun = ("is", "shape") if count == 1 else ("are", "shapes")
    return f"There {verb} {count} {noun}: {_english_list(named)}."


def answer(kind: str, language: str, shapes: Sequence[Shape], label: str = "", colour: str = "") -> str:
    """The one right answer. `label` or `colour` is what the question names, empty where it names none."""
    thai = language == "th"
    if kind == "describe":
        return describe(shapes, language)
    if kind == "total":
        return _amount(len(shapes), language)
    if kind == "count":
        return _amount(sum(shape.label == label for shape in shapes), language)
    if kind == "exists":
        found = any(shape.label == label and colour in ("", shape.colour) for shape in shapes)
        return ("มี" if found else "ไม่มี") if thai else ("Yes." if found else "No.")
    if kind == "colour":
        colours = [shape.colour for shape in shapes if shape.label == label]
        if not colours:
            return f"ไม่มี{THAI_SHAPES[label]}" if thai else f"There is no {label}."
        return THAI_SHAPES[label] + THAI_COLOURS[colours[0]] if thai else f"The {label} is {colours[0]}."
    labels = [shape.label for shape in shapes if shape.colour == colour]
    if not labels:
        return f"ไม่มีรูปทรง{THAI_COLOURS[colour]}" if thai else f"There is no {colour} shape."
    return THAI_SHAPES[labels[0]] if thai else f"The {labels[0]} is {colour}."


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _thai_question(rng: np.random.Generator, wording: str, label: str, colour: str) -> str:
    question = wording.format(
        shape=_pick(rng, THAI_SHAPE_SYNONYMS[label]) if label else "",
        colour=THAI_COLOURS[colour] if colour else "",
        unit=_pick(rng, THAI_UNITS[label]),
        picture=_pick(rng, THAI_PICTURES),
    )
    ending = rng.random()
    if ending < 0.3:
        question += _pick(rng, ("ครับ", "คะ", "ค่ะ", "นะ", "บ้างครับ" if question.endswith("อะไร") else "ครับ"))
    if rng.random() < 0.15:
        question += "?"
    return question


def _english_question(rng: np.random.Generator, wording: str, label: str, colour: str) -> str:
    question = wording.format(
        shape=label,
        shapes=ENGLISH_PLURALS[label] if label else "",
        colour=colour,
        picture=_pick(rng, ENGLISH_PICTURES),
        hue="colour" if rng.random() < 0.5 else "color",
    )
    change = rng.random()
    if change < 0.12:
        question = question.rstrip("?.")
    elif change < 0.2 and question.endswith("."):
        question = "Please " + question[0].lower() + question[1:]
    if rng.random() < 0.2:
        question = question[0].lower() + question[1:]
    return question


def word(rng: np.random.Generator, kind: str, language: str, label: str = "", colour: str = "") -> str:
    """One of the many ways to ask."""
    # "Is there a red star?" asks for two things at once; its wordings are apart.
    group = "exists coloured" if kind == "exists" and colour else kind
    wording = _pick(rng, WORDINGS[group][language])
    ask_in = _thai_question if language == "th" else _english_question
    return ask_in(rng, wording, label, colour)


def _subject(rng: np.random.Generator, kind: str, shapes: Sequence[Shape]) -> tuple[str, str] | None:
    """The label and colour a question names; None when this scene has no such question with one answer."""
    labels, colours = [shape.label for shape in shapes], [shape.colour for shape in shapes]
    if kind in ("describe", "total"):
        return "", ""
    if kind in ("colour", "which"):
        names, present = (LABELS, labels) if kind == "colour" else (COLOURS, colours)
        wanted = 0 if rng.random() < ABSENT_SHARE else 1
        fitting = [name for name in names if present.count(name) == wanted]
        if not fitting:
            return None
        name = _pick(rng, fitting)
        return (name, "") if kind == "colour" else ("", name)
    if kind == "exists" and rng.random() < 0.25:
        if shapes and rng.random() < 0.5:
            chosen = shapes[int(rng.integers(len(shapes)))]
            return chosen.label, chosen.colour
        return _pick(rng, LABELS), _pick(rng, COLOURS)
    # Half of the labels named are in the picture, whatever the picture.
    return (_pick(rng, labels) if labels and rng.random() < 0.4 else _pick(rng, LABELS)), ""


def ask(rng: np.random.Generator, shapes: Sequence[Shape], kind: str, language: str) -> Pair | None:
    """A question of this kind with its answer, or None where the scene allows none."""
    subject = _subject(rng, kind, shapes)
    if subject is None:
        return None
    label, colour = subject
    question = word(rng, kind, language, label, colour)
    return Pair(kind, language, question, answer(kind, language, shapes, label, colour), label, colour)
