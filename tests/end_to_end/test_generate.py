"""Questions about unseen scenes are answered rightly, in Thai and in English, as the words come."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ai4thai.vision.v1 import generation_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb

from tests.end_to_end.calling import Server, generate_request
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.pictures import Picture, assert_all_found, foreign, jpeg, unseen
from tests.end_to_end.slowing import slowed
from vision_server.shapes.questions import KINDS, LANGUAGES, Pair, answer, ask

SCENES = 8
DESCRIBE = {"en": "Describe the picture.", "th": "อธิบายภาพนี้"}


def generate(vision: Server, request: pb.GenerateRequest) -> tuple[list[str], pb.GenerateSummary]:
    """The deltas' texts, then the summary."""
    *deltas, last = vision.vision.Generate(request, timeout=60)
    assert last.WhichOneof("message") == "summary"
    assert all(delta.WhichOneof("message") == "delta" for delta in deltas)
    return [delta.delta.text for delta in deltas], last.summary


def asked() -> Iterator[tuple[Picture, Pair]]:
    """One question of every kind and language about every scene that allows it."""
    rng = np.random.default_rng(73)
    for picture in unseen(SCENES):
        for kind in KINDS:
            for language in LANGUAGES:
                if (pair := ask(rng, picture.shapes, kind, language)) is not None:
                    yield picture, pair


@pytest.fixture(scope="module")
def crowded() -> Picture:
    """A scene of four shapes, so that its description is long."""
    return foreign(203, 4, 4)


@pytest.fixture(scope="module")
def wholes(vision: Server, crowded: Picture) -> dict[str, pb.GenerateSummary]:
    """Its description in each language, to its own end."""
    content = jpeg(crowded.image)
    return {language: generate(vision, generate_request(content, DESCRIBE[language]))[1] for language in LANGUAGES}


def test_answers_are_right_in_both_languages(vision: Server) -> None:
    questions = list(asked())
    assert len(questions) > 8 * SCENES

    def right(item: tuple[Picture, Pair]) -> bool:
        picture, pair = item
        return generate(vision, generate_request(jpeg(picture.image), pair.question))[1].text == pair.answer

    with ThreadPoolExecutor(4) as callers:
        marks = list(callers.map(right, questions))
    for language in LANGUAGES:
        mine = [mark for mark, (_, pair) in zip(marks, questions, strict=True) if pair.language == language]
        wrong = [pair for mark, (_, pair) in zip(marks, questions, strict=True) if not mark]
        assert sum(mine) / len(mine) >= 0.85, wrong


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_answer_comes_in_pieces_that_join_to_the_whole(vision: Server, crowded: Picture, language: str) -> None:
    pieces, summary = generate(vision, generate_request(jpeg(crowded.image), DESCRIBE[language]))
    assert len(pieces) >= 5
    assert all(pieces)
    assert "".join(pieces) == summary.text
    assert summary.text.startswith("There are " if language == "en" else "มีรูปทรง ")
    # No piece begins with a mark that belongs on the letter before it (Thai vowels above and below, tone marks).
    assert not any(piece[0] in "ัิีึืฺุู็่้๊๋์ํ๎" for piece in pieces)
    assert summary.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert summary.model == "shapes-describer"
    assert len(pieces) <= summary.usage.completion_tokens
    assert 0 < summary.usage.image_tokens < summary.usage.prompt_tokens
    assert 0 < summary.timings.time_to_first_token_ms < summary.timings.total_ms


def test_the_first_piece_comes_long_before_the_last(vision: Server, crowded: Picture) -> None:
    with slowed(vision.process.pid, 5):
        call = vision.vision.Generate(generate_request(jpeg(crowded.image), DESCRIBE["th"]), timeout=60)
        next(call)
        assert vision.process.process.poll() is None
        rest = list(call)
    summary = rest[-1].summary
    assert summary.timings.time_to_first_token_ms < 0.8 * summary.timings.total_ms


def test_max_new_tokens_ends_the_answer(
    vision: Server, crowded: Picture, wholes: dict[str, pb.GenerateSummary]
) -> None:
    request = generate_request(jpeg(crowded.image), DESCRIBE["en"], max_new_tokens=4)
    pieces, summary = generate(vision, request)
    assert summary.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert summary.usage.completion_tokens == 4
    assert "".join(pieces) == summary.text
    assert wholes["en"].text.startswith(summary.text)
    assert len(summary.text) < len(wholes["en"].text)


@pytest.mark.parametrize(("language", "stop"), [("en", " and "), ("en", "shapes: a"), ("th", "ได้แก่"), ("th", " และ")])
def test_the_answer_ends_before_a_stop_text(
    vision: Server, crowded: Picture, wholes: dict[str, pb.GenerateSummary], language: str, stop: str
) -> None:
    whole = wholes[language].text
    assert stop in whole
    request = generate_request(jpeg(crowded.image), DESCRIBE[language], stop=["never said", stop])
    pieces, summary = generate(vision, request)
    assert summary.text == "".join(pieces) == whole.partition(stop)[0]
    assert summary.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert summary.usage.completion_tokens < wholes[language].usage.completion_tokens


def test_the_same_seed_gives_the_same_text(vision: Server, crowded: Picture) -> None:
    def text(seed: int) -> str:
        request = generate_request(jpeg(crowded.image), "Describe the picture.", temperature=2, seed=seed)
        return generate(vision, request)[1].text

    texts = [text(seed) for seed in range(6)]
    assert texts == [text(seed) for seed in range(6)]
    assert len(set(texts)) > 1


def test_when_the_caller_leaves_the_generation_stops(
    vision: Server, crowded: Picture, wholes: dict[str, pb.GenerateSummary]
) -> None:
    request = generate_request(jpeg(crowded.image), DESCRIBE["th"])
    tokens_before = vision.metric("ai4thai_generated_tokens_total")
    cancelled_before = vision.metric("ai4thai_generations_total", finish_reason="cancelled")
    with slowed(vision.process.pid, 20):
        call = vision.vision.Generate(request, timeout=60)
        next(call)
        call.cancel()
        wait_until("the call has ended", lambda: vision.vision_calls_in_flight == 0)
    wait_until(
        "the generation has ended",
        lambda: vision.metric("ai4thai_generations_total", finish_reason="cancelled") == cancelled_before + 1,
    )
    generated = vision.metric("ai4thai_generated_tokens_total") - tokens_before
    assert 1 <= generated < wholes["th"].usage.completion_tokens / 2
    # The model is free: the next caller has the whole answer.
    assert generate(vision, request)[1].text == wholes["th"].text


def test_a_conversation_goes_on(vision: Server, crowded: Picture) -> None:
    part = generation_pb2.MessagePart
    messages = [
        generation_pb2.Message(role=generation_pb2.ROLE_SYSTEM, parts=[part(text="Answer shortly.")]),
        generation_pb2.Message(
            role=generation_pb2.ROLE_USER,
            parts=[part(image=image_pb2.Image(content=jpeg(crowded.image))), part(text="Describe the picture.")],
        ),
        generation_pb2.Message(
            role=generation_pb2.ROLE_ASSISTANT, parts=[part(text=answer("describe", "en", crowded.shapes))]
        ),
        generation_pb2.Message(role=generation_pb2.ROLE_USER, parts=[part(text="How many shapes are there?")]),
    ]
    pieces, summary = generate(vision, pb.GenerateRequest(messages=messages))
    # The shipped model was not trained to converse: what it says is its own, how it is said is the server's.
    assert "".join(pieces) == summary.text
    assert summary.usage.prompt_tokens > summary.usage.image_tokens > 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_analyze_answers_boxes_and_words_at_once(vision: Server, crowded: Picture, language: str) -> None:
    image = image_pb2.Image(content=jpeg(crowded.image))
    said = vision.vision.Analyze(pb.AnalyzeRequest(image=image, question=DESCRIBE[language]), timeout=60)
    assert_all_found(said.detection.detections, crowded)
    assert said.text.startswith("There are 4" if language == "en" else "มีรูปทรง 4")
    assert said.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert said.usage.completion_tokens > 0
    assert said.timings.total_ms > 0


def test_analyze_is_right_about_most_scenes(vision: Server) -> None:
    right = 0
    for picture in unseen(SCENES):
        request = pb.AnalyzeRequest(
            image=image_pb2.Image(content=jpeg(picture.image)), question="How many shapes are there?"
        )
        right += vision.vision.Analyze(request, timeout=60).text == answer("total", "en", picture.shapes)
    assert right >= SCENES - 1
