"""Measures the shipped models on scenes they were not trained on."""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vision_server.results import Detection
from vision_server.shapes.held_out import (
    HELD_OUT_SEED,
    HeldOutScene,
    foreign_scenes,
    foreign_singles,
    generator_scenes,
    generator_singles,
)
from vision_server.shapes.measure import (
    BOXES,
    EXACT_POINTS,
    MASKS,
    NAMED_POINTS,
    TURNED_BOXES,
    Finding,
    find,
    load_yolo,
    measure_finding,
    measure_naming,
)
from vision_server.shapes.questions import KINDS, LANGUAGES, Pair, ask, detection, grounded
from vision_server.shapes.scenes import Image as ImageArray
from vision_server.torchvision_ops import install

WEIGHTS = Path(__file__).parent / "weights"
DETECTOR = WEIGHTS / "shapes-detector.pt"
SEGMENTER = WEIGHTS / "shapes-segmenter.pt"
ORIENTED = WEIGHTS / "shapes-oriented.pt"
POSE = WEIGHTS / "shapes-pose.pt"
CLASSIFIER = WEIGHTS / "shapes-classifier.pt"
DESCRIBER = WEIGHTS / "shapes-describer"
BATCH = 32
# As the server's VISION_QUANTIZATION names them.
QUANTIZATIONS = ("none", "int8", "nf4")
SPEED_SCENES = 10

# What finds shapes, under the name the report has for it.
FINDERS: dict[str, tuple[Path, Finding[Any]]] = {
    "detector": (DETECTOR, BOXES),
    "segmenter": (SEGMENTER, MASKS),
    "oriented": (ORIENTED, TURNED_BOXES),
    "pose": (POSE, NAMED_POINTS),
    "pose_exact": (POSE, EXACT_POINTS),
}


def load_detector() -> Any:
    """The shipped detector as an Ultralytics model."""
    return load_yolo(DETECTOR)


def measure_detector(model: Any, scenes: Sequence[HeldOutScene]) -> dict[str, float]:
    """The detector's figures: see measure_finding."""
    return measure_finding(model, scenes, BOXES)


class Describer:
    """The shipped describer, loaded as any user would load it, or as the server does when told to quantize it."""

    def __init__(self, folder: Path = DESCRIBER, quantization: str = "none") -> None:
        install()
        from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

        configs: dict[str, dict[str, Any]] = {
            "int8": {"load_in_8bit": True},
            "nf4": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.float32,
            },
        }
        config = configs.get(quantization)
        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self._model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            quantization_config=None if config is None else BitsAndBytesConfig(**config),
        ).eval()
        self.memory_bytes = int(self._model.get_memory_footprint())
        self.token_count = 0
        """Tokens of all answers so far."""

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
            self.token_count += int((fresh != self._model.generation_config.pad_token_id).sum())
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


def look_with(detector: Any, scenes: Sequence[HeldOutScene]) -> list[list[Detection]]:
    """What the detector finds in each scene at the usual threshold, surest first."""
    return [[detection(*found) for found in find(detector, scene, BOXES)] for scene in scenes]


def measure_describer(
    model: Describer, scenes: Sequence[HeldOutScene], seed: int, detector: Any = None
) -> dict[str, Any]:
    """Share of answers that are exactly right, by kind and language, and by how many shapes there are.

    With a `detector` every question comes grounded in what it finds, mistakes and all, as Analyze asks.
    """
    pairs = list(draw_pairs(scenes, seed))
    asked = [(scene.image, pair.question) for scene, pair in pairs]
    if detector is not None:
        seen = {id(scene): found for scene, found in zip(scenes, look_with(detector, scenes), strict=True)}
        asked = [(s.image, grounded(pair.question, seen[id(s)], s.image)) for s, pair in pairs]
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


def evaluate_yolo(name: str, count: int, seed: int) -> dict[str, dict[str, float]]:
    """One model of FINDERS, or the classifier, on `count` scenes of each source."""
    if name == "classifier":
        model = load_yolo(CLASSIFIER)
        sources = {"generator": generator_singles(count, seed), "foreign": foreign_singles(count, seed)}
        return {source: measure_naming(model, scenes) for source, scenes in sources.items()}
    weights, finding = FINDERS[name]
    model = load_yolo(weights)
    sources = {"generator": generator_scenes(count, seed, detector=True), "foreign": foreign_scenes(count, seed)}
    return {source: measure_finding(model, scenes, finding) for source, scenes in sources.items()}


def evaluate_describer(folder: Path, count: int, seed: int) -> dict[str, dict[str, Any]]:
    """The describer on `count` scenes of each source, with and without what the detector found before the question."""
    describer, detector = Describer(folder), load_detector()
    sources = {
        "generator": generator_scenes(count, seed + 1, detector=False),
        "foreign": foreign_scenes(count, seed + 50_000),
    }
    return {
        f"{source} grounded" if looks else source: measure_describer(
            describer, scenes, seed, detector if looks else None
        )
        for source, scenes in sources.items()
        for looks in (False, True)
    }


def evaluate_quantized(folder: Path, count: int, seed: int) -> dict[str, dict[str, Any]]:
    """The describer under each quantization, on `count` scenes of each source; the same questions, not grounded."""
    scenes = [
        *generator_scenes(count, seed + 1, detector=False),
        *foreign_scenes(count, seed + 50_000),
    ]
    measured = {}
    for quantization in QUANTIZATIONS:
        describer = Describer(folder, quantization)
        figures = measure_describer(describer, scenes, seed)
        # One at a time, in CPU seconds: other work on the machine does not count.
        tokens, began_s = describer.token_count, time.process_time()
        for scene in scenes[: 2 * SPEED_SCENES : 2]:
            describer.answer([(scene.image, "Describe the picture.")])
        figures["tokens_per_cpu_second"] = round((describer.token_count - tokens) / (time.process_time() - began_s), 1)
        figures["memory_bytes"] = describer.memory_bytes
        measured[quantization] = figures
    return measured


def parse_arguments() -> argparse.Namespace:
    """Which models, on how many scenes."""
    models = [*FINDERS, "classifier", "describer", "describer_quantized"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="write the JSON here as well; models not measured now keep their figures"
    )
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--yolo-scenes", type=int, default=150, help="of each source, for all but the describer")
    parser.add_argument("--describer-scenes", type=int, default=100, help="of each source")
    parser.add_argument("--quantized-scenes", type=int, default=30, help="of each source")
    parser.add_argument("--describer", type=Path, default=DESCRIBER, help="folder of the describer to measure")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    started = time.time()
    known = arguments.out and arguments.out.exists()
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if known else {}
    report["seed"] = arguments.seed
    for name in arguments.models:
        if name == "describer":
            report[name] = evaluate_describer(arguments.describer, arguments.describer_scenes, arguments.seed)
        elif name == "describer_quantized":
            report[name] = evaluate_quantized(arguments.describer, arguments.quantized_scenes, arguments.seed)
        else:
            report[name] = evaluate_yolo(name, arguments.yolo_scenes, arguments.seed)
    report["wall_seconds"] = round(time.time() - started)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
