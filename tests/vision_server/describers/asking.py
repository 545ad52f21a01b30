"""What the tests of describers ask, and what transformers' own loop answers to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from vision_server.describers.describer import PicturedTurn
from vision_server.describers.language_model import LanguageModel
from vision_server.describers.prompts import Prompt
from vision_server.describers.scheduler import Generations
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Role
from vision_server.results import GenerateSummary

QUESTIONS = ["What is in the image?", "ในภาพมีอะไรบ้าง", "How many shapes are there?"]


def picture() -> Image:
    rgb = np.full((200, 260, 3), 232, np.uint8)
    rgb[40:110, 30:100] = (40, 80, 220)
    rgb[90:170, 150:230] = (220, 40, 40)
    return Image(rgb, 260, 200)


def any_picture(rng: np.random.Generator) -> Image:
    """Some rectangles of any colour and size."""
    width, height = (int(side) for side in rng.integers(60, 300, 2))
    rgb = np.full((height, width, 3), rng.integers(0, 255, 3), np.uint8)
    for _ in range(3):
        x, y = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
        rgb[y : y + 40, x : x + 40] = rng.integers(0, 255, 3)
    return Image(rgb, width, height)


def asked(model: LanguageModel, question: str, *images: Image) -> Prompt:
    return model.prepare([PicturedTurn(Role.USER, (*(images or (picture(),)), question))])


def reference(model: LanguageModel, prompt: Prompt, tokens: int) -> list[int]:
    """What transformers' own loop answers."""
    inner: Any = model._model
    output = inner.generate(**prompt.inputs, max_new_tokens=tokens, do_sample=False)
    return [int(token_id) for token_id in output[0, prompt.prompt_tokens :]]


@asynccontextmanager
async def generating(model: Any, *, max_running: int = 4, max_queued: int = 8) -> AsyncIterator[Generations]:
    generations = Generations(model, max_running=max_running, max_queued=max_queued)
    generations.start()
    try:
        yield generations
    finally:
        await generations.stop()


async def answer(
    generations: Generations, prompt: Prompt, options: GenerateOptions, **more: Any
) -> tuple[list[str], GenerateSummary]:
    pieces: list[str] = []
    async for event in generations.stream(prompt, options, **more):
        if isinstance(event, GenerateSummary):
            return pieces, event
        pieces.append(event)
    raise AssertionError("no summary came")
