"""Builds the untrained describer: its tokenizer, its processor, its LLaVA network."""

from collections.abc import Iterator

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vision_server.grounding import counted
from vision_server.shapes.palette import COLOURS
from vision_server.shapes.questions import KINDS, LANGUAGES, ask
from vision_server.shapes.scenes import LABELS, Shape

IMAGE_PX = 144
PATCH_PX = 16
PATCHES = (IMAGE_PX // PATCH_PX) ** 2
VISION_WIDTH, VISION_LAYERS = 192, 5
TEXT_WIDTH, TEXT_LAYERS = 192, 4
HEAD_WIDTH = 32

PAD, IMAGE, END = "<pad>", "<image>", "<|end|>"
ROLES = ("system", "user", "assistant")
CORPUS_SEED = 7
CORPUS_PAIRS = 12_000
VOCABULARY = 640
# In bytes; a Thai letter has three. No answer may become one token, or it would arrive in one piece when streamed.
MAX_TOKEN_BYTES = 18
# GPT-2's own pattern cuts Thai words at every vowel and tone mark, since those are marks (M) and not letters (L).
WORD_PATTERN = r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] in ('image', 'image_url') %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def corpus() -> Iterator[str]:
    """Questions and answers about imagined scenes: what the tokenizer learns its words from."""
    rng = np.random.default_rng(CORPUS_SEED)
    for _ in range(CORPUS_PAIRS):
        shapes = [
            Shape(str(rng.choice(LABELS)), str(rng.choice(COLOURS)), (0, 0, 1, 1), (), (0, 0, 0))
            for _ in range(int(rng.integers(0, 6)))
        ]
        pair = ask(rng, shapes, str(rng.choice(KINDS)), str(rng.choice(LANGUAGES)))
        if pair is None:
            continue
        # Counts without positions: of those there was nothing to learn but digits, which are tokens of their own.
        counts = f"{counted(shape.label for shape in shapes)}\n" if rng.random() < 0.25 else ""
        yield counts + pair.question
        yield pair.answer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over English and Thai; any text can be encoded, also text it was not made for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, IMAGE, *(f"<|{role}|>" for role in ROLES), END],
        show_progress=False,
        max_token_length=MAX_TOKEN_BYTES,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures of any size are squashed to a small square, not cropped: nothing at an edge is lost."""
    pictures = CLIPImageProcessor(
        do_resize=True,
        size={"height": IMAGE_PX, "width": IMAGE_PX},
        do_center_crop=False,
        resample=2,
        crop_size={"height": IMAGE_PX, "width": IMAGE_PX},
    )
    # CLIP puts one class token before the patches; the "default" strategy drops it again.
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Stock classes at toy widths; random weights."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_WIDTH // HEAD_WIDTH,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        projection_dim=VISION_WIDTH,
        hidden_act="gelu",
    )
    heads = TEXT_WIDTH // HEAD_WIDTH
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.max_new_tokens, generation.do_sample = 96, False
    return model
