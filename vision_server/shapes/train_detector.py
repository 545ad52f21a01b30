"""Trains the shape detector from drawn scenes."""

from functools import partial

from vision_server.shapes.yolo_dataset import BOXES, write_scenes
from vision_server.shapes.yolo_training import ARCHITECTURE, WEIGHTS_FOLDER, Recipe, argument_parser, make

DETECTOR = Recipe(
    task="detect",
    weights=WEIGHTS_FOLDER / "shapes-detector.pt",
    write_dataset=partial(write_scenes, form=BOXES),
    epochs_small=12,
    epochs_full=9,
    train_scenes=3000,
)


def main() -> None:
    """One command makes the model."""
    make(DETECTOR, ARCHITECTURE, argument_parser(__doc__).parse_args())


if __name__ == "__main__":
    main()
