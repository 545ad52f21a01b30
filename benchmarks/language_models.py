"""Vision-language models to measure: the shipped one, and LLaVA shapes of any size with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from vision_server import torchvision_ops
from vision_server.describers.language_model import LanguageModel, Limits
from vision_server.weights import SHIPPED

SHIPPED_NAME = "shapes-describer"
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A LLaVA's sizes: a CLIP tower and a Llama."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    image_px: int
    vision_hidden: int
    vision_layers: int

    def __str__(self) -> str:
        return f"{self.layers} layers of width {self.hidden} and {self.intermediate}, pictures of {self.image_px} px"


SHAPES = {
    # For tests of this benchmark.
    "tiny": Shape(64, 2, 4, 128, 1000, 56, 32, 2),
    # 0.22 billion parameters: 0.9 GB in fp32, beyond any CPU's caches, as a real model is.
    "medium": Shape(1024, 16, 16, 2816, 8000, 112, 256, 4),
    # LLaVA 1.5 7B: Vicuna 7B and CLIP ViT-L/14 at 336 px.
    "7b": Shape(4096, 32, 32, 11008, 32064, 336, 1024, 24),
}


def shipped(limits: Limits) -> LanguageModel:
    """The shipped describer, on the CPU."""
    model = LanguageModel.load(
        SHIPPED_NAME, str(SHIPPED[SHIPPED_NAME]), device="cpu", quantization="none", offline=True, limits=limits
    )
    model.warm_up()
    return model


def random(
    shape: Shape, folder: Path, limits: Limits, *, device: str = "cpu", quantization: str = "none"
) -> LanguageModel:
    """A LLaVA with random weights, written to `folder` (once) and read from there like any other."""
    if not (folder / "config.json").exists():
        _write(shape, folder, torch.bfloat16 if device.startswith("cuda") else torch.float32, device)
    model = LanguageModel.load(
        folder.name, str(folder), device=device, quantization=quantization, offline=True, limits=limits
    )
    model.warm_up()
    return model


def _write(shape: Shape, folder: Path, dtype: Any, device: str) -> None:
    torchvision_ops.install()
    import transformers as hf

    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(SHIPPED[SHIPPED_NAME] / "tokenizer.json")),
        pad_token="<pad>",
        eos_token="<|end|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )
    patch_px = 14
    vision = hf.CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(1, shape.vision_hidden // 64),
        image_size=shape.image_px,
        patch_size=patch_px,
    )
    text = hf.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(shape.image_px // patch_px) ** 2,
    )
    pictures = hf.CLIPImageProcessor(
        size={"shortest_edge": shape.image_px}, crop_size={"height": shape.image_px, "width": shape.image_px}
    )
    processor = hf.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    torch.manual_seed(1)
    with torch.device(device):
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
