"""Trains the shape detector from drawn scenes."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from vision_server.shapes.scenes import DETECTOR_STYLE, LABELS, Scene, draw_scene
from vision_server.torchvision_ops import install

HERE = Path(__file__).parent
ARCHITECTURE = HERE / "yolo11p.yaml"
WEIGHTS = HERE / "weights" / "shapes-detector.pt"
IMAGE_SIDE_PX = 320
LONG_SIDES_TO_SHORT = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 2, 16 / 9)

# What a checkpoint keeps of its training arguments: enough to load it, nothing about where it was made.
KEPT_ARGUMENTS: dict[str, Any] = {
    "task": "detect",
    "mode": "train",
    "model": "yolo11p.yaml",
    "data": "shapes.yaml",
    "imgsz": IMAGE_SIDE_PX,
    "single_cls": False,
}


def detector_scene(rng: np.random.Generator) -> Scene:
    """A scene whose longer side is the detector's input side, square, landscape or portrait."""
    short_px = round(IMAGE_SIDE_PX / LONG_SIDES_TO_SHORT[rng.integers(len(LONG_SIDES_TO_SHORT))])
    landscape = rng.random() < 0.6
    size = (IMAGE_SIDE_PX, short_px) if landscape else (short_px, IMAGE_SIDE_PX)
    return draw_scene(rng, *size, DETECTOR_STYLE)


def label_lines(scene: Scene) -> list[str]:
    """The scene in YOLO's text form: class, then box centre and size as parts of the picture."""
    height_px, width_px = scene.image.shape[:2]
    lines = []
    for shape in scene.shapes:
        x0, y0, x1, y1 = shape.box
        centre_x, centre_y = shape.centre
        lines.append(
            f"{LABELS.index(shape.label)} {centre_x / width_px:.5f} {centre_y / height_px:.5f} "
            f"{(x1 - x0) / width_px:.5f} {(y1 - y0) / height_px:.5f}"
        )
    return lines


def write_split(folder: Path, split: str, count: int, seed: int) -> None:
    """Draw `count` scenes into images/<split> and labels/<split>."""
    rng = np.random.default_rng(seed)
    images, labels = folder / "images" / split, folder / "labels" / split
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = detector_scene(rng)
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(65, 97))]
        cv2.imwrite(str(images / f"{index:05d}.jpg"), scene.image[..., ::-1], quality)
        (labels / f"{index:05d}.txt").write_text("\n".join(label_lines(scene)))


def write_dataset(folder: Path, train_count: int, val_count: int, seed: int) -> Path:
    """Draw both splits; returns the dataset's yaml. Validation scenes come from another seed."""
    write_split(folder, "train", train_count, seed)
    write_split(folder, "val", val_count, seed + 1_000)
    names = dict(enumerate(LABELS))
    description = folder / "shapes.yaml"
    description.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: {names}\n")
    return description


def train_stage(dataset: Path, out: Path, name: str, weights: Path | None, **settings: Any) -> Path:
    """One ultralytics run; returns its best checkpoint."""
    from ultralytics import YOLO

    arguments: dict[str, Any] = {
        "data": str(dataset),
        "device": "cpu",
        "workers": 0,
        "amp": False,
        "plots": False,
        "cache": "ram",
        "optimizer": "AdamW",
        "lrf": 0.05,
        "cos_lr": True,
        "warmup_epochs": 1.0,
        "warmup_bias_lr": 0.0,
        "mosaic": 0.3,
        "scale": 0.3,
        "translate": 0.1,
        "hsv_h": 0.02,
        "hsv_s": 0.3,
        "hsv_v": 0.3,
        "project": str(out.resolve()),
        "name": name,
        "exist_ok": True,
        "deterministic": True,
        "verbose": False,
        # Weights are named here and not loaded before: train() builds the model anew from its yaml.
        "pretrained": str(weights) if weights else False,
    }
    model = YOLO(str(ARCHITECTURE))
    model.train(**arguments | settings)
    return out / name / "weights" / "best.pt"


def export(checkpoint: Path, target: Path) -> None:
    """Write a half-precision inference checkpoint that names no path of the machine it was trained on."""
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = (loaded.get("ema") or loaded["model"]).half()
    model.args = dict(KEPT_ARGUMENTS)
    model.yaml["yaml_file"] = ARCHITECTURE.name
    for parameter in model.parameters():
        parameter.requires_grad = False
    for attribute in ("criterion", "pt_path"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        "epoch": -1,
        "best_fitness": None,
        "model": model,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": dict(KEPT_ARGUMENTS),
        "version": loaded["version"],
        "license": loaded.get("license"),
        "date": None,
    }
    torch.save(kept, target)


def parse_arguments() -> argparse.Namespace:
    """How much to draw, how long to train, where to write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder for the data and the runs")
    parser.add_argument("--weights-out", type=Path, default=WEIGHTS, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--train-scenes", type=int, default=3000)
    parser.add_argument("--val-scenes", type=int, default=300)
    parser.add_argument("--epochs-small", type=int, default=12, help="epochs at 160 px, where most is learnt cheaply")
    parser.add_argument("--epochs-full", type=int, default=9, help="epochs at 320 px")
    parser.add_argument("--resume-from", type=Path, help="skip the small stage and start from this checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Draw, train small, train full, export."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Read when ultralytics is imported: its settings go to scratch, nothing is fetched or installed.
    os.environ.update(
        YOLO_CONFIG_DIR=str(arguments.out.resolve()),
        YOLO_OFFLINE="true",
        YOLO_AUTOINSTALL="false",
        OMP_NUM_THREADS=str(arguments.threads),
    )
    install()
    torch.set_num_threads(arguments.threads)
    wall, cpu = time.time(), time.process_time()
    dataset = write_dataset(arguments.out / "data", arguments.train_scenes, arguments.val_scenes, arguments.seed)
    best = arguments.resume_from
    if best is None:
        best = train_stage(
            dataset,
            arguments.out,
            "small",
            None,
            imgsz=160,
            batch=32,
            lr0=0.004,
            epochs=arguments.epochs_small,
            close_mosaic=2,
            seed=arguments.seed,
        )
    best = train_stage(
        dataset,
        arguments.out,
        "full",
        best,
        imgsz=IMAGE_SIDE_PX,
        batch=32,
        lr0=0.002,
        epochs=arguments.epochs_full,
        close_mosaic=3,
        seed=arguments.seed,
    )
    export(best, arguments.weights_out)
    size_kb = arguments.weights_out.stat().st_size / 1000
    print(
        f"wrote {arguments.weights_out.name}: {size_kb:.0f} kB, wall {time.time() - wall:.0f} s, "
        f"CPU {time.process_time() - cpu:.0f} s"
    )


if __name__ == "__main__":
    main()
