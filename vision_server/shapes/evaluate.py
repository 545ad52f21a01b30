"""Measures both shipped models on scenes they were not trained on."""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vision_server.shapes.boxes import average_precision, matched_boxes
from vision_server.shapes.foreign_scenes import draw_foreign_scene
from vision_server.shapes.questions import KINDS, LANGUAGES, Pair, ask, grounded
from vision_server.shapes.scenes import (
    DESCRIBER_STYLE,
    DETECTOR_STYLE,
    LABELS,
    Shape,
    draw_scene,
)
from vision_server.shapes.scenes import Image as ImageArray
from vision_server.torchvision_ops import install

WEIGHTS = Path(__file__).parent / "weights"
DETECTOR = WEIGHTS / "shapes-detector.pt"
DESCRIBER = WEIGHTS / "shapes-describer"
# Far from every training seed.
HELD_OUT_SEED = 900_001
SIZES_PX = ((640, 480), (320, 320), (800, 600), (480, 640), (640, 360), (320, 240))
CONFIDENCE = 0.25
BATCH = 32


@dataclass(frozen=True)
class HeldOutScene:
    """A picture with its truth, whoever drew it."""

    image: ImageArray  # RGB
    shapes: tuple[Shape, ...]


def generator_scenes(count: int, seed: int, *, detector: bool) -> list[HeldOutScene]:
    """Unseen scenes of the training generator, at the sizes people send."""
    rng = np.random.default_rng(seed)
    style = DETECTOR_STYLE if detector else DESCRIBER_STYLE
    scenes = []
    for index in range(count):
        scene = draw_scene(rng, *SIZES_PX[index % len(SIZES_PX)], style)
        scenes.append(HeldOutScene(scene.image, scene.shapes))
    return scenes


def foreign_scenes(count: int, seed: int) -> list[HeldOutScene]:
    """Scenes drawn in plain Pillow by foreign_scenes.py."""
    scenes = []
    for index in range(count):
        foreign = draw_foreign_scene(seed + index)
        shapes = tuple(Shape(s.label, s.colour, s.box, (), (0, 0, 0)) for s in foreign.shapes)
        scenes.append(HeldOutScene(np.asarray(foreign.image, np.uint8), shapes))
    return scenes


def load_detector() -> Any:
    """Ultralytics reads its settings at import: they go to scratch, and it neither fetches nor installs."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
    install()
    from ultralytics import YOLO

    return YOLO(str(DETECTOR))


def measure_detector(model: Any, scenes: Sequence[HeldOutScene]) -> dict[str, float]:
    """mAP over all confidences; recall, false boxes and confidences at the usual threshold."""
    found, truths, true_confidences = [], [], []
    missed = false_boxes = empty = false_on_empty = 0
    for scene in scenes:
        # Ultralytics takes arrays as BGR. rect=False pads to the full square, as the server does.
        result = model.predict(scene.image[..., ::-1], conf=0.001, iou=0.6, rect=False, verbose=False)[0].boxes
        boxes = [
            (LABELS[int(label)], float(score), tuple(box))
            for label, score, box in zip(result.cls.tolist(), result.conf.tolist(), result.xyxy.tolist(), strict=True)
        ]
        truth = [(shape.label, shape.box) for shape in scene.shapes]
        found.append(boxes)
        truths.append(truth)
        kept = [box for box in boxes if box[1] >= CONFIDENCE]
        matches = matched_boxes(kept, truth, 0.5)
        true_confidences += [kept[index][1] for index in matches]
        missed += len(truth) - len(matches)
        false_boxes += len(kept) - len(matches)
        if not truth:
            empty += 1
            false_on_empty += len(kept)
    precision = [average_precision(found, truths, LABELS, iou) for iou in np.arange(0.5, 1.0, 0.05)]
    total = sum(len(truth) for truth in truths)
    return {
        "scenes": len(scenes),
        "objects": total,
        "map50": round(precision[0], 4),
        "map50_95": round(float(np.mean(precision)), 4),
        "recall": round(1 - missed / max(1, total), 4),
        "false_boxes_per_scene": round(false_boxes / len(scenes), 4),
        "empty_scenes": empty,
        "false_boxes_per_empty_scene": round(false_on_empty / max(1, empty), 4),
        "median_confidence": round(float(np.median(true_confidences)), 3),
        "share_above_half_confidence": round(float(np.mean(np.array(true_confidences) > 0.5)), 4),
    }


class Describer:
    """The shipped describer, loaded as any user would load it."""

    def __init__(self, folder: Path = DESCRIBER) -> None:
        install()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self._model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()

    def answer(self, asked: Sequence[tuple[ImageArray, str]]) -> list[str]:
        """Greedy answers, in the order asked."""
        answers: list[str] = []
        for start in range(0, len(asked), BATCH):
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": Image.fromarray(image)},
                            {"type": "text", "text": question},
                        ],
                    }
                ]
                for image, question in asked[start : start + BATCH]
            ]
            inputs = self._processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            with torch.inference_mode():
                tokens = self._model.generate(**inputs, max_new_tokens=64, do_sample=False)
            fresh = tokens[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in self._processor.batch_decode(fresh, skip_special_tokens=True)]
        return answers


def draw_pairs(scenes: Sequence[HeldOutScene], seed: int) -> Iterator[tuple[HeldOutScene, Pair]]:
    """One question of every kind and language about every scene that allows it."""
    rng = np.random.default_rng(seed)
    for scene in scenes:
        for kind in KINDS:
            for language in LANGUAGES:
                pair = ask(rng, scene.shapes, kind, language)
                if pair is not None:
                    yield scene, pair


def measure_describer(
    model: Describer, scenes: Sequence[HeldOutScene], seed: int, with_objects: bool
) -> dict[str, Any]:
    """Share of answers that are exactly right, by kind and language, and by how many shapes there are."""
    pairs = list(draw_pairs(scenes, seed))
    asked = []
    for scene, pair in pairs:
        labels = [shape.label for shape in scene.shapes]
        asked.append((scene.image, grounded(pair.question, labels) if with_objects else pair.question))
    right: dict[str, list[bool]] = defaultdict(list)
    by_amount: dict[int, list[bool]] = defaultdict(list)
    wrong = []
    for (scene, pair), question, said in zip(pairs, asked, model.answer(asked), strict=True):
        right[f"{pair.kind} {pair.language}"].append(said == pair.answer)
        by_amount[len(scene.shapes)].append(said == pair.answer)
        if said != pair.answer:
            wrong.append({"question": question[1], "wanted": pair.answer, "said": said})
    rates = {name: round(float(np.mean(values)), 4) for name, values in right.items()}
    every = [value for values in right.values() for value in values]
    return {
        "scenes": len(scenes),
        "questions": len(every),
        "exact": round(float(np.mean(every)), 4),
        "exact_by_kind": rates,
        "exact_by_shapes": {
            str(amount): round(float(np.mean(values)), 4) for amount, values in sorted(by_amount.items())
        },
        "examples_of_wrong": wrong[:12],
    }


def parse_arguments() -> argparse.Namespace:
    """How many scenes to measure on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--detector-scenes", type=int, default=300, help="of each source; 0 skips the detector")
    parser.add_argument("--describer-scenes", type=int, default=150, help="of each source; 0 skips the describer")
    parser.add_argument("--describer", type=Path, default=DESCRIBER, help="folder of the describer to measure")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    started = time.time()
    report: dict[str, Any] = {"seed": arguments.seed, "detector": {}, "describer": {}}
    if arguments.detector_scenes:
        detector, count = load_detector(), arguments.detector_scenes
        sources = {
            "generator": generator_scenes(count, arguments.seed, detector=True),
            "foreign": foreign_scenes(count, arguments.seed),
        }
        report["detector"] = {name: measure_detector(detector, scenes) for name, scenes in sources.items()}
    if arguments.describer_scenes:
        describer, count = Describer(arguments.describer), arguments.describer_scenes
        sources = {
            "generator": generator_scenes(count, arguments.seed + 1, detector=False),
            "foreign": foreign_scenes(count, arguments.seed + 50_000),
        }
        for name, scenes in sources.items():
            for with_objects in (False, True):
                key = f"{name} grounded" if with_objects else name
                report["describer"][key] = measure_describer(describer, scenes, arguments.seed, with_objects)
    report["wall_seconds"] = round(time.time() - started)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
