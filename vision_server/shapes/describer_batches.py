"""Turns scenes into what the describer is trained on: pixels, patch truth, packed conversations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vision_server.grounding import counted
from vision_server.shapes.describer_model import END, IMAGE, IMAGE_PX, PATCH_PX, PATCHES
from vision_server.shapes.imagined_detections import imagine_detections
from vision_server.shapes.patch_truth import Summary, patch_truth, summarise
from vision_server.shapes.questions import KINDS, LANGUAGES, Pair, ask, grounded
from vision_server.shapes.scenes import DESCRIBER_STYLE, Scene, SceneStyle, draw_scene
from vision_server.shapes.subject_truth import IGNORED, item_starts, item_truth, subject_end, subject_truth

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

ASPECTS = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 2, 16 / 9)
# Of the questions, how many come with what a detector found, and how many with the counts of it alone.
GROUNDED_SHARE = 0.6
COUNTED_SHARE = 0.05
SYSTEM_SHARE = 0.3
FOLLOW_UP_SHARE = 0.15

# A tower that first meets large shapes on plain ground learns what a corner is in a fraction of the time.
EASY_STYLE = replace(DESCRIBER_STYLE, min_side=0.22, clutter_share=0.0, overlap_share=0.0, max_shapes=4)

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a helpful vision assistant. Answer briefly.",
    "Answer in the language of the question.",
    "You describe pictures.",
    "คุณเป็นผู้ช่วยที่อธิบายภาพ",
    "ตอบเป็นภาษาเดียวกับคำถาม",
)


@dataclass(frozen=True)
class Pictures:
    """One batch as the vision tower and its loss want it."""

    pixels: torch.Tensor  # (images, 3, IMAGE_PX, IMAGE_PX), normalised as the processor does
    truth: torch.Tensor  # (images, patches, 6)
    summary: Summary
    scenes: tuple[Scene, ...]


@dataclass(frozen=True)
class Packed:
    """Rows of [prompt head][image][conversation 1][conversation 2]...; no conversation sees another."""

    token_ids: torch.Tensor  # (rows, length)
    targets: torch.Tensor  # (rows, length), IGNORED except on answers
    weights: torch.Tensor  # (rows, length), what each target counts
    positions: torch.Tensor  # (rows, length), restarting after the image for every conversation
    mask: torch.Tensor  # (rows, 1, length, length), added to the attention scores
    subjects: torch.Tensor  # (words, 2), row and column of the words that questions are about
    subject_truth: torch.Tensor  # (words, 3)


@dataclass(frozen=True)
class _Row:
    """One picture's conversations before padding."""

    ids: list[int]
    targets: list[int]
    weights: list[float]
    positions: list[int]
    segments: list[int]
    subjects: list[int]
    truths: list[tuple[int, int, int]]


def describer_scene(rng: np.random.Generator, style: SceneStyle = DESCRIBER_STYLE) -> Scene:
    """A scene near the model's own resolution, landscape, portrait or square."""
    short_px = int(rng.integers(136, 200))
    long_px = round(short_px * ASPECTS[rng.integers(len(ASPECTS))])
    size = (long_px, short_px) if rng.random() < 0.7 else (short_px, long_px)
    return draw_scene(rng, *size, style)


def to_pixels(scene: Scene) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    """The scene squashed and normalised as the processor does it, channels first."""
    squashed = cv2.resize(scene.image, (IMAGE_PX, IMAGE_PX), interpolation=cv2.INTER_AREA)
    normalised = (squashed.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def draw_pictures(rng: np.random.Generator, count: int, style: SceneStyle = DESCRIBER_STYLE) -> Pictures:
    """A batch of fresh scenes."""
    scenes = tuple(describer_scene(rng, style) for _ in range(count))
    pixels = np.stack([to_pixels(scene) for scene in scenes])
    truth = np.stack([patch_truth(scene, IMAGE_PX, PATCH_PX) for scene in scenes])
    return Pictures(torch.from_numpy(pixels), torch.from_numpy(truth), summarise(scenes), scenes)


def draw_pair(rng: np.random.Generator, scene: Scene, kinds: Sequence[str], first_kind: str) -> Pair:
    """A question of the first kind, or of any if this scene allows none; most of them with what a detector found."""
    kind = first_kind
    while True:
        pair = ask(rng, scene.shapes, kind, LANGUAGES[int(rng.integers(len(LANGUAGES)))])
        if pair is not None:
            break
        kind = kinds[int(rng.integers(len(kinds)))]
    form = rng.random()
    if form < GROUNDED_SHARE:
        return replace(pair, question=grounded(pair.question, imagine_detections(rng, scene), scene.image))
    if form < GROUNDED_SHARE + COUNTED_SHARE:
        found = imagine_detections(rng, scene)
        return replace(pair, question=f"{counted(one.label for one in found)}\n{pair.question}")
    return pair


class Packer:
    """Writes several conversations about one picture behind a single copy of its image tokens.

    The image is four fifths of a short conversation; sharing it makes each question cheap. Positions restart after
    the image, so the model sees exactly what it will see when asked one question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, conversations: int, kinds: Sequence[str] = KINDS) -> None:
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._kinds = kinds
        self._encoded: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        self._image_token = int(tokenizer.convert_tokens_to_ids(IMAGE))

    def _encode(self, text: str) -> list[int]:
        return self._with_letters(text)[0]

    def _with_letters(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the letters that each covers: from, up to."""
        if text not in self._encoded:
            encoded = self._tokenizer(text, return_offsets_mapping=True)
            self._encoded[text] = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        return self._encoded[text]

    def _kinds_in_turn(self, rng: np.random.Generator) -> list[str]:
        """All kinds before any comes again: rows of one batch become equally long and pad little."""
        rounds = -(-self._conversations // len(self._kinds))
        kinds = [self._kinds[index] for _ in range(rounds) for index in rng.permutation(len(self._kinds))]
        return kinds[: self._conversations]

    def _row(self, rng: np.random.Generator, scene: Scene) -> _Row:
        head = "<|user|>\n"
        if rng.random() < SYSTEM_SHARE:
            head = f"<|system|>\n{SYSTEM_TEXTS[int(rng.integers(len(SYSTEM_TEXTS)))]}{END}\n{head}"
        ids = [*self._encode(head), *[self._image_token] * PATCHES]
        prefix = len(ids)
        targets, positions, segments = [IGNORED] * prefix, list(range(prefix)), [0] * prefix
        weights = [0.0] * prefix
        position = prefix
        subjects: list[int] = []
        truths: list[tuple[int, int, int]] = []
        for conversation, kind in enumerate(self._kinds_in_turn(rng), 1):
            follow_up = conversation > 1 and rng.random() < FOLLOW_UP_SHARE
            segment = segments[-1] if follow_up else conversation
            position = position if follow_up else prefix
            pair = draw_pair(rng, scene, self._kinds, kind)
            opening = f"{END}\n<|user|>\n" if follow_up else "\n"
            # The end token of the answer before is already there; a follow-up goes on from its newline.
            opening = opening.removeprefix(END)
            opened = self._encode(opening)
            asked, letters = self._with_letters(f"{pair.question}{END}\n<|assistant|>\n")
            named = subject_end(pair)
            if named is not None:
                token = max(index for index, (start, end) in enumerate(letters) if start <= named < end)
                subjects.append(len(ids) + len(opened) + token)
                truths.append(subject_truth(pair, scene.shapes))
            question = [*opened, *asked]
            answer, letters = self._with_letters(pair.answer + END)
            if pair.kind == "describe":
                for first, shape in zip(item_starts(pair, scene.shapes), scene.shapes, strict=True):
                    token = next(index for index, (start, end) in enumerate(letters) if start <= first < end)
                    subjects.append(len(ids) + len(question) + token - 1)
                    truths.append(item_truth(shape))
            ids += question + answer
            targets += [IGNORED] * len(question) + answer
            # Else descriptions, ten times as long as "yes", would be most of what is learned.
            weights += [0.0] * len(question) + [len(answer) ** -0.5] * len(answer)
            length = len(question) + len(answer)
            positions += range(position, position + length)
            position += length
            segments += [segment] * length
        return _Row(ids, targets, weights, positions, segments, subjects, truths)

    def pack(self, rng: np.random.Generator, scenes: Sequence[Scene]) -> Packed:
        """One row a scene, padded to the longest on the right."""
        rows = [self._row(rng, scene) for scene in scenes]
        length = max(len(row.ids) for row in rows)

        def padded(values: Sequence[Sequence[float]], filler: int) -> torch.Tensor:
            return torch.tensor([[*value, *[filler] * (length - len(value))] for value in values])

        segments = padded([row.segments for row in rows], -1)
        same = segments[:, :, None] == segments[:, None, :]
        visible = (same | (segments[:, None, :] == 0)) & torch.ones(length, length).tril().bool()
        mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)[:, None]
        subjects = [(index, column) for index, row in enumerate(rows) for column in row.subjects]
        return Packed(
            padded([row.ids for row in rows], int(self._tokenizer.pad_token_id)),
            padded([row.targets for row in rows], IGNORED),
            padded([row.weights for row in rows], 0),
            padded([row.positions for row in rows], 0),
            mask,
            torch.tensor(subjects).reshape(-1, 2),
            torch.tensor([truth for row in rows for truth in row.truths]).reshape(-1, 3),
        )
