"""The cache of rows that step together: each row's keys and values in a slot, written at the row's own length.

    slot 0  ████████████░░░░        lengths differ; a step reads [:rows, :, :longest + 1] and a mask hides the rest
    slot 1  █████░░░░░░░░░░░        a row that leaves is overwritten by the last one, so that slots stay without gaps
    slot 2  █████████░░░░░░░

transformers' DynamicCache lets all rows grow by the same token, its StaticCache writes all at the same place; rows that come
and go need neither, but a layer with the same face.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

# Slots are given room in steps of this many tokens, so that a row that is a little longer does not move them all.
_STEP_TOKENS = 64


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer's slots; keys and values are slots × heads × tokens × width."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Writes one token of each row; answers all that the rows have, up to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        self.keys[cache.rows, :, cache.at] = key_states[:, :, 0]
        self.values[cache.rows, :, cache.at] = value_states[:, :, 0]
        return self.keys[: cache.count, :, : cache.longest], self.values[: cache.count, :, : cache.longest]

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Makes the slots for tensors of this kind. Zeros: what a mask hides is still multiplied, and 0 × NaN is NaN."""
        self.keys, self.values = (
            states.new_zeros(self._cache.slots, states.shape[1], self._cache.tokens, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def resize(self) -> None:
        """Moves to slots of the cache's present size, unless it has it; what is beyond it is lost."""
        if not self.is_initialized or (self.keys.shape[0], self.keys.shape[2]) == (
            self._cache.slots,
            self._cache.tokens,
        ):
            return
        old_keys, old_values = self.keys, self.values
        assert old_keys is not None and old_values is not None
        self.lazy_initialization(old_keys, old_values)
        slots = min(old_keys.shape[0], self._cache.slots)
        tokens = min(old_keys.shape[2], self._cache.tokens)
        self.keys[:slots, :, :tokens] = old_keys[:slots, :, :tokens]
        self.values[:slots, :, :tokens] = old_values[:slots, :, :tokens]

    def put(self, slot: int, layer: CacheLayerMixin, tokens: int) -> None:
        """Copies a single row's first tokens into a slot."""
        if not tokens:
            return
        if not self.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
        self.keys[slot, :, :tokens] = layer.keys[0, :, :tokens]
        self.values[slot, :, :tokens] = layer.values[0, :, :tokens]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies a slot's first tokens over another's."""
        if self.is_initialized and tokens:
            self.keys[target, :, :tokens] = self.keys[source, :, :tokens]
            self.values[target, :, :tokens] = self.values[source, :, :tokens]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of a mask; the rows bring their own, so that nobody needs it."""
        return self._cache.longest, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._cache.longest

    def get_max_length(self) -> int:
        """None."""
        return -1


class SlotCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """The slots of all layers. Memory for a row's whole answer is taken when it joins: no step can run out of it."""

    def __init__(self, device: Any, *, max_tokens: int) -> None:
        super().__init__(layers=[])
        self._device = device
        self._max_tokens = max_tokens
        self.lengths: list[int] = []
        """Tokens in each row's slot."""
        self._ends: list[int] = []
        self.slots = 0
        self.tokens = 0
        # What the running step writes: which rows, at which places, and how far it reads.
        self.count = 0
        self.longest = 0
        self.rows: Any = None
        self.at: Any = None

    def join(self, layers: Sequence[CacheLayerMixin], length: int, end: int) -> None:
        """Takes in a row that has `length` tokens and may grow to `end`; it is the last row then."""
        self._make_room([*self._ends, end])
        while len(self.layers) < len(layers):
            self.layers.append(SlotLayer(self))
        for mine, its in zip(self.layers, layers, strict=True):
            mine.put(len(self.lengths), its, length)
        self.lengths.append(length)
        self._ends.append(end)

    def leave(self, row: int) -> None:
        """Lets a row go; the last one takes its place. Without rows nothing is held."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row, self.lengths[last])
            self.lengths[row], self._ends[row] = self.lengths[last], self._ends[last]
        del self.lengths[last], self._ends[last]
        if not self.lengths:
            self.layers.clear()
            self.slots = self.tokens = 0

    def begin_step(self) -> Any:
        """Says where the next tokens go; answers the mask: rows × 1 × 1 × longest, True where a row may look."""
        lengths = torch.tensor(self.lengths, device=self._device)
        self.count, self.longest = len(self.lengths), max(self.lengths) + 1
        self.rows, self.at = torch.arange(self.count, device=self._device), lengths
        return (torch.arange(self.longest, device=self._device) <= lengths[:, None])[:, None, None]

    def end_step(self) -> None:
        """The step has come through: each row has a token more."""
        self.lengths = [length + 1 for length in self.lengths]

    def _make_room(self, ends: Sequence[int]) -> None:
        tokens = -(-max(ends) // _STEP_TOKENS) * _STEP_TOKENS
        # Twice as many each time, so that a hundred rows are not copied a hundred times; given back when much too large.
        slots = self.slots if len(ends) <= self.slots <= 4 * len(ends) else 1 << (len(ends) - 1).bit_length()
        if tokens <= self.tokens <= 4 * tokens:
            tokens = self.tokens
        if slots * tokens > self._max_tokens:  # the caller has asked whether the rows fit as they are
            slots, tokens = len(ends), max(ends)
        self.slots, self.tokens = slots, tokens
        # One after the other: only one layer is there twice. Each time, since memory may have run out halfway the last time.
        for layer in self.layers:
            layer.resize()
