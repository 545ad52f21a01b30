"""The rows of one model that step together: a forward pass gives each of them its next token's scores.

What was tried first: transformers' continuous batching (generation/continuous_batching in 5.23) takes token ids alone, no
pictures, no embeddings; generate() with `custom_generate` prepares one request at a time and cannot let another in. So this is
the smallest loop over forward(), with transformers' own cache classes around it: read alone (reading.py), join, step, leave
(slots.py). Models that it cannot carry step one after the other (alone.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from vision_server.describers.prompts import Prompt
from vision_server.describers.reading import Reader, Reading
from vision_server.describers.slots import SlotCache


class Rows(ABC):
    """Rows are known by their number, 0 upwards; all methods belong to the model's thread."""

    @abstractmethod
    def fits(self, ends: Sequence[int]) -> bool:
        """Whether rows that grow to these lengths fit into the memory set aside for them, in tokens."""

    @abstractmethod
    def read(self, prompt: Prompt) -> Reading:
        """Begins to read a prompt, which stops no row."""

    @abstractmethod
    def look(self, prompt: Prompt) -> Reading:
        """Begins to read a prompt's pictures alone, so that they are at hand later."""

    @abstractmethod
    def join(self, prompt: Prompt, reading: Reading, end: int) -> None:
        """Makes a prompt that has been read the last row; it may grow to `end` tokens."""

    @abstractmethod
    def leave(self, row: int) -> None:
        """Frees a row; the last row takes its number."""

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> Any:
        """Scores (float32, rows × vocabulary) of what follows `tokens`, the last token of each row.

        When it raises, it may be called again: nothing has moved.
        """


class JoinedRows(Rows):
    """One forward pass for all."""

    def __init__(self, model: Any, reader: Reader, *, max_cache_bytes: int, token_bytes: int) -> None:
        self._model = model
        self._reader = reader
        self._max_tokens = max_cache_bytes // max(1, token_bytes)
        self._cache = SlotCache(model.device, max_tokens=self._max_tokens)
        self._positions: list[int] = []
        self._is_sdpa = model.config._attn_implementation == "sdpa"

    def fits(self, ends: Sequence[int]) -> bool:
        """Each slot is as long as the longest."""
        return len(ends) * max(ends, default=0) <= self._max_tokens

    def read(self, prompt: Prompt) -> Reading:
        """See Rows."""
        return self._reader.read(prompt)

    def look(self, prompt: Prompt) -> Reading:
        """See Rows."""
        return self._reader.look(prompt)

    def join(self, prompt: Prompt, reading: Reading, end: int) -> None:
        """See Rows."""
        read = reading.outcome
        assert read is not None, "it has been read to its end"
        with torch.inference_mode():
            self._cache.join(read.cache.layers, read.length, end)
        self._positions.append(read.position)

    def leave(self, row: int) -> None:
        """See Rows."""
        with torch.inference_mode():
            self._cache.leave(row)
        self._positions[row] = self._positions[-1]
        del self._positions[-1]

    def step(self, tokens: Sequence[int]) -> Any:
        """See Rows."""
        model, device = self._model, self._model.device
        with torch.inference_mode():
            mask = self._cache.begin_step()
            if not self._is_sdpa:  # eager attention adds the mask
                mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
            outputs = model(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                position_ids=torch.tensor(self._positions, device=device)[:, None],
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
            )
            scores = outputs.logits[:, -1].float()
        self._cache.end_step()
        self._positions = [position + 1 for position in self._positions]
        return scores
