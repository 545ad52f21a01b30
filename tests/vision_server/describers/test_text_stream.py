"""Tokens to text: whole grapheme clusters as early as they are certain, no stop string, the pieces joined equal the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import cycle
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import vision_server.shapes
from vision_server.describers.text_stream import TextStream

SHIPPED = Path(vision_server.shapes.__file__).parent / "weights" / "shapes-describer" / "tokenizer.json"
SAMPLES = [
    *("สวัสดีครับ", "ที่นี่มีวงกลมสีแดง", "น้ำแข็งใสชั้นหนึ่ง", "กำลังเดินทาง", "ผู้ใหญ่บ้าน", "ປື້ມ"),  # Thai, Lao
    *("ສະບາຍດີ", "ຂ້ອຍຢູ່ທີ່ນີ້", "မြန်မာဘာသာစကား", "ကျေးဇူးတင်ပါတယ်", "नमस्ते दुनिया", "க்ஷ"),  # Burmese, Hindi, Tamil
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "👩🏽‍🚀👍🏽", "🇹🇭🇱🇦🇲🇲", "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "1️⃣", "😀"),  # joined emoji, flags, a keycap
    *("한국어", "한국", "漢字かな交じり", "が", "é ñ ü", "Z̷͓͇a̴̬͘l̵̩̄g̸̢͊o̶̢͝", "\r\n", "\t a", "\u200b"),
    *("plain words, and 3 numbers", " ", "  ", "<s>", "▁"),
]
characters = st.sampled_from("".join(SAMPLES)) | st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
texts = st.lists(st.sampled_from(SAMPLES) | st.text(characters, max_size=12), max_size=8).map("".join)
stops = st.lists(st.text(characters, min_size=1, max_size=6) | st.sampled_from(["ab", "aab", "สี", "  "]), max_size=4)

Decode = Callable[[Sequence[int]], str]


@lru_cache
def single_bytes() -> Tokenizer:
    """The worst byte-level BPE: every byte is a token of its own, and its id."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    vocabulary = {chr(byte if byte in plain else 256 + moved.index(byte)): byte for byte in range(256)}
    assert set(vocabulary) == set(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


@lru_cache
def across() -> Tokenizer:
    """A byte-level BPE whose tokens go across characters and end within them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(SAMPLES * 3, trainer)
    return made


@lru_cache
def shipped() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED))


WORDS = ["▁", "a", "b", "▁plain", "▁words", ",", "ก", "า", "ี", "สี", "漢", "\u0301"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@lru_cache
def byte_fallback() -> Tokenizer:
    """As SentencePiece's: a few words, every other character byte by byte, a beginning's space taken away; id 0 is special."""
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(["<s>", *BYTES, *WORDS])}, []))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("<s>", special=True)])
    return made


def fallback_ids(text: str) -> list[int]:
    """The text's tokens: a word where there is one, else bytes. The first space is the one that the decoder takes away.

    A replacement character in bytes cannot be told from bad bytes, so there is none.
    """
    ids, rest = [], "▁" + text.replace("▁", "").replace("\ufffd", "").replace(" ", "▁")
    while rest:
        word = next((word for word in sorted(WORDS, key=len, reverse=True) if rest.startswith(word)), "")
        ids += [257 + WORDS.index(word)] if word else [1 + byte for byte in rest[0].encode()]
        rest = rest[len(word) or 1 :]
    return ids


def decoder(tokenizer: Tokenizer) -> Decode:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def pieces_of(decode: Decode, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(decode, stop)
    pieces = []
    for token_id in ids:
        pieces.append(stream.put(token_id))
        if stream.stopped:
            break
    pieces.append(stream.end())
    assert stream.text == "".join(pieces)
    return [piece for piece in pieces if piece], stream


def tokenized(text: str, how: str) -> tuple[Decode, list[int]]:
    if how == "byte fallback":
        return decoder(byte_fallback()), fallback_ids(text)
    tokenizer = {"shipped": shipped, "single bytes": single_bytes, "across": across}[how]()
    return decoder(tokenizer), tokenizer.encode(text, add_special_tokens=False).ids


def borders_of(text: str) -> list[int]:
    return [cluster.start() for cluster in regex.finditer(r"\X", text)] + [len(text)]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, the longer of two."""
    found = [(at + len(word), at) for word in stop if (at := text.find(word)) >= 0]
    return min(found)[1] if found else None


def certain(text: str, stop: Sequence[str]) -> int:
    """How much of a text is certain, however it goes on: all clusters but the last, nothing that may begin a stop string."""
    held = max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
    return max((border for border in borders_of(text)[:-1] if border <= len(text) - held), default=0)


tokenizers = st.sampled_from(["shipped", "single bytes", "across", "byte fallback"])


@settings(max_examples=150, deadline=None)
@given(text=texts, how=tokenizers)
def test_the_pieces_joined_equal_the_whole_and_end_between_clusters(text: str, how: str) -> None:
    decode, ids = tokenized(text, how)
    pieces, stream = pieces_of(decode, ids)
    assert "".join(pieces) == decode(ids) == stream.text
    borders = set(borders_of(stream.text))
    reached = 0
    for piece in pieces:
        reached += len(piece)
        assert reached in borders


@settings(max_examples=150, deadline=None)
@given(text=texts, stop=stops, how=tokenizers)
def test_stop_strings_never_leak(text: str, stop: list[str], how: str) -> None:
    decode, ids = tokenized(text, how)
    whole = decode(ids)
    pieces, stream = pieces_of(decode, ids, stop)
    cut = first_stop(whole, stop)
    assert "".join(pieces) == whole[:cut]
    assert stream.stopped == (cut is not None)
    if stream.stopped:
        assert stream.put(ids[0]) == stream.end() == ""


@settings(max_examples=80, deadline=None)
@given(text=texts, stop=stops, how=st.sampled_from(["single bytes", "byte fallback"]))
def test_nothing_is_held_back_longer_than_it_must_be(text: str, stop: list[str], how: str) -> None:
    decode, ids = tokenized(text, how)
    stream = TextStream(decode, stop)
    for count, token_id in enumerate(ids, start=1):
        stream.put(token_id)
        known = whole_characters(ids[:count], how)
        if stream.stopped:
            assert first_stop(known, stop) is not None
            break
        if not known.endswith("\ufffd"):
            assert stream.text == known[: certain(known, stop)]


def whole_characters(ids: Sequence[int], how: str) -> str:
    """The text of the tokens without an unfinished character at the end, from their bytes."""
    if how == "single bytes":
        return bytes(ids).decode(errors="ignore")
    tokens = [["<s>", *BYTES, *WORDS][token_id] for token_id in ids]
    coded = b"".join(bytes([BYTES.index(token)]) if token in BYTES else token.encode() for token in tokens)
    return coded.decode(errors="ignore").replace("▁", " ")[1:]


noise = st.sampled_from([0xE0, 0xB8, 0x81, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xED, 0xFF, 0x41]) | st.integers(0, 255)


@settings(max_examples=150, deadline=None)
@given(data=st.lists(noise, max_size=150))
def test_bad_bytes_are_given_as_the_whole_shows_them(data: list[int]) -> None:
    pieces, _ = pieces_of(decoder(single_bytes()), data)
    assert "".join(pieces) == bytes(data).decode(errors="replace") == decoder(single_bytes())(data)


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.lists(noise, min_size=1, max_size=5).map(bytes), max_size=100))
def test_so_are_tokens_of_several_bytes(tokens: list[bytes]) -> None:
    def decode(ids: Sequence[int]) -> str:
        return b"".join(tokens[token_id] for token_id in ids).decode(errors="replace")

    pieces, _ = pieces_of(decode, range(len(tokens)))
    assert "".join(pieces) == decode(range(len(tokens)))


@settings(max_examples=150, deadline=None)
@given(data=st.lists(noise | st.sampled_from([-256, 1, 2, 3]), max_size=120))
def test_bad_byte_tokens_of_a_fallback_end_no_answer(data: list[int]) -> None:
    # -256 is the special token, 1 to 3 are bytes; the decoder shows a run of byte tokens as bad when one of them is.
    ids = [1 + byte if byte >= 0 else 0 for byte in data]
    pieces, _ = pieces_of(decoder(byte_fallback()), [*ids, 257 + WORDS.index("a")])
    assert "".join(pieces).endswith("a")
    good = [1 + byte for byte in "ดาว".encode()]
    assert pieces_of(decoder(byte_fallback()), [*good, 1 + 0xFF, 257 + WORDS.index("a")])[1].text == "ดาว\ufffda"


@settings(max_examples=120, deadline=None)
@given(
    text=texts,
    how=st.sampled_from(["shipped", "byte fallback"]),
    counts=st.lists(st.sampled_from([0, 0, 1, 3, 40]), min_size=1, max_size=9),
)
def test_special_tokens_in_between_change_nothing(text: str, how: str, counts: list[int]) -> None:
    decode, ids = tokenized(text, how)
    mixed = [part for count, token_id in zip(cycle(counts), ids, strict=False) for part in [0] * count + [token_id]]
    pieces, _ = pieces_of(decode, mixed)
    assert "".join(pieces) == decode(mixed) == decode(ids)


# Every byte a token: each cluster comes by itself, when the first character of the next one is whole.
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("ที่|นี่| |น้ำ|แ|ข็|ง|เ|ป็|น|ก้|อ|น", id="Thai"),
        pytest.param("👩\u200d👩\u200d👧\u200d👦|🏳\ufe0f\u200d🌈|🇹🇭|🇱🇦|👍🏽|1\ufe0f\u20e3|👩🏽\u200d🚀|😀", id="emoji"),
        pytest.param(
            "H|i|,| |ສ|ະ|ບ|າ|ຍ|ດີ|မြ|န်|မ|ာ|漢|字|か\u3099|한|\u1112\u1161\u11ab|e\u0301|\r\n|ดี|👩🏽\u200d🚀|!",
            id="mixed",
        ),
    ],
)
def test_replays_through_single_bytes(text: str) -> None:
    pieces = text.split("|")
    text = "".join(pieces)
    assert pieces_of(decoder(single_bytes()), list(text.encode()))[0] == pieces
    stop = pieces[-3]
    stopped, stream = pieces_of(decoder(single_bytes()), list(text.encode()), [stop])
    assert stream.stopped
    assert "".join(stopped) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two three", [" two"], "one"),
        ("aab", ["ab"], "a"),
        ("ดาวสีแดง", ["สี"], "ดาว"),
        ("ดาวสีแดง", ["ี"], "ดาวส"),
        ("abcde", ["bcde", "cd"], "ab"),  # complete first
        ("abcde", ["cd", "abcd"], ""),  # both at once: the longer
        ("ababac", ["abac"], "ab"),
        ("aabaaabaac", ["aabaac"], "aaba"),
        ("abab", ["ababc"], "abab"),
    ],
)
@pytest.mark.parametrize("how", ["shipped", "single bytes", "across"])
def test_the_text_ends_before_the_stop_string(text: str, stop: list[str], kept: str, how: str) -> None:
    decode, ids = tokenized(text, how)
    pieces, stream = pieces_of(decode, ids, stop)
    assert "".join(pieces) == kept
    assert stream.stopped == (kept != text)


def test_a_cluster_without_end_is_not_held_for_ever() -> None:
    decode, ids = tokenized("ก" + "\u0e38" * 1000 + "ข", "single bytes")
    stream = TextStream(decode)
    for count, token_id in enumerate(ids, start=1):
        stream.put(token_id)
        assert len(bytes(ids[:count]).decode(errors="ignore")) - len(stream.text) <= 33
    stream.end()
    assert stream.text == decode(ids)


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    stream = TextStream(decoder(single_bytes()))
    for count in range(1, 500):
        stream.put(0xE0)
        assert len(stream.text) >= count - 4


@pytest.mark.parametrize(
    ("ids", "stop"),
    [
        pytest.param([*"ดาวสีแดง ".encode()] * 400, [], id="Thai"),
        pytest.param([*b"e", *"\u0301".encode() * 5000], [], id="one cluster"),
        pytest.param([*b"ab" * 5000], ["ab" * 6000], id="a stop string nearly all the way"),
        pytest.param([*b"a" * 10000], ["a" * 500 + "b"] * 8, id="stop strings again and again"),
        pytest.param([0xFF] * 10000, [], id="bad bytes"),
        pytest.param([0xE0, 0xB8] * 5000, [], id="unfinished characters"),
    ],
)
def test_a_token_late_in_an_answer_costs_what_an_early_one_does(ids: list[int], stop: list[str]) -> None:
    decoded = 0

    def decode(window: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(window)
        return bytes(window).decode(errors="replace")

    began_s = time.process_time()
    _, stream = pieces_of(decode, ids, stop)
    assert stream.text == bytes(ids).decode(errors="replace")
    assert decoded <= 33 * len(ids)
    # A tenth of it is enough; work that grows with what is held back takes ten times as long.
    assert time.process_time() - began_s < 4
