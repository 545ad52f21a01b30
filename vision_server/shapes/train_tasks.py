"""Trains the models for the other tasks, each from the detector's weights: masks, turned boxes, named points, classes."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vision_server.shapes.task_truth import POINT_NAMES
from vision_server.shapes.train_detector import DETECTOR
from vision_server.shapes.yolo_dataset import (
    CLASSIFIER_SIDE_PX,
    NAMED_POINTS,
    OUTLINES,
    TURNED_BOXES,
    write_scenes,
    write_single_shapes,
)
from vision_server.shapes.yolo_training import ARCHITECTURE, WEIGHTS_FOLDER, Recipe, argument_parser, make

# The last layer, which is all that a model has of its own; as in Ultralytics' yaml files for YOLO11.
HEADS: dict[str, tuple[str, list[Any]]] = {
    "segment": ("Segment", ["nc", 32, 256]),
    "obb": ("OBB", ["nc", 1]),
    "pose": ("Pose", ["nc", "kpt_shape"]),
    "classify": ("Classify", ["nc"]),
}

RECIPES = {
    recipe.task: recipe
    for recipe in (
        Recipe(
            task="segment",
            weights=WEIGHTS_FOLDER / "shapes-segmenter.pt",
            write_dataset=partial(write_scenes, form=OUTLINES),
            epochs_small=5,
            epochs_full=4,
            train_scenes=1500,
            start_from=DETECTOR.weights,
            # Every mask whole, as the truth has it: by default a covering shape would be cut out of the covered one.
            settings={"overlap_mask": False},
        ),
        Recipe(
            task="obb",
            weights=WEIGHTS_FOLDER / "shapes-oriented.pt",
            write_dataset=partial(write_scenes, form=TURNED_BOXES),
            epochs_small=5,
            epochs_full=4,
            train_scenes=1500,
            start_from=DETECTOR.weights,
            # The turn's part of the loss: with Ultralytics' 1 all squares stayed 3.4 degrees askew, for the boxes' part does
            # not see a square's turn.
            settings={"angle": 20.0},
        ),
        Recipe(
            task="pose",
            weights=WEIGHTS_FOLDER / "shapes-pose.pt",
            write_dataset=partial(write_scenes, form=NAMED_POINTS),
            epochs_small=7,
            epochs_full=5,
            train_scenes=1500,
            start_from=DETECTOR.weights,
            # The points' part of the loss, 12 by default: boxes and labels are known already, the points are not.
            settings={"pose": 30.0},
        ),
        Recipe(
            task="classify",
            weights=WEIGHTS_FOLDER / "shapes-classifier.pt",
            write_dataset=write_single_shapes,
            epochs_small=0,
            epochs_full=16,
            train_scenes=1600,
            side_full_px=CLASSIFIER_SIDE_PX,
            rate_full=0.004,
            start_from=DETECTOR.weights,
            # Ultralytics would erase, shear and recolour: a star without its tips or a square sheared is none.
            settings={"auto_augment": None, "erasing": 0.0},
        ),
    )
}


def write_architecture(task: str, folder: Path) -> Path:
    """The detector's network with another last layer, as a yaml that Ultralytics reads.

    A classifier keeps the backbone alone. Every other layer has the detector's name and size, so that its weights fit.
    """
    network = yaml.safe_load(ARCHITECTURE.read_text())
    layer, arguments = HEADS[task]
    if task == "classify":
        network["head"] = [[-1, 1, layer, arguments]]
    else:
        inputs, repeats = network["head"][-1][:2]
        network["head"][-1] = [inputs, repeats, layer, arguments]
    if task == "pose":
        network["kpt_shape"] = [len(POINT_NAMES), 3]
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"{ARCHITECTURE.stem}-{task}.yaml"
    written.write_text(yaml.safe_dump(network))
    return written


def parse_arguments() -> argparse.Namespace:
    """Which task, and the options that every model has."""
    parser = argument_parser(__doc__)
    parser.add_argument("task", choices=sorted(RECIPES))
    return parser.parse_args()


def main() -> None:
    """One command makes one model."""
    arguments = parse_arguments()
    make(RECIPES[arguments.task], write_architecture(arguments.task, arguments.out), arguments)


if __name__ == "__main__":
    main()
