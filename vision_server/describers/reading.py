"""Reads prompts, a bounded piece at a time: pictures through the vision tower, then the tokens in chunks.

The model's own forward() puts features and words together, whatever the family; at the door of its decoder the inputs are
caught, and the decoder is then given them in chunks (`mm_encoder_outputs` and get_decoder() are transformers' own names). The
last token is left out: it is the first one that the row steps with, so that reading computes no scores.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache

from vision_server.describers.features import FeatureCache, Features
from vision_server.describers.prompts import Picture, Prompt

# What a decoder may be given beside these cannot be cut into chunks here.
_CUT = frozenset({"inputs_embeds", "position_ids", "visual_pos_masks", "deepstack_visual_embeds"})
_NOT_CUT = frozenset({"input_ids", "attention_mask", "past_key_values", "use_cache", "return_dict"})


class NotJoinable(Exception):
    """Rows of this model cannot step together; the text says why."""


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt in a cache of its own, but for its last token, which stands at `position`."""

    cache: DynamicCache
    length: int
    position: int


class Reading:
    """A prompt being read; `outcome` is there when it is done."""

    def __init__(self, pieces: Generator[int, None, ReadPrompt | None]) -> None:
        self._pieces = pieces
        self.done = False
        self.outcome: ReadPrompt | None = None

    def advance(self) -> int:
        """Reads the next piece; answers its count of tokens. Raises whatever the model does."""
        with torch.inference_mode():
            try:
                return next(self._pieces)
            except StopIteration as end:
                self.done, self.outcome = True, end.value
                return 0


class Reader:
    """Reads the prompts of one model, `chunk_tokens` at a time. Belongs to the model's thread."""

    def __init__(self, model: Any, features: FeatureCache, *, chunk_tokens: int) -> None:
        self._model = model
        self._decoder = model.get_decoder()
        self._features = features
        self._chunk_tokens = chunk_tokens
        self._joins_features = bool(model._supports_mm_encoder_outputs())

    def read(self, prompt: Prompt) -> Reading:
        """Begins to read."""
        return Reading(self._read(prompt))

    def look(self, prompt: Prompt) -> Reading:
        """Reads only the pictures, ahead of a prompt that has them."""
        return Reading(self._look(prompt))

    def _look(self, prompt: Prompt) -> Generator[int, None, None]:
        for picture in prompt.pictures if self._joins_features else ():
            if self._features.get(picture.key) is None:
                features = self._see(picture)
                self._features.put(picture.key, features)
                yield features.tokens

    def _read(self, prompt: Prompt) -> Generator[int, None, ReadPrompt]:
        seen: list[Features] = []
        for picture in prompt.pictures if self._joins_features else ():
            features = self._features.get(picture.key)
            if features is None:
                features = self._see(picture)
                self._features.put(picture.key, features)
                yield features.tokens
            seen.append(features)
        whole = self._embed(prompt, seen)
        count = prompt.prompt_tokens
        cache = DynamicCache(config=self._model.config.get_text_config())
        for begin in range(0, count - 1, self._chunk_tokens):
            end = min(begin + self._chunk_tokens, count - 1)
            piece = _cut(whole, begin, end)
            self._decoder(**piece, attention_mask=None, past_key_values=cache, use_cache=True)
            yield end - begin
        return ReadPrompt(cache, count - 1, _last_position(whole.get("position_ids"), count))

    def _see(self, picture: Picture) -> Features:
        """Through the vision tower."""
        model = self._model
        found = model.base_model.get_image_features(**on_device(model, picture.inputs), return_dict=True)
        deepstack = getattr(found, "deepstack_features", None) or ()
        return Features(tuple(found.pooler_output), tuple(tuple(layer) for layer in deepstack))

    def _embed(self, prompt: Prompt, seen: Sequence[Features]) -> Mapping[str, Any]:
        """What the model gives its decoder for the whole prompt. Raises NotJoinable."""
        model = self._model
        inputs = dict(prompt.inputs)
        if seen:
            del inputs["pixel_values"]
            inputs["mm_encoder_outputs"] = {"image": _joined(seen)}
        caught = _Caught()
        handle = self._decoder.register_forward_pre_hook(caught.take, with_kwargs=True)
        try:
            model(**on_device(model, inputs), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        except _Caught as done:
            given = done.kwargs
        else:
            raise NotJoinable("its decoder is not called by forward()")
        finally:
            handle.remove()
        mask = given.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", 0) != 2:
            raise NotJoinable("its prompts have masks of their own")
        rest = {name for name, value in given.items() if name not in _CUT | _NOT_CUT and value is not None}
        tensors = sorted(name for name in rest if not isinstance(given[name], bool | int | float | str))
        if tensors or given.get("inputs_embeds") is None:
            raise NotJoinable(f"its decoder is given {', '.join(tensors) or 'no embeddings'}")
        return {name: given[name] for name in _CUT if given.get(name) is not None}


class _Caught(Exception):
    """Stops a forward pass at the door of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: Mapping[str, Any] = {}

    def take(self, _module: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
        self.kwargs = kwargs
        raise self


def _joined(seen: Sequence[Features]) -> Any:
    """The features of all pictures as get_image_features() would have answered them."""
    pooled = [tensor for features in seen for tensor in features.pooled]
    layers = [[tensor for part in layer for tensor in part] for layer in zip(*(f.deepstack for f in seen), strict=True)]
    return SimpleNamespace(pooler_output=pooled, deepstack_features=layers or None)


def _cut(whole: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Tokens `begin` to `end` of the decoder's inputs."""
    piece = {"inputs_embeds": whole["inputs_embeds"][:, begin:end]}
    if (positions := whole.get("position_ids")) is not None:
        piece["position_ids"] = positions[..., begin:end]
    if (visual := whole.get("visual_pos_masks")) is not None:
        piece["visual_pos_masks"] = visual[:, begin:end]
        first, last = int(visual[:, :begin].sum()), int(visual[:, :end].sum())
        piece["deepstack_visual_embeds"] = [layer[first:last] for layer in whole["deepstack_visual_embeds"]]
    return piece


def _last_position(positions: Any, count: int) -> int:
    """The place of the last token; in Qwen-VL's three axes (time, row, column) a word has the same in each."""
    if positions is None:
        return count - 1
    last = {int(place) for place in positions[..., -1].flatten().tolist()}
    if len(last) != 1:
        raise NotJoinable(f"its last token has the places {sorted(last)}")
    return last.pop()


def on_device(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors on the model's device; fractions in its precision."""
    return {
        name: value.to(model.device, dtype=model.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
