"""Trains a YOLO model on drawn scenes, first small and then at full size, and exports it for shipping."""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vision_server.shapes.yolo_dataset import IMAGE_SIDE_PX, Amounts
from vision_server.torchvision_ops import install

HERE = Path(__file__).parent
ARCHITECTURE = HERE / "yolo11p.yaml"
WEIGHTS_FOLDER = HERE / "weights"


@dataclass(frozen=True)
class Recipe:
    """How one model is made. `task` is Ultralytics' name for it; epochs, sides and rates are of the small and full stage."""

    task: str
    weights: Path
    write_dataset: Callable[[Path, Amounts], Path]
    epochs_small: int
    epochs_full: int
    train_scenes: int
    side_small_px: int = 160
    side_full_px: int = IMAGE_SIDE_PX
    rate_small: float = 0.004
    rate_full: float = 0.002
    # None: from random weights.
    start_from: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def _kept_arguments(task: str, architecture: Path, side_px: int) -> dict[str, Any]:
    """What a checkpoint keeps of its training arguments: enough to load it, nothing about where it was made."""
    return {
        "task": task,
        "mode": "train",
        "model": architecture.name,
        "data": "shapes.yaml",
        "imgsz": side_px,
        "single_cls": False,
    }


def train_stage(
    architecture: Path, dataset: Path, out: Path, name: str, weights: Path | None, settings: Mapping[str, Any]
) -> Path:
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
        "batch": 32,
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
    YOLO(str(architecture)).train(**arguments | dict(settings))
    return out / name / "weights" / "best.pt"


def export(checkpoint: Path, target: Path, kept_arguments: Mapping[str, Any]) -> None:
    """Write a half-precision inference checkpoint that names no path of the machine it was trained on."""
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = (loaded.get("ema") or loaded["model"]).half()
    model.args = dict(kept_arguments)
    model.yaml["yaml_file"] = kept_arguments["model"]
    for parameter in model.parameters():
        parameter.requires_grad = False
    # A classifier's `transforms` are torchvision's: without them it loads where torchvision does not, and Ultralytics makes
    # the same ones from the input side.
    for attribute in ("criterion", "pt_path", "transforms"):
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
        "train_args": dict(kept_arguments),
        "version": loaded["version"],
        "license": loaded.get("license"),
        "date": None,
    }
    torch.save(kept, target)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every model has; where one is None, the recipe says it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder for the data and the runs")
    parser.add_argument("--weights-out", type=Path, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--train-scenes", type=int)
    parser.add_argument("--val-scenes", type=int, default=300)
    parser.add_argument("--epochs-small", type=int, help="epochs at the small side, where most is learnt cheaply")
    parser.add_argument("--epochs-full", type=int, help="epochs at the full side")
    parser.add_argument("--resume-from", type=Path, help="skip the small stage and start from this checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def prepare_ultralytics(out: Path, threads: int) -> None:
    """To be called before ultralytics is imported: its settings go to scratch, nothing is fetched or installed."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        YOLO_CONFIG_DIR=str(out.resolve()), YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", OMP_NUM_THREADS=str(threads)
    )
    install()
    torch.set_num_threads(threads)


def make(recipe: Recipe, architecture: Path, arguments: argparse.Namespace) -> None:
    """Draw, train small, train full, export. A stage of 0 epochs is left out."""
    prepare_ultralytics(arguments.out, arguments.threads)
    wall, cpu = time.time(), time.process_time()

    def chosen(name: str) -> Any:
        given = getattr(arguments, name)
        return getattr(recipe, name) if given is None else given

    amounts = Amounts(chosen("train_scenes"), arguments.val_scenes, arguments.seed)
    dataset = recipe.write_dataset(arguments.out / "data", amounts)
    # Name, epochs, side, rate at the beginning, epochs at the end without mosaics.
    stages = [
        ("small", chosen("epochs_small"), recipe.side_small_px, recipe.rate_small, 2),
        ("full", chosen("epochs_full"), recipe.side_full_px, recipe.rate_full, 3),
    ]
    if arguments.resume_from:
        del stages[0]
    best, trained_px = arguments.resume_from or recipe.start_from, recipe.side_full_px
    for name, epochs, side_px, rate, close_mosaic in stages:
        if not epochs:
            continue
        settings = {
            "imgsz": side_px,
            "lr0": rate,
            "epochs": epochs,
            "close_mosaic": close_mosaic,
            "seed": arguments.seed,
        }
        best = train_stage(architecture, dataset, arguments.out, name, best, settings | dict(recipe.settings))
        trained_px = side_px
    if best is None:
        raise SystemExit("nothing to do: no epochs, and no checkpoint to start from")
    target = arguments.weights_out or recipe.weights
    export(best, target, _kept_arguments(recipe.task, architecture, trained_px))
    print(
        f"wrote {target.name}: {target.stat().st_size / 1000:.0f} kB, wall {time.time() - wall:.0f} s, "
        f"CPU {time.process_time() - cpu:.0f} s"
    )
