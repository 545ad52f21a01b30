"""Rows that step together answer token for token as generate() does alone, in every family that is served."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.vision_server.describers import families
from tests.vision_server.describers.asking import answer, any_picture, generating, reference
from vision_server.describers.alone import SeparateRows
from vision_server.describers.describer import PicturedTurn
from vision_server.describers.language_model import LanguageModel, Limits
from vision_server.describers.prompts import Prompt
from vision_server.describers.rows import JoinedRows
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Role

WORDS = ["What", "is", "in", "the", "image", "ในภาพ", "มี", "อะไร", "บ้าง", "วงกลม", "red", "7", "ສີແດງ", "🙂"]


@dataclass(frozen=True)
class Asked:
    prompt: Prompt
    tokens: int
    delay_s: float


def conversation(rng: np.random.Generator, pictures: list[Image]) -> list[PicturedTurn]:
    """One to three turns of any length, with any pictures among the words."""

    def words() -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(1, 25))))

    def parts() -> tuple[str | Image, ...]:
        shown = [pictures[int(rng.integers(len(pictures)))] for _ in range(int(rng.integers(0, 3)))]
        return (*shown, words())

    turns = [PicturedTurn(Role.USER, parts())]
    for _ in range(int(rng.integers(0, 2))):
        turns += [PicturedTurn(Role.ASSISTANT, (words(),)), PicturedTurn(Role.USER, parts())]
    return turns


def mix(model: LanguageModel, seed: int, count: int, *, tokens: int) -> list[Asked]:
    rng = np.random.default_rng(seed)
    pictures = [any_picture(rng) for _ in range(4)]
    return [
        Asked(
            model.prepare(conversation(rng, pictures)),
            int(rng.integers(1, tokens)),
            float(rng.choice([0, 0, 0.02, 0.1])),
        )
        for _ in range(count)
    ]


async def together(model: LanguageModel, mixed: list[Asked], *, max_running: int) -> list[str]:
    async with generating(model, max_running=max_running, max_queued=len(mixed) + 8) as generations:

        async def one(asked: Asked) -> str:
            await asyncio.sleep(asked.delay_s)
            _, summary = await answer(generations, asked.prompt, GenerateOptions(max_new_tokens=asked.tokens))
            return summary.text

        return await asyncio.gather(*map(one, mixed))


@pytest.mark.parametrize("seed", range(2))
async def test_any_mix_of_prompts_pictures_and_arrivals_answers_as_each_alone(
    describer: LanguageModel, seed: int
) -> None:
    # given: conversations of any shape
    mixed = mix(describer, seed, 12, tokens=24)
    alone = [describer.decode(reference(describer, asked.prompt, asked.tokens)) for asked in mixed]
    # when: they come at any time, more of them than there are places
    texts = await together(describer, mixed, max_running=5)
    # then
    assert texts == alone


@pytest.mark.parametrize("family", families.JOINED)
async def test_every_family_steps_together_as_generate_does_alone(family: str, tmp_path: Path) -> None:
    families.JOINED[family](tmp_path)
    # a prompt is read in several chunks, so that these are tested too
    model = LanguageModel.load(
        family, str(tmp_path), device="cpu", quantization="none", offline=True, limits=Limits(prefill_tokens=24)
    )
    model.warm_up()
    assert isinstance(model.rows, JoinedRows)
    mixed = mix(model, 7, 10, tokens=12)
    assert any(len(asked.prompt.pictures) > 1 for asked in mixed)
    alone = [model.decode(reference(model, asked.prompt, asked.tokens)) for asked in mixed]
    assert await together(model, mixed, max_running=4) == alone
    assert len(set(alone)) > 3, "random weights still say different things"


async def test_a_models_own_repetition_penalty_is_applied_as_generate_does(tmp_path: Path) -> None:
    # Qwen-VL's published models have one.
    families.qwen2_vl(tmp_path)
    config = tmp_path / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "repetition_penalty": 1.5}))
    model = LanguageModel.load("qwen2_vl", str(tmp_path), device="cpu", quantization="none", offline=True)
    model.warm_up()
    assert isinstance(model.rows, JoinedRows) and model.needs_history
    mixed = mix(model, 7, 6, tokens=12)
    alone = [model.decode(reference(model, asked.prompt, asked.tokens)) for asked in mixed]
    assert await together(model, mixed, max_running=3) == alone


async def test_a_family_that_cannot_is_stepped_in_turn_with_the_same_answers(tmp_path: Path) -> None:
    families.gemma3(tmp_path)
    model = LanguageModel.load("gemma3", str(tmp_path), device="cpu", quantization="none", offline=True)
    model.warm_up()
    assert isinstance(model.rows, SeparateRows)
    mixed = mix(model, 7, 6, tokens=8)
    alone = [model.decode(reference(model, asked.prompt, asked.tokens)) for asked in mixed]
    assert await together(model, mixed, max_running=3) == alone


def test_rows_may_come_and_go_in_any_order(describer: LanguageModel) -> None:
    # given: rows of different lengths, stepped by hand
    rng = np.random.default_rng(3)
    mixed = mix(describer, 11, 9, tokens=2)
    expected = {id(asked): reference(describer, asked.prompt, 6) for asked in mixed}
    rows = describer.rows
    running: list[tuple[Asked, list[int]]] = []
    waiting = list(mixed)
    answered: dict[int, list[int]] = {}
    # when: they join and leave at random
    while waiting or running:
        while waiting and (not running or rng.random() < 0.5):
            asked = waiting.pop()
            reading = rows.read(asked.prompt)
            while not reading.done:
                reading.advance()
            rows.join(asked.prompt, reading, asked.prompt.prompt_tokens + 6)
            running.append((asked, [int(asked.prompt.inputs["input_ids"][0, -1])]))
        scores = rows.step([tokens[-1] for _, tokens in running])
        for (_, tokens), token in zip(running, scores.argmax(-1).tolist(), strict=True):
            tokens.append(token)
        for index in reversed(range(len(running))):
            asked, tokens = running[index]
            whole = len(tokens) > len(expected[id(asked)])
            if whole or rng.random() < 0.1:
                rows.leave(index)
                running[index] = running[-1]
                running.pop()
                answered[id(asked)] = tokens[1:]
    # then: as far as each went, it went the right way
    assert len(answered) == len(mixed)
    assert any(len(tokens) >= 6 for tokens in answered.values())
    for number, tokens in answered.items():
        assert tokens == expected[number][: len(tokens)]
