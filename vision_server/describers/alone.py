"""Rows of a model that cannot step together (masks or caches of its own): each by generate()'s own preparations, in turn."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from vision_server.describers.prompts import Prompt
from vision_server.describers.reading import Reading, ReadPrompt, on_device
from vision_server.describers.rows import Rows

# generate() passes these to its own loops; the model's forward does not know them.
_LOOPS_OWN = ("stopping_criteria", "synced_gpus", "streamer", "assistant_model", "tokenizer")


class SeparateRows(Rows):
    """One forward pass for each."""

    def __init__(self, model: Any, *, max_cache_bytes: int, token_bytes: int) -> None:
        self._model = model
        self._max_tokens = max_cache_bytes // max(1, token_bytes)
        self._rows: list[_Row] = []

    def fits(self, ends: Sequence[int]) -> bool:
        """Each takes what it needs."""
        return sum(ends) <= self._max_tokens

    def read(self, prompt: Prompt) -> Reading:
        """The whole prompt is read by the row's first step."""
        return Reading(_nothing())

    def look(self, prompt: Prompt) -> Reading:
        """Nothing is kept of pictures."""
        return Reading(_nothing())

    def join(self, prompt: Prompt, reading: Reading, end: int) -> None:
        """See Rows."""
        self._rows.append(_Row(self._model, prompt))

    def leave(self, row: int) -> None:
        """See Rows."""
        self._rows[row] = self._rows[-1]
        del self._rows[-1]

    def step(self, tokens: Sequence[int]) -> Any:
        """See Rows; a row that has been stepped when another fails answers the same again."""
        scores = [row.step(token) for row, token in zip(self._rows, tokens, strict=True)]
        for row in self._rows:
            row.scores = None
        return torch.stack(scores)


class _Row:
    """One generation: its own cache and arguments."""

    def __init__(self, model: Any, prompt: Prompt) -> None:
        self._model = model
        self.scores: Any = None
        # Models with three-dimensional positions (Qwen-VL) keep an offset on the model itself; each row must find its own.
        inner = getattr(model, "model", None)
        self._offset_holder = inner if hasattr(inner, "rope_deltas") else None
        self._offset: Any = None
        self._first = True
        prepared: dict[str, Any] = {}

        def capture(model: Any, input_ids: Any, **rest: Any) -> Any:
            prepared.update(ids=input_ids, rest=rest)
            return input_ids

        # generate() prepares all that this architecture needs (cache, positions), then hands over to `capture`.
        self._swap_in()
        inputs = on_device(model, prompt.inputs)
        model.generate(
            **inputs, max_new_tokens=1, do_sample=False, num_beams=1, use_cache=True, custom_generate=capture
        )
        self._swap_out()
        self._ids = prepared["ids"]
        passed_by = (*_LOOPS_OWN, "logits_processor", "generation_config")
        self._kwargs = {name: value for name, value in prepared["rest"].items() if name not in passed_by}

    def step(self, token: int) -> Any:
        """Scores of what follows `token`; the first call reads the prompt, which ends with it."""
        if self.scores is not None:
            return self.scores
        model = self._model
        self._swap_in()
        with torch.inference_mode():
            if self._first:
                inputs = model.prepare_inputs_for_generation(self._ids, is_first_iteration=True, **self._kwargs)
            else:
                self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=1)
                inputs = model.prepare_inputs_for_generation(self._ids, next_sequence_length=1, **self._kwargs)
            # Only the last position's scores are wanted; a prompt of pictures would give hundreds of rows of them.
            outputs = model(**{**inputs, "logits_to_keep": 1}, return_dict=True)
            self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs)
            self.scores = outputs.logits[0, -1].float()
        self._swap_out()
        self._first = False
        return self.scores

    def _swap_in(self) -> None:
        if self._offset_holder is not None:
            self._offset_holder.rope_deltas = self._offset

    def _swap_out(self) -> None:
        if self._offset_holder is not None:
            self._offset = self._offset_holder.rope_deltas


def _nothing() -> Generator[int, None, ReadPrompt | None]:
    yield from ()
    return None
