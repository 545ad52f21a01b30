"""Tokens to text: whole grapheme clusters, no stop string, the pieces joined equal the whole."""

from __future__ import annotations

from functools import lru_cache

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vision_server.describers.text_stream import TextStream

THAI = ["สวัสดีครับ", "ที่นี่มีวงกลมสีแดง", "น้ำแข็งใสชั้นหนึ่ง", "ก็ดี", "กำลังเดินทาง", "ผู้ใหญ่บ้าน"]
LAO = ["ສະບາຍດີ", "ຂ້ອຍຢູ່ທີ່ນີ້"]
OTHERS = ["👩‍👩‍👧‍👦 family 🏳️‍🌈", "é ñ ü", "漢字かな交じり", "नमस्ते दुनिया", "plain words, and 3 numbers", "😀👍🏽"]
characters = st.sampled_from("".join(THAI + LAO + OTHERS)) | st.characters(
    exclude_categories=["Cs"], exclude_characters="\x00"
)
texts = st.lists(st.sampled_from(THAI + LAO + OTHERS) | st.text(characters, max_size=12), max_size=6).map("".join)


@lru_cache
def tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer; with the smallest vocabulary every byte is a token of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator((THAI + LAO + OTHERS) * 3, trainer)
    return made


def pieces_of(text: str, vocabulary: int, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    made = tokenizer(vocabulary)
    stream = TextStream(lambda ids: made.decode(list(ids)), stop)
    pieces = []
    for token_id in made.encode(text).ids:
        pieces.append(stream.put(token_id))
        if stream.stopped:
            break
    pieces.append(stream.end())
    return [piece for piece in pieces if piece], stream


@settings(max_examples=300, deadline=None)
@given(text=texts, vocabulary=st.sampled_from([256, 300, 400]))
def test_the_pieces_joined_equal_the_whole(text: str, vocabulary: int) -> None:
    pieces, stream = pieces_of(text, vocabulary)
    assert "".join(pieces) == text
    assert stream.text == text


@settings(max_examples=300, deadline=None)
@given(text=texts, vocabulary=st.sampled_from([256, 400]))
def test_no_piece_ends_within_a_grapheme_cluster(text: str, vocabulary: int) -> None:
    pieces, _ = pieces_of(text, vocabulary)
    borders = {match.start() for match in regex.finditer(r"\X", text)} | {len(text)}
    reached = 0
    for piece in pieces:
        reached += len(piece)
        assert reached in borders


@settings(max_examples=300, deadline=None)
@given(
    text=texts,
    stop=st.lists(st.text(characters, min_size=1, max_size=4), min_size=1, max_size=3),
    vocabulary=st.sampled_from([256, 400]),
)
def test_stop_strings_never_leak(text: str, stop: list[str], vocabulary: int) -> None:
    pieces, stream = pieces_of(text, vocabulary, tuple(stop))
    joined = "".join(pieces)
    assert not any(word in joined for word in stop)
    assert text.startswith(joined)
    assert stream.stopped == any(word in text for word in stop)
    if not stream.stopped:
        assert joined == text


def test_thai_comes_as_it_is_written_not_at_the_end() -> None:
    pieces, _ = pieces_of("ที่นี่มีวงกลมสีแดงและดาวสีน้ำเงิน", 256)
    assert len(pieces) >= 15  # about one for each cluster


def test_a_character_that_never_completes_is_not_held_for_ever() -> None:
    made = tokenizer(256)
    first_byte = made.encode("ก").ids[0]
    stream = TextStream(lambda ids: made.decode(list(ids)))
    for _ in range(30):
        stream.put(first_byte)
    assert stream.text.count("\ufffd") >= 10


@pytest.mark.parametrize(
    ("text", "stop", "kept"), [("one two three", " two", "one"), ("aab", "ab", "a"), ("ดาวสีแดง", "สี", "ดาว")]
)
def test_the_text_ends_before_the_stop_string(text: str, stop: str, kept: str) -> None:
    pieces, stream = pieces_of(text, 256, (stop,))
    assert "".join(pieces) == kept
    assert stream.stopped
