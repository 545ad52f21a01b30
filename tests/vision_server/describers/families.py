"""The families of vision-language models that people deploy, at toy widths with random weights, by transformers' own classes.

Each has its family's processor, chat template and special tokens over the shipped tokenizer; written to a folder, it is loaded
like any model of an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from vision_server import torchvision_ops
from vision_server.weights import SHIPPED

# Before the first of transformers' classes that needs torchvision is looked up.
torchvision_ops.install()

_WIDTH = 64
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def llava(folder: Path) -> None:
    """LLaVA 1.5: CLIP and a Llama."""
    tokenizer = _tokenizer("<image>", "</s>", end="</s>", image_token="<image>")
    config = hf.LlavaConfig(
        vision_config=_clip(),
        text_config=_text(hf.LlamaConfig, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = hf.LlavaProcessor(
        _clip_pictures(hf.CLIPImageProcessor),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_TEMPLATE,
    )
    _save(folder, hf.LlavaForConditionalGeneration, config, processor)


def llava_next(folder: Path) -> None:
    """LLaVA-NeXT: pictures cut into tiles, a Mistral with fewer heads for keys than for queries."""
    tokenizer = _tokenizer("<image>", "</s>", end="</s>", image_token="<image>")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = hf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text(hf.MistralConfig, tokenizer, num_key_value_heads=2, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    processor = hf.LlavaNextProcessor(
        _clip_pictures(hf.LlavaNextImageProcessor, image_grid_pinpoints=pinpoints),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_TEMPLATE,
    )
    _save(folder, hf.LlavaNextForConditionalGeneration, config, processor)


def qwen2_vl(folder: Path) -> None:
    """Qwen2-VL (Typhoon2-Vision): pictures of any size, places in time, row and column."""
    tokenizer = _tokenizer(*_QWEN_TOKENS, end="<|im_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = _text(hf.Qwen2VLTextConfig, tokenizer, num_key_value_heads=2, rope_parameters=rope)
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": _WIDTH, "patch_size": 14, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text.to_dict(), **_qwen_ids(tokenizer))
    _save(folder, hf.Qwen2VLForConditionalGeneration, config, _qwen_processor(hf.Qwen2VLProcessor, tokenizer, 14))


def qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL (Typhoon OCR): a vision tower with windows."""
    tokenizer = _tokenizer(*_QWEN_TOKENS, end="<|im_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = _text(hf.Qwen2_5_VLTextConfig, tokenizer, num_key_value_heads=2, rope_parameters=rope)
    vision = {
        **{"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": _WIDTH},
        **{"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    }
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text.to_dict(), **_qwen_ids(tokenizer))
    _save(folder, hf.Qwen2_5_VLForConditionalGeneration, config, _qwen_processor(hf.Qwen2_5_VLProcessor, tokenizer, 14))


def qwen3_vl(folder: Path) -> None:
    """Qwen3-VL: features that enter at several layers."""
    tokenizer = _tokenizer(*_QWEN_TOKENS, end="<|im_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    text = _text(hf.Qwen3VLTextConfig, tokenizer, num_key_value_heads=2, rope_parameters=rope, head_dim=16)
    vision = {
        **{"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": _WIDTH},
        **{"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    }
    config = hf.Qwen3VLConfig(vision_config=vision, text_config=text.to_dict(), **_qwen_ids(tokenizer))
    _save(folder, hf.Qwen3VLForConditionalGeneration, config, _qwen_processor(hf.Qwen3VLProcessor, tokenizer, 16))


def gemma3(folder: Path) -> None:
    """Gemma 3: layers that look back a little only, pictures that are read both ways."""
    named = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    tokens = {f"{name}_token": token for name, token in named.items()}
    tokenizer = _tokenizer(*named.values(), "<eos>", end="<eos>", **tokens)
    text = _text(hf.Gemma3TextConfig, tokenizer, num_key_value_heads=2, sliding_window=16, head_dim=16)
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 56, "patch_size": 14},
    }
    config = hf.Gemma3Config(
        text_config=text.to_dict(),
        vision_config={"model_type": "siglip_vision_model", **vision},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer,
        image_seq_length=4,
        chat_template=_LLAVA_TEMPLATE.replace("<image>", "<start_of_image>").replace("</s>", "<eos>"),
    )
    _save(folder, hf.Gemma3ForConditionalGeneration, config, processor)


JOINED: dict[str, Callable[[Path], None]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
"""Those whose rows step together."""


def _tokenizer(*special: str, end: str, **named: str) -> PreTrainedTokenizerFast:
    """The shipped tokenizer's words with a family's own special tokens; `named` are those that its processor asks for by name."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(SHIPPED["shapes-describer"] / "tokenizer.json")),
        pad_token="<pad>",
        eos_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named,
        model_max_length=512,
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    return tokenizer


def _text(kind: Any, tokenizer: PreTrainedTokenizerFast, **more: Any) -> Any:
    return kind(
        **{
            **{"vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 96, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512},
            **{"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
            **{"initializer_range": 0.4},  # scores far apart, so that rounding does not choose
            **more,
        }
    )


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )


def _clip_pictures(kind: Any, **more: Any) -> Any:
    return kind(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **more)


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen_processor(kind: Any, tokenizer: PreTrainedTokenizerFast, patch_px: int) -> Any:
    side_px = 2 * patch_px
    pictures = hf.Qwen2VLImageProcessor(
        patch_size=patch_px, merge_size=2, size={"shortest_edge": 4 * side_px**2, "longest_edge": 16 * side_px**2}
    )
    videos = hf.Qwen2VLVideoProcessor() if kind is not hf.Qwen3VLProcessor else hf.Qwen3VLVideoProcessor()
    return kind(pictures, tokenizer, videos, chat_template=_QWEN_TEMPLATE)


def _save(folder: Path, kind: Any, config: Any, processor: Any) -> None:
    torch.manual_seed(11)
    model = kind(config).eval()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
