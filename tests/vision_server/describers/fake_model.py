"""A model whose tokens are numbers that count up, of the shape that the scheduler steps; test_rows.py has the real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from vision_server.describers.prompts import Prompt
from vision_server.describers.reading import Reading, ReadPrompt
from vision_server.describers.rows import Rows

VOCABULARY = 5000
END = VOCABULARY - 1


def prompt(first: int, *, tokens: int = 1) -> Prompt:
    """Its answer counts on from `first`: 11, 12, 13, … after 10."""
    return Prompt({"input_ids": torch.tensor([[0] * (tokens - 1) + [first]])}, (), tokens, 0)


class FakeRows(Rows):
    """Counts steps; `on_step` is called in the model's thread with the rows' last tokens, before each."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.on_step: Callable[[list[int]], object] = lambda tokens: None
        self.steps: list[list[int]] = []
        self.pieces: list[int] = []
        self.chunk_tokens = 100
        self.count = 0
        self.looked: list[Prompt] = []

    def fits(self, ends: Sequence[int]) -> bool:
        return sum(ends) <= self.max_tokens

    def read(self, prompt: Prompt) -> Reading:
        def pieces() -> Generator[int, None, ReadPrompt | None]:
            for begin in range(0, prompt.prompt_tokens - 1, self.chunk_tokens):
                piece = min(self.chunk_tokens, prompt.prompt_tokens - 1 - begin)
                self.pieces.append(len(self.steps))
                yield piece
            return None

        return Reading(pieces())

    def look(self, prompt: Prompt) -> Reading:
        self.looked.append(prompt)
        return Reading(iter_nothing())

    def join(self, prompt: Prompt, reading: Reading, end: int) -> None:
        self.count += 1

    def leave(self, row: int) -> None:
        assert 0 <= row < self.count
        self.count -= 1

    def step(self, tokens: Sequence[int]) -> Any:
        assert len(tokens) == self.count > 0
        self.on_step(list(tokens))
        self.steps.append(list(tokens))
        scores = torch.full((len(tokens), VOCABULARY), -5.0)
        for row, token in enumerate(tokens):
            scores[row, (token + 1) % VOCABULARY] = 5.0
        return scores


def iter_nothing() -> Generator[int, None, ReadPrompt | None]:
    yield from ()
    return None


class FakeModel:
    """Decodes a token as its number and a space."""

    name = "fake"
    context_tokens = 100_000
    prefill_tokens = 100
    max_cache_bytes = 1000
    token_bytes = 1
    needs_history = False

    def __init__(self, *, max_tokens: int = 1_000_000) -> None:
        self.rows = FakeRows(max_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in token_ids)

    def is_end(self, token_id: int) -> bool:
        return token_id == END

    def process(self, histories: Sequence[Sequence[int]], scores: Any) -> Any:
        return scores


class Gate:
    """Lets the model's thread make one step at a time."""

    def __init__(self, rows: FakeRows) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False
        rows.on_step = self._wait

    def step(self, count: int = 1) -> None:
        self._permits.release(count)

    def open(self) -> None:
        self._open = True
        self._permits.release()

    def _wait(self, _tokens: list[int]) -> None:
        if not self._open and not self._permits.acquire(timeout=30):
            self._open = True
            raise AssertionError("nobody let the step go")
