"""A vision-language model of transformers, stepped token by token.

The same code loads the shipped tiny LLaVA and any model that AutoModelForImageTextToText knows.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from vision_server.describers.describer import PicturedTurn
from vision_server.describers.sampling import Sampler
from vision_server.describers.scheduler import Order
from vision_server.errors import PromptTooLong
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Role
from vision_server.results import Card, Task
from vision_server.weights import short_hash

UNKNOWN_CONTEXT_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: its tensors by name, and their count of tokens."""

    inputs: dict[str, Any]
    prompt_tokens: int
    image_tokens: int


class LanguageModel:
    """One loaded model. prepare() may run in any thread, Steps of it in one thread at a time."""

    def __init__(self, name: str, model: Any, processor: Any, card: Card) -> None:
        self.name = name
        self.card = card
        self._model = model
        self._processor = processor
        config = model.config
        text_config = config.get_text_config()
        self.context_tokens = int(getattr(text_config, "max_position_embeddings", None) or UNKNOWN_CONTEXT_TOKENS)
        image_token = getattr(config, "image_token_id", None)
        self._image_token_id = getattr(config, "image_token_index", None) if image_token is None else image_token
        tokenizer = processor.tokenizer
        # The Rust tokenizer refuses to be set up by one thread while another reads it ("Already borrowed"): prepare() has a
        # lock, decode() a tokenizer of its own.
        self._preparing = threading.Lock()
        self._decoder = copy.deepcopy(tokenizer)
        markers = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
        # Longest first, so that a marker inside another is not cut before it.
        self._markers = tuple(sorted((marker for marker in markers if len(marker) > 1), key=len, reverse=True))

    @classmethod
    def load(cls, name: str, source: str, *, device: str, quantization: str, offline: bool) -> LanguageModel:
        """Reads the weights; takes seconds to minutes. `source`: a folder or a Hugging Face id."""
        import torch

        from vision_server import torchvision_ops

        torchvision_ops.install()
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # bars have no place between the lines of a log

        on_cuda = device.startswith("cuda")
        dtype = torch.float32
        if on_cuda:
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        extra = {} if quantization == "none" else {"quantization_config": _quantization(quantization, dtype)}
        processor = AutoProcessor.from_pretrained(source, local_files_only=offline)
        if getattr(processor, "tokenizer", None) is None or not getattr(processor, "chat_template", None):
            raise ValueError(f"{source} has no chat template; it cannot hold a conversation")
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, device_map={"": device}, local_files_only=offline, **extra
        ).eval()
        folder = Path(source)
        commit = str(getattr(model.config, "_commit_hash", None) or "")
        vision = getattr(model.config, "vision_config", None)
        side_px = getattr(vision, "image_size", 0)
        card = Card(
            version=short_hash(folder) if folder.is_dir() else commit[:12],
            task=Task.GENERATE,
            engine="transformers",
            precision=quantization
            if quantization != "none"
            else {"float32": "fp32", "bfloat16": "bf16"}.get(str(dtype).removeprefix("torch."), "fp16"),
            device=device,
            labels=(),
            input_size_px=side_px if isinstance(side_px, int) else 0,
            memory_bytes=int(model.get_memory_footprint()),
        )
        return cls(name, model, processor, card)

    def prepare(self, turns: Sequence[PicturedTurn]) -> Prompt:
        """The conversation as tensors on the CPU; raises PromptTooLong when it fills the context."""
        messages = [
            {"role": turn.role.value, "content": [self._content(part) for part in turn.parts]} for turn in turns
        ]
        with self._preparing:
            inputs = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        ids = inputs["input_ids"]
        prompt_tokens = int(ids.shape[1])
        if prompt_tokens >= self.context_tokens:
            raise PromptTooLong(prompt_tokens, self.context_tokens)
        image_tokens = 0 if self._image_token_id is None else int((ids == self._image_token_id).sum())
        return Prompt(dict(inputs), prompt_tokens, image_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text without the model's markers."""
        return str(self._decoder.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def order(self, prompt: Prompt, options: GenerateOptions) -> Order:
        """What Generations is given."""
        return Order(
            begin=lambda: self.begin(prompt, options),
            decode=self.decode,
            options=options,
            prompt_tokens=prompt.prompt_tokens,
            image_tokens=prompt.image_tokens,
            context_tokens=self.context_tokens,
        )

    def warm_up(self) -> None:
        """Answers an example. Raises when it cannot."""
        grey = Image(np.full((64, 64, 3), 127, np.uint8), 64, 64)
        steps = self.begin(self.prepare([PicturedTurn(Role.USER, (grey, "?"))]), GenerateOptions(max_new_tokens=2))
        for _ in range(2):
            steps.step()

    def begin(self, prompt: Prompt, options: GenerateOptions) -> Steps:
        """Reads the prompt's set-up; the first step() computes it."""
        return Steps(self._model, prompt, options)

    def _content(self, part: str | Image) -> dict[str, Any]:
        if isinstance(part, Image):
            return {"type": "image", "image": Pillow.fromarray(np.ascontiguousarray(part.rgb))}
        for marker in self._markers:
            # A caller's words must stay words: `<image>` in them would promise a picture that was not sent.
            part = part.replace(marker, f"{marker[0]} {marker[1:]}")
        return {"type": "text", "text": part}


class Steps:
    """One running generation: its own cache, its own random numbers; each step() is one token."""

    def __init__(self, model: Any, prompt: Prompt, options: GenerateOptions) -> None:
        self._model = model
        self._sampler = Sampler(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
        # Models with three-dimensional positions (Qwen-VL) keep an offset on the model itself; with generations in turn, each
        # must find its own.
        inner = getattr(model, "model", None)
        self._offset_holder = inner if hasattr(inner, "rope_deltas") else None
        self._offset: Any = None
        self._first = True
        inputs = {
            name: value.to(model.device, dtype=model.dtype if value.is_floating_point() else None)
            for name, value in prompt.inputs.items()
        }
        prepared: dict[str, Any] = {}

        def capture(model: Any, input_ids: Any, logits_processor: Any, generation_config: Any, **rest: Any) -> Any:
            prepared.update(ids=input_ids, processor=logits_processor, config=generation_config, rest=rest)
            return input_ids

        # generate() prepares all that this architecture needs (cache, positions, penalties), then hands over to `capture`
        # instead of a loop of its own.
        self._swap_in()
        model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            custom_generate=capture,
        )
        self._swap_out()
        self._ids = prepared["ids"]
        self._processor = prepared["processor"]
        # generate() passes these to its own loops; the model's forward does not know them.
        self._kwargs = {
            key: value
            for key, value in prepared["rest"].items()
            if key not in ("stopping_criteria", "synced_gpus", "streamer", "assistant_model", "tokenizer")
        }
        end = prepared["config"].eos_token_id
        self._end_ids = frozenset(end if isinstance(end, list | tuple) else [end]) if end is not None else frozenset()

    def is_end(self, token_id: int) -> bool:
        """Whether the model ended its answer with this token."""
        return token_id in self._end_ids

    def step(self) -> int:
        """Computes the next token; the first call reads the whole prompt."""
        import torch

        model = self._model
        self._swap_in()
        with torch.inference_mode():
            if self._first:
                inputs = model.prepare_inputs_for_generation(self._ids, is_first_iteration=True, **self._kwargs)
            else:
                inputs = model.prepare_inputs_for_generation(self._ids, next_sequence_length=1, **self._kwargs)
            # Only the last position's scores are wanted; a prompt of pictures would give hundreds of rows of them.
            outputs = model(**{**inputs, "logits_to_keep": 1}, return_dict=True)
            self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs)
            scores = self._processor(self._ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32))
            token_id = self._sampler.choose(scores[0])
            self._ids = torch.cat([self._ids, self._ids.new_tensor([[token_id]])], dim=1)
        self._swap_out()
        self._first = False
        return token_id

    def _swap_in(self) -> None:
        if self._offset_holder is not None:
            self._offset_holder.rope_deltas = self._offset

    def _swap_out(self) -> None:
        if self._offset_holder is not None:
            self._offset = self._offset_holder.rope_deltas


def _quantization(kind: str, dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
