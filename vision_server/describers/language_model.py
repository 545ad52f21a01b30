"""A vision-language model of transformers, as the scheduler steps it.

The same code loads the shipped tiny LLaVA and any model that AutoModelForImageTextToText knows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.logs import get_logger
from vision_server import memory
from vision_server.describers.describer import PicturedTurn
from vision_server.describers.prompts import Prompt, PromptMaker
from vision_server.images import Image
from vision_server.requests import Role
from vision_server.results import Card, Task
from vision_server.weights import short_hash

if TYPE_CHECKING:
    from vision_server.describers.rows import Rows

UNKNOWN_CONTEXT_TOKENS = 1 << 30
_EXAMPLE_TOKENS = 3
# Of scores computed by other kernels, in 16 bits: measured 0.999 and more; a wrong mask or place gives less than 0.9.
_LEAST_ALIKE = 0.98

_log = get_logger("describers")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows a model."""

    max_rows: int = 8
    max_cache_bytes: int = 0
    """Of keys and values; 0: half of the device's free memory, at most what `max_rows` whole contexts take."""
    max_feature_bytes: int = 256 << 20
    """Of pictures' features that are kept."""
    prefill_tokens: int = 0
    """Of prompts, read between two steps of the running rows. 0: 512 on a GPU, 128 on the CPU."""


class LanguageModel:
    """One loaded model. prepare() and decode() may run in any thread, all else in one at a time."""

    def __init__(self, name: str, model: Any, processor: Any, card: Card, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.name = name
        self.card = card
        self._model = model
        text_config = model.config.get_text_config()
        self.context_tokens = int(getattr(text_config, "max_position_embeddings", None) or UNKNOWN_CONTEXT_TOKENS)
        self._prompts = PromptMaker(processor, model, self.context_tokens)
        # A tokenizer is not to be read by one thread while another does.
        decoder = copy.deepcopy(processor.tokenizer)
        # The Rust tokenizer under it, where there is one: its Python face takes 4 us more for each token of each row.
        self._decoder = getattr(decoder, "backend_tokenizer", None)
        self._slow_decoder = decoder
        self._limits = limits
        self._processors, self._end_ids = _generation_rules(model, self._prompts)
        self.prefill_tokens = limits.prefill_tokens or (512 if model.device.type == "cuda" else 128)
        self.token_bytes = token_bytes(text_config, model.dtype.itemsize)
        self.max_cache_bytes = limits.max_cache_bytes
        self._rows: Rows | None = None

    @classmethod
    def load(
        cls,
        name: str,
        source: str,
        *,
        device: str,
        quantization: str,
        offline: bool,
        limits: Limits | None = None,
    ) -> LanguageModel:
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
        return cls(name, model, processor, card, limits)

    def prepare(self, turns: Sequence[PicturedTurn]) -> Prompt:
        """The conversation as tensors on the CPU; raises PromptTooLong when it fills the context."""
        return self._prompts.make(turns)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text without the model's markers."""
        if self._decoder is not None:
            return str(self._decoder.decode(list(token_ids), skip_special_tokens=True))
        ids = list(token_ids)
        return str(self._slow_decoder.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def is_end(self, token_id: int) -> bool:
        """Whether the model ends its answer with this token."""
        return token_id in self._end_ids

    @property
    def rows(self) -> Rows:
        """What steps; there after warm_up()."""
        assert self._rows is not None, "warm_up() comes first"
        return self._rows

    def warm_up(self) -> None:
        """Answers an example, and chooses by it how generations step. Raises when it cannot."""
        self.max_cache_bytes = self._limits.max_cache_bytes or _spare_bytes(
            self._model.device, self._limits.max_rows * self.context_tokens * self.token_bytes
        )
        self._rows = self._open_rows()

    def process(self, histories: Sequence[Sequence[int]], scores: Any) -> Any:
        """The rows' scores as the model's own generation config wants them changed by what stands before (repetition penalty)."""
        if not self._processors:
            return scores
        import torch

        with torch.inference_mode():
            rows = (
                self._processors(torch.tensor([list(ids)], device=scores.device), scores[row : row + 1].clone())
                for row, ids in enumerate(histories)
            )
            return torch.cat(list(rows))

    @property
    def needs_history(self) -> bool:
        """Whether process() looks at the tokens."""
        return bool(self._processors)

    def _open_rows(self) -> Rows:
        """Rows that step together where they answer an example as generate() does, else rows that step in turn."""
        from vision_server.describers.alone import SeparateRows
        from vision_server.describers.features import FeatureCache
        from vision_server.describers.reading import NotJoinable, Reader
        from vision_server.describers.rows import JoinedRows

        bounds = {"max_cache_bytes": self.max_cache_bytes, "token_bytes": self.token_bytes}
        prompt = self.prepare([PicturedTurn(Role.USER, (_grey(), "?"))])
        example = _Example.of(self._model, prompt)
        features = FeatureCache(self.name, self._limits.max_feature_bytes)
        reader = Reader(self._model, features, chunk_tokens=self.prefill_tokens)
        joined = JoinedRows(self._model, reader, **bounds)
        try:
            if (window := _window(self._model.config.get_text_config())) and window < self.context_tokens:
                raise NotJoinable(f"its layers look back {window} tokens only")
            example.check(joined, prompt)
        except NotJoinable as why:
            _log.warning("generations of this model step one after the other", model=self.name, why=str(why))
            return SeparateRows(self._model, **bounds)
        return joined


@dataclass(frozen=True, slots=True)
class _Example:
    """What generate() answers to a prompt: its tokens, and the scores before each."""

    tokens: tuple[int, ...]
    scores: Any

    @classmethod
    def of(cls, model: Any, prompt: Prompt) -> _Example:
        import torch

        from vision_server.describers.reading import on_device

        answer = model.generate(
            **on_device(model, prompt.inputs),
            min_new_tokens=_EXAMPLE_TOKENS,
            max_new_tokens=_EXAMPLE_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = answer.sequences[0, -_EXAMPLE_TOKENS - 1 : -1]  # the prompt's last token leads to the first scores
        return cls(tuple(map(int, ids)), torch.cat(answer.logits).float())

    def check(self, rows: Rows, prompt: Prompt) -> None:
        """Raises NotJoinable unless the rows give about the same scores: other kernels round differently, no more."""
        import torch

        from vision_server.describers.reading import NotJoinable

        reading = rows.read(prompt)
        while not reading.done:
            reading.advance()
        rows.join(prompt, reading, prompt.prompt_tokens + _EXAMPLE_TOKENS)
        try:
            for token, expected in zip(self.tokens, self.scores, strict=True):
                alike = float(torch.nn.functional.cosine_similarity(rows.step([token])[0], expected, dim=0))
                if not alike > _LEAST_ALIKE:
                    raise NotJoinable(f"its scores are not those of generate() (cosine {alike:.3f})")
        finally:
            rows.leave(0)


def token_bytes(text_config: Any, value_bytes: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    heads = text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kept_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return int(2 * text_config.num_hidden_layers * kept_heads * width * value_bytes)


def _window(text_config: Any) -> int:
    """How far the layers that look back the least do, in tokens; 0: all see everything."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return 0
    return int(getattr(text_config, "sliding_window", None) or (1 if kinds is not None else 0))


def _spare_bytes(device: Any, at_most: int) -> int:
    """Half of what is free on the device now."""
    if device.type == "cuda":
        import torch

        return min(at_most, torch.cuda.mem_get_info(device)[0] // 2)
    return min(at_most, memory.free_bytes() // 2)


def _generation_rules(model: Any, prompts: PromptMaker) -> tuple[Any, frozenset[int]]:
    """What generate() would do to scores, and the tokens that end an answer: it prepares both, and hands them over."""
    prepared: dict[str, Any] = {}

    def capture(model: Any, input_ids: Any, logits_processor: Any, generation_config: Any, **_: Any) -> Any:
        prepared.update(processors=logits_processor, end=generation_config.eos_token_id)
        return input_ids

    inputs = prompts.make([PicturedTurn(Role.USER, ("?",))]).inputs
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    model.generate(**on_device, max_new_tokens=1, do_sample=False, num_beams=1, custom_generate=capture)
    end = prepared["end"]
    ends = end if isinstance(end, list | tuple) else [end]
    return prepared["processors"], frozenset(int(token) for token in ends if token is not None)


def _grey() -> Image:
    return Image(np.full((64, 64, 3), 127, np.uint8), 64, 64)


def _quantization(kind: str, dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
