"""Tokens a second and the time to the first one, of generations that step together, against generate() in a loop.

`python -m benchmarks.describer --shape 7b --device cuda` measures a GPU, each way of holding the weights.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.language_models import SHAPES, SHIPPED_NAME, random, shipped
from benchmarks.pages import RESULTS, Page, console
from vision_server.describers.describer import PicturedTurn
from vision_server.describers.language_model import LanguageModel, Limits
from vision_server.describers.prompts import Prompt
from vision_server.describers.scheduler import Generations
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Role
from vision_server.results import GenerateSummary
from vision_server.shapes.scenes import draw_scene

TOGETHER = (1, 4, 8, 16)
TOKENS = 48
ARRIVALS = 24
# Enough for the running answers to last until the last late comer has its token.
BUSY_TOKENS = 400
LIMITS = Limits(max_rows=max(TOGETHER))
QUESTIONS = ("What is in the image?", "ในภาพมีอะไรบ้าง", "How many shapes are there?", "อธิบายภาพนี้")


T = TypeVar("T")


@dataclass(frozen=True)
class Arrival:
    """One late comer: until its first token, and the steps that began meanwhile."""

    first_token_ms: float
    steps: int


def prompts(model: LanguageModel, count: int) -> list[Prompt]:
    """Questions, each about a picture of its own: nothing is found in the cache of features."""
    rng = np.random.default_rng(count)

    def picture() -> Image:
        rgb = np.full((160, 200, 3), rng.integers(150, 250, 3), np.uint8)
        x, y = (int(place) for place in rng.integers(0, 100, 2))
        rgb[y : y + 50, x : x + 60] = rng.integers(0, 255, 3)
        return Image(rgb, 200, 160)

    return [model.prepare([PicturedTurn(Role.USER, (picture(), QUESTIONS[i % len(QUESTIONS)]))]) for i in range(count)]


def thai(model: LanguageModel, count: int) -> list[Prompt]:
    """Requests in Thai to describe a picture, each of its own."""
    rng = np.random.default_rng(100 + count)
    scenes = [draw_scene(rng, 400, 300) for _ in range(count)]
    return [
        model.prepare([PicturedTurn(Role.USER, (Image(np.asarray(scene.image), 400, 300), "อธิบายภาพนี้"))])
        for scene in scenes
    ]


def sequential(model: LanguageModel, asked: Sequence[Prompt], threads: int) -> float:
    """Tokens a second of generate(), one request after another."""
    inner: Any = model._model
    torch.set_num_threads(threads)
    began_s = time.perf_counter()
    for prompt in asked:
        inputs = {
            name: value.to(inner.device, dtype=inner.dtype if value.is_floating_point() else None)
            for name, value in prompt.inputs.items()
        }
        output = inner.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        assert output.shape[1] == prompt.prompt_tokens + TOKENS
    return len(asked) * TOKENS / (time.perf_counter() - began_s)


class Endless:
    """The model, but that no answer ends before its length: both sides compute the same number of tokens."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.steps = 0
        step = model.rows.step

        def counted(tokens: Sequence[int]) -> Any:
            self.steps += 1
            return step(tokens)

        model.rows.step = counted  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def is_end(self, _token_id: int) -> bool:
        """Never."""
        return False


async def _answer(generations: Generations, prompt: Prompt, tokens: int = TOKENS) -> GenerateSummary:
    async for event in generations.stream(prompt, GenerateOptions(max_new_tokens=tokens)):
        if isinstance(event, GenerateSummary):
            return event
    raise AssertionError("no summary")


async def _together(generations: Generations, asked: Sequence[Prompt], count: int) -> float:
    """Tokens a second with `count` callers, each asking again when it has been answered."""
    waiting = list(asked[: max(8, 2 * count)])
    answers = len(waiting)

    async def caller() -> None:
        while waiting:
            await _answer(generations, waiting.pop())

    began_s = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(count)))
    return answers * TOKENS / (time.perf_counter() - began_s)


async def _arrivals(
    model: Endless, generations: Generations, *, asked: Sequence[Prompt], running: int
) -> list[Arrival]:
    """Callers that come one at a time while `running` others go on."""
    busy = [asyncio.ensure_future(_answer(generations, prompt, BUSY_TOKENS)) for prompt in asked[:running]]
    while running and len(generations._rows) < running:  # noqa: ASYNC110  # nobody is told when a row joins
        await asyncio.sleep(0.001)
    arrivals = []
    for prompt in asked[running:]:
        before = model.steps
        summary = await _answer(generations, prompt, 1)
        arrivals.append(Arrival(summary.timings.time_to_first_token_ms, model.steps - before))
        await asyncio.sleep(0.003)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    return arrivals


def tokens_per_s(model: LanguageModel, rows: int) -> float:
    """Tokens a second that this device could put through the model's matrices, `rows` at a time, and did nothing else."""
    config = model._model.config.get_text_config()
    weights = [
        torch.randn(config.intermediate_size, config.hidden_size, dtype=model._model.dtype, device=model._model.device)
    ]
    size_bytes = weights[0].numel() * weights[0].element_size()
    weights += [weights[0].clone() for _ in range(max(1, 400_000_000 // size_bytes) - 1)]  # beyond the caches
    inputs = torch.randn(rows, config.hidden_size, dtype=weights[0].dtype, device=weights[0].device)
    best_s = math.inf
    with torch.inference_mode():
        for _ in range(3):
            began_s = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs, weight)
            if weights[0].device.type == "cuda":
                torch.cuda.synchronize()
            best_s = min(best_s, time.perf_counter() - began_s)
    return rows * len(weights) * weights[0].numel() / best_s / parameters(model)


def _ceiling(count: int, read_s: float, step_s: float) -> float:
    """Tokens a second of so many answers: their prompts read one after the other, then stepped together."""
    return count * TOKENS / (count * read_s + TOKENS * step_s)


def parameters(model: LanguageModel) -> int:
    """Of the language half, that each token goes through."""
    decoder = model._model.get_decoder()
    head = model._model.get_output_embeddings()
    layers = sum(weight.numel() for name, weight in decoder.named_parameters() if "embed_tokens" not in name)
    return int(layers + head.weight.numel())


def measure_model(
    page: Page, model: LanguageModel, *, requests: int, threads: Sequence[int], goal: float | None
) -> None:
    """One model's section: tokens a second, then the time to the first token."""
    asked = prompts(model, requests)
    console.print(f"[dim]{model.name}: generate() one after another[/]")
    alone = {count: sequential(model, asked[: max(4, requests // 4)], count) for count in threads}
    best = max(alone, key=alone.__getitem__)
    endless = Endless(model)
    rates = {
        count: asyncio.run(_measured(endless, best, partial(_together, asked=asked, count=count))) for count in TOGETHER
    }
    page.say(
        f"{parameters(model) / 1e6:.0f} million parameters in {model.card.precision}, {model.card.memory_bytes / 1e6:,.0f} MB; "
        f"prompts of {asked[0].prompt_tokens} tokens ({asked[0].image_tokens} of a picture), {TOKENS} tokens answered, "
        f"{best} threads a pass (the best for generate())."
    )
    read_s = asked[0].prompt_tokens / tokens_per_s(model, asked[0].prompt_tokens)
    rows = [("generate() in a loop", f"{alone[best]:.1f}", "1.00", "", "")]
    for count, rate in rates.items():
        ceiling = _ceiling(count, read_s, count / tokens_per_s(model, count))
        rows.append(
            (f"{count} together", f"{rate:.1f}", f"{rate / alone[best]:.2f}", f"{ceiling:.0f}", f"{rate / ceiling:.2f}")
        )
    page.table(("requests", "tokens/s", "of generate()", "ceiling, tokens/s", "of it"), rows)
    most = _ceiling(16, read_s, 16 / tokens_per_s(model, 16)) / _ceiling(1, read_s, 1 / tokens_per_s(model, 1))
    page.say(
        "The ceiling: the language half's matrices alone, at the speed that this device multiplies matrices of their width, the "
        f"weights read from memory: each prompt once ({read_s * 1000:.0f} ms), and each step with so many rows; no attention, no "
        f"pictures, no Python. By it 16 together could have {most:.1f} × what one alone could."
    )
    if goal is not None:
        ratio = rates[16] / alone[best]
        page.goal(f"{model.name}: 16 together at least {goal:g} × generate()", ratio >= goal)
    _first_tokens(page, endless, best)


def _first_tokens(page: Page, model: Endless, threads: int) -> None:
    rows = []
    longest = 0
    for running in (0, 8):
        asked = prompts(model._model, running + ARRIVALS)
        arrivals = asyncio.run(_measured(model, threads, partial(_arrivals, model, asked=asked, running=running)))
        times = sorted(arrival.first_token_ms for arrival in arrivals)
        steps = max(arrival.steps for arrival in arrivals)
        longest = max(longest, steps)
        p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
        rows.append((running, f"{statistics.median(times):.1f}", f"{p99:.1f}", steps))
    page.table(("running already", "first token p50, ms", "p99, ms", "steps waited, at most"), rows)
    chunks = -(-asked[0].prompt_tokens // model.prefill_tokens)
    allowed = 2 if chunks == 1 else 1 + chunks
    page.goal(
        f"{model.name}: a late joiner waits for {allowed} steps at most ({chunks} chunks of prompt)", longest <= allowed
    )


async def _streamed(generations: Generations, *, asked: Sequence[Prompt]) -> list[tuple[float, int, int, float]]:
    """Of answers that run side by side: ms to the first piece, pieces, tokens, ms from first piece to the end."""

    async def one(prompt: Prompt) -> tuple[float, int, int, float]:
        began_s = time.perf_counter()
        pieces, first_s, tokens = 0, 0.0, 0
        async for event in generations.stream(prompt, GenerateOptions(max_new_tokens=TOKENS)):
            if isinstance(event, GenerateSummary):
                tokens = event.usage.completion_tokens
            else:
                first_s = first_s or time.perf_counter()
                pieces += 1
        return (first_s - began_s) * 1000, pieces, tokens, (time.perf_counter() - first_s) * 1000

    return await asyncio.gather(*map(one, asked))


def measure_pieces(page: Page, model: LanguageModel, threads: int) -> None:
    """How Thai answers arrive: a cluster at a time, soon after their tokens."""
    rows = []
    for count in (1, 8):
        asked = thai(model, count)
        streamed = asyncio.run(_measured(model, threads, partial(_streamed, asked=asked)))
        first_ms = statistics.median(one[0] for one in streamed)
        per_s = statistics.median((one[1] - 1) / (one[3] / 1000) for one in streamed)
        share = sum(one[1] for one in streamed) / sum(one[2] for one in streamed)
        rows.append((count, f"{first_ms:.1f}", f"{per_s:.0f}", f"{share:.2f}"))
    page.table(("Thai answers at once", "first piece p50, ms", "pieces/s of each", "pieces a token"), rows)


async def _measured(model: Any, threads: int, run: Callable[[Generations], Awaitable[T]]) -> T:
    generations = Generations(
        model, max_running=max(TOGETHER), max_queued=1000, begin_thread=partial(torch.set_num_threads, threads)
    )
    generations.start()
    try:
        return await run(generations)
    finally:
        await generations.stop()


def measure(_seconds: float, shape: str = "medium", device: str = "cpu") -> Page:
    """The shipped model and a larger one, side by side with generate() in this very process."""
    page = Page("describer", "The describer: generations that step together")
    cores = torch.get_num_threads()
    threads = sorted({1, cores})
    if device == "cpu":
        page.head(f"The shipped model ({SHIPPED_NAME})")
        measure_pieces(page, shipped(LIMITS), cores)
        measure_model(page, shipped(LIMITS), requests=32, threads=threads, goal=3.0)
    with tempfile.TemporaryDirectory() as folder:
        kinds = ("none", "int8", "nf4") if device.startswith("cuda") else ("none",)
        for quantization in kinds:
            page.head(f"A LLaVA of random weights, {quantization}: {SHAPES[shape]}")
            where = Path(folder) / f"llava-{shape}"
            model = random(SHAPES[shape], where, LIMITS, device=device, quantization=quantization)
            measure_model(page, model, requests=32, threads=threads, goal=3.0)
            del model
    return page


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    measure(0.0, arguments.shape, arguments.device).write(arguments.output)


if __name__ == "__main__":
    main()
