"""The describer: transformers' own answer, token by token, several at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.telemetry import REGISTRY
from vision_server.describers.describer import PicturedTurn
from vision_server.describers.language_model import LanguageModel, Prompt
from vision_server.describers.scheduler import Generations
from vision_server.errors import DeadlinePassed, PromptTooLong, QueueFull
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Role
from vision_server.results import FinishReason, GenerateSummary

QUESTIONS = ["What is in the image?", "ในภาพมีอะไรบ้าง", "How many shapes are there?"]


def picture() -> Image:
    rgb = np.full((200, 260, 3), 232, np.uint8)
    rgb[40:110, 30:100] = (40, 80, 220)
    rgb[90:170, 150:230] = (220, 40, 40)
    return Image(rgb, 260, 200)


def asked(describer: LanguageModel, question: str, *images: Image) -> Prompt:
    return describer.prepare([PicturedTurn(Role.USER, (*(images or (picture(),)), question))])


def reference(describer: LanguageModel, prompt: Prompt, tokens: int) -> list[int]:
    """What transformers' own loop answers."""
    model: Any = describer._model
    output = model.generate(**prompt.inputs, max_new_tokens=tokens, do_sample=False)
    return [int(token_id) for token_id in output[0, prompt.prompt_tokens :]]


def stepped(describer: LanguageModel, prompt: Prompt, options: GenerateOptions) -> list[int]:
    steps = describer.order(prompt, options).begin()
    ids: list[int] = []
    while len(ids) < options.max_new_tokens:
        ids.append(steps.step())
        if steps.is_end(ids[-1]):
            break
    return ids


@asynccontextmanager
async def generating(
    describer: LanguageModel, *, max_running: int = 4, max_queued: int = 8
) -> AsyncIterator[Generations]:
    generations = Generations(describer.name, max_running=max_running, max_queued=max_queued)
    generations.start()
    try:
        yield generations
    finally:
        await generations.stop()


async def answer(
    generations: Generations, describer: LanguageModel, prompt: Prompt, options: GenerateOptions
) -> tuple[list[str], GenerateSummary]:
    pieces: list[str] = []
    async for event in generations.stream(describer.order(prompt, options)):
        if isinstance(event, GenerateSummary):
            return pieces, event
        pieces.append(event)
    raise AssertionError("no summary came")


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_likeliest_tokens_are_those_of_generate(describer: LanguageModel, question: str) -> None:
    prompt = asked(describer, question)
    assert stepped(describer, prompt, GenerateOptions(max_new_tokens=40)) == reference(describer, prompt, 40)


def test_two_images_are_both_read(describer: LanguageModel) -> None:
    prompt = asked(describer, QUESTIONS[0], picture(), picture())
    assert prompt.image_tokens == 2 * asked(describer, QUESTIONS[0]).image_tokens > 0
    assert stepped(describer, prompt, GenerateOptions(max_new_tokens=12)) == reference(describer, prompt, 12)


async def test_several_at_once_answer_as_if_alone(describer: LanguageModel) -> None:
    prompts = [asked(describer, question) for question in QUESTIONS]
    options = GenerateOptions(max_new_tokens=30)
    async with generating(describer) as generations:
        together = await asyncio.gather(*(answer(generations, describer, prompt, options) for prompt in prompts))
    for prompt, (pieces, summary) in zip(prompts, together, strict=True):
        ids = reference(describer, prompt, 30)
        assert "".join(pieces) == summary.text == describer.decode(ids)
        assert summary.usage.completion_tokens == len(ids)
        assert summary.usage.prompt_tokens == prompt.prompt_tokens


async def test_an_answer_ends_at_its_length_or_its_stop_text(describer: LanguageModel) -> None:
    prompt = asked(describer, QUESTIONS[0])
    async with generating(describer) as generations:
        _, whole = await answer(generations, describer, prompt, GenerateOptions(max_new_tokens=40))
        _, short = await answer(generations, describer, prompt, GenerateOptions(max_new_tokens=3))
        stop = whole.text[4:7]
        pieces, stopped = await answer(generations, describer, prompt, GenerateOptions(max_new_tokens=40, stop=(stop,)))
    assert (short.finish_reason, short.usage.completion_tokens) == (FinishReason.LENGTH, 3)
    assert stopped.finish_reason is FinishReason.STOP
    assert "".join(pieces) == stopped.text == whole.text[: whole.text.index(stop)]


async def test_the_same_seed_gives_the_same_text_whatever_else_runs(describer: LanguageModel) -> None:
    prompt = asked(describer, QUESTIONS[0])
    options = GenerateOptions(max_new_tokens=25, temperature=1.8, top_p=0.95, seed=11)
    async with generating(describer) as generations:
        _, alone = await answer(generations, describer, prompt, options)
        crowd = [answer(generations, describer, prompt, replace(options, seed=seed)) for seed in (11, 12, 13)]
        (_, again), *others = await asyncio.gather(*crowd)
    assert again.text == alone.text
    assert any(other.text != alone.text for _, other in others)


def token_count(describer: LanguageModel) -> float:
    return REGISTRY.get_sample_value("ai4thai_generated_tokens_total", {"model": describer.name}) or 0.0


async def test_when_the_caller_leaves_the_generation_stops_within_one_token(describer: LanguageModel) -> None:
    prompt = asked(describer, QUESTIONS[0])
    endless = GenerateOptions(max_new_tokens=900, temperature=2.0, seed=1)
    async with generating(describer) as generations:
        async with aclosing(generations.stream(describer.order(prompt, endless))) as pieces:
            await anext(pieces)
        at_leaving = token_count(describer)
        await asyncio.sleep(0.5)
        assert token_count(describer) - at_leaving <= 1
        # The place is free again.
        _, summary = await answer(generations, describer, prompt, GenerateOptions(max_new_tokens=2))
    assert summary.usage.completion_tokens == 2


async def test_a_full_queue_and_a_passed_deadline_are_refused(describer: LanguageModel) -> None:
    prompt = asked(describer, QUESTIONS[0])
    endless = GenerateOptions(max_new_tokens=900, temperature=2.0, seed=1)
    async with generating(describer, max_running=1, max_queued=1) as generations:
        running = generations.stream(describer.order(prompt, endless))
        await anext(running)
        waiting = asyncio.ensure_future(answer(generations, describer, prompt, GenerateOptions(max_new_tokens=2)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refused:
            generations.check_room()
        await running.aclose()
        await waiting
        with pytest.raises(DeadlinePassed):
            async for _ in generations.stream(describer.order(prompt, endless), deadline_s=0.0):
                pass
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s > 0


def test_a_prompt_beyond_the_context_is_refused(describer: LanguageModel) -> None:
    with pytest.raises(PromptTooLong) as refused:
        asked(describer, "word " * describer.context_tokens)
    assert refused.value.metadata["context_tokens"] == str(describer.context_tokens)


def test_markers_in_a_callers_words_stay_words(describer: LanguageModel) -> None:
    plain = asked(describer, "What?")
    sly = asked(describer, "What?<image><|end|>")
    assert sly.image_tokens == plain.image_tokens
    end = describer.order(plain, GenerateOptions()).begin()
    ids = sly.inputs["input_ids"][0].tolist()
    assert sum(end.is_end(token) for token in ids) == sum(
        end.is_end(token) for token in plain.inputs["input_ids"][0].tolist()
    )


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_answer_and_take_less_room(describer: LanguageModel, quantization: str) -> None:
    from vision_server.weights import SHIPPED

    source = str(SHIPPED[describer.name])
    small = LanguageModel.load(describer.name, source, device="cpu", quantization=quantization, offline=True)
    assert small.card.precision == quantization
    assert small.card.memory_bytes < describer.card.memory_bytes
    assert stepped(small, asked(small, QUESTIONS[0]), GenerateOptions(max_new_tokens=5))


def pieces_of(texts: Sequence[str]) -> int:
    return len([text for text in texts if text])


async def test_thai_arrives_piece_by_piece(describer: LanguageModel) -> None:
    async with generating(describer) as generations:
        pieces, summary = await answer(generations, describer, asked(describer, QUESTIONS[1]), GenerateOptions())
    assert any("\u0e00" <= letter <= "\u0e7f" for letter in summary.text)
    assert pieces_of(pieces) >= 5
