"""Turns a conversation into the tensors that a model reads, by the model's own processor and chat template."""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image as Pillow

from vision_server.describers.describer import PicturedTurn
from vision_server.errors import PromptTooLong
from vision_server.images import Image

_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """What the vision tower is given of one picture (or, where a processor mixes them, of all), and a hash of its content."""

    key: bytes
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: its tensors by name, on the CPU, and their count of tokens."""

    inputs: Mapping[str, Any]
    pictures: tuple[Picture, ...]
    prompt_tokens: int
    image_tokens: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors; those of the pictures are views of them."""
        return sum(int(getattr(tensor, "nbytes", 0)) for tensor in self.inputs.values())

    def without_tensors(self) -> Prompt:
        """Its counts alone, for when it has been read."""
        return replace(self, inputs={}, pictures=())


class PromptMaker:
    """Makes prompts for one model. make() may run in any number of threads."""

    def __init__(self, processor: Any, model: Any, context_tokens: int) -> None:
        self._processor = processor
        self._context_tokens = context_tokens
        # The Rust tokenizer refuses to be set up by one thread while another reads it ("Already borrowed"): each has its own.
        self._own = threading.local()
        config = model.config
        image_token = getattr(config, "image_token_id", None)
        self._image_token_id = getattr(config, "image_token_index", None) if image_token is None else image_token
        see = getattr(model.base_model, "get_image_features", None)
        self._seen = frozenset(inspect.signature(see).parameters) - {"kwargs"} if see is not None else frozenset()
        tokenizer = processor.tokenizer
        markers = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
        # Longest first, so that a marker inside another is not cut before it.
        self._markers = tuple(sorted((marker for marker in markers if len(marker) > 1), key=len, reverse=True))

    def make(self, turns: Sequence[PicturedTurn]) -> Prompt:
        """Raises PromptTooLong when it leaves no room for an answer."""
        processor = getattr(self._own, "processor", None)
        if processor is None:
            processor = self._own.processor = copy.deepcopy(self._processor)
        messages = [
            {"role": turn.role.value, "content": [self._content(part) for part in turn.parts]} for turn in turns
        ]
        inputs = dict(
            processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
        ids = inputs["input_ids"]
        prompt_tokens = int(ids.shape[1])
        if prompt_tokens >= self._context_tokens:
            raise PromptTooLong(prompt_tokens, self._context_tokens)
        image_tokens = 0 if self._image_token_id is None else int((ids == self._image_token_id).sum())
        count = sum(isinstance(part, Image) for turn in turns for part in turn.parts)
        return Prompt(inputs, self._pictures(inputs, count), prompt_tokens, image_tokens)

    def _pictures(self, inputs: Mapping[str, Any], count: int) -> tuple[Picture, ...]:
        """The vision tower's inputs, picture by picture."""
        seen = {name: value for name, value in inputs.items() if name in self._seen}
        if not count or not seen:
            return ()
        return tuple(Picture(_key(one), one) for one in _apart(seen, count))

    def _content(self, part: str | Image) -> dict[str, Any]:
        if isinstance(part, Image):
            return {"type": "image", "image": Pillow.fromarray(np.ascontiguousarray(part.rgb))}
        for marker in self._markers:
            # A caller's words must stay words: `<image>` in them would promise a picture that was not sent.
            part = part.replace(marker, f"{marker[0]} {marker[1:]}")
        return {"type": "text", "text": part}


def _apart(seen: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """The tensors of each picture, as views.

    LLaVA and LLaVA-NeXT stack pictures; Qwen-VL puts the patches of all after one another, and tells how many each has.
    Anything else stays together, and is known again as a whole.
    """
    grid = seen.get("image_grid_thw")
    if grid is not None and set(seen) == {"pixel_values", "image_grid_thw"}:
        patches = seen["pixel_values"].split(grid.prod(-1).tolist())
        return [{"pixel_values": patch, "image_grid_thw": grid[i : i + 1]} for i, patch in enumerate(patches)]
    if all(hasattr(value, "shape") and value.shape[0] == count for value in seen.values()):
        return [{name: value[i : i + 1] for name, value in seen.items()} for i in range(count)]
    return [seen]


def _key(inputs: Mapping[str, Any]) -> bytes:
    """A hash of the content: equal inputs give equal features."""
    content = hashlib.blake2b(digest_size=_KEY_BYTES)
    for name, value in sorted(inputs.items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(np.ascontiguousarray(value.numpy()).data)
    return content.digest()
