"""The shipped models load offline, answer rightly, name no machine."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from vision_server.shapes.evaluate import (
    DESCRIBER,
    DETECTOR,
    WEIGHTS,
    Describer,
    draw_pairs,
    load_detector,
    look_with,
    measure_detector,
)
from vision_server.shapes.held_out import foreign_scenes
from vision_server.shapes.questions import describe, grounded

MAX_BYTES = 20_000_000
SEED = 70_000


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("yolo")))
        yield load_detector()


@pytest.fixture(scope="module")
def describer() -> Describer:
    return Describer()


def shipped_files() -> list[Path]:
    return sorted(path for path in WEIGHTS.rglob("*") if path.is_file())


def test_checksums_match() -> None:
    listed = {}
    for line in (WEIGHTS / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ", 1)
        listed[name] = digest
    found = {
        str(path.relative_to(WEIGHTS)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in shipped_files()
        if path.name not in ("SHA256SUMS", "MODEL_CARD.md")
    }
    assert listed == found


def test_all_weights_together_are_small() -> None:
    assert sum(path.stat().st_size for path in shipped_files()) <= MAX_BYTES


def test_no_file_names_a_path_of_a_machine() -> None:
    for path in shipped_files():
        found = re.search(rb"/(?:home|root|tmp|work|mnt|Users|opt)/", path.read_bytes())
        assert found is None, f"{path.name} holds {found}"


def test_the_detector_finds_what_another_hand_drew(detector: Any) -> None:
    measured = measure_detector(detector, foreign_scenes(20, SEED))
    assert measured["recall"] >= 0.9
    assert measured["false_boxes_per_scene"] <= 0.5
    assert measured["median_confidence"] >= 0.6


def test_the_detector_knows_its_names_and_its_size(detector: Any) -> None:
    assert detector.names == {0: "circle", 1: "square", 2: "triangle", 3: "star"}
    assert detector.overrides["imgsz"] == 320
    assert DETECTOR.stat().st_size < 2_000_000


def test_the_describer_answers_about_what_another_hand_drew(describer: Describer) -> None:
    pairs = list(draw_pairs(foreign_scenes(12, SEED + 1), SEED))
    said = describer.answer([(scene.image, pair.question) for scene, pair in pairs])
    right = [answer == pair.answer for answer, (_, pair) in zip(said, pairs, strict=True)]
    assert sum(right) / len(right) >= 0.85


def test_the_describer_takes_what_a_detector_found(describer: Describer, detector: Any) -> None:
    pairs = list(draw_pairs(foreign_scenes(8, SEED + 40), SEED))
    found = look_with(detector, [scene for scene, _ in pairs])
    asked = [(s.image, grounded(pair.question, seen, s.image)) for (s, pair), seen in zip(pairs, found, strict=True)]
    right = [said == pair.answer for said, (_, pair) in zip(describer.answer(asked), pairs, strict=True)]
    assert sum(right) / len(right) >= 0.85


def test_answers_stream_in_several_tokens() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DESCRIBER / "tokenizer.json"))
    thai = describe(foreign_scenes(1, SEED)[0].shapes, "th")
    assert len(tokenizer.encode(thai).ids) >= 5
    for text in (thai, "héllo 漢字 สวัสดี"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
