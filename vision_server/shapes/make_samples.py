"""Draws the sample pictures and the sample clip that the demo client ships."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from vision_server.shapes.foreign_scenes import draw_foreign_scene
from vision_server.shapes.questions import describe
from vision_server.shapes.scenes import DESCRIBER_STYLE, Shape, draw_scene

SAMPLES = Path(__file__).parents[2] / "clients" / "ai4thai" / "samples"
MAX_BYTES = 60_000
CLIP_SEED = 5003
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Sample:
    """Which drawer, which seed, which size, which file. `seed` was picked by eye among the first few."""

    name: str
    drawer: str
    seed: int
    size_px: tuple[int, int] = (480, 360)
    shape_count: int | None = None


# The first is the README's picture: light, clean, four different shapes.
WANTED = (
    Sample("scene-01.jpg", "foreign", 7436, shape_count=4),
    Sample("scene-02.jpg", "generator", 5001),
    Sample("scene-03.jpg", "foreign", 4011),
    Sample("scene-04.png", "foreign", 4003),
    Sample("scene-05.webp", "generator", 5021),
    Sample("scene-06.jpg", "generator", 5012, (480, 480)),
    Sample("scene-07.png", "foreign", 4006),
    Sample("scene-08.jpg", "generator", 5003, (360, 480)),
    Sample("scene-09.webp", "foreign", 4020),
    Sample("scene-10.jpg", "generator", 5014, (640, 360)),
)


def draw(sample: Sample) -> tuple[Image.Image, tuple[Shape, ...]]:
    """The picture, no larger than 640 px, with its shapes left to right."""
    if sample.drawer == "generator":
        scene = draw_scene(np.random.default_rng(sample.seed), *sample.size_px, DESCRIBER_STYLE)
        return Image.fromarray(scene.image), scene.shapes
    count = sample.shape_count
    foreign = draw_foreign_scene(sample.seed, count, count) if count else draw_foreign_scene(sample.seed)
    image = foreign.image
    scale = min(1.0, 640 / max(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    shapes = []
    for shape in foreign.shapes:
        x0, y0, x1, y1 = (edge * scale for edge in shape.box)
        shapes.append(Shape(shape.label, shape.colour, (x0, y0, x1, y1), (), (0, 0, 0)))
    return image, tuple(shapes)


def truth(sample: Sample, image: Image.Image, shapes: tuple[Shape, ...]) -> dict[str, object]:
    """What samples.json says about one file; boxes are x0, y0, x1, y1 in pixels."""
    return {
        "file": sample.name,
        "drawer": sample.drawer,
        "seed": sample.seed,
        "width_px": image.width,
        "height_px": image.height,
        "shapes": [
            {"label": shape.label, "colour": shape.colour, "box": [round(edge, 1) for edge in shape.box]}
            for shape in shapes
        ],
        "description": {language: describe(shapes, language) for language in ("en", "th")},
    }


def save(image: Image.Image, path: Path) -> None:
    """Write one picture; ValueError if its file is too large to ship."""
    if path.suffix == ".png":
        # Flat pictures have few colours: a palette keeps the file small.
        image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        image.save(path, quality=JPEG_QUALITY)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path.name} is {size} bytes; the limit is {MAX_BYTES}. Choose another seed or size.")


def write_clip(path: Path) -> None:
    """A camera that wanders over a wide scene: shapes come into sight, move, and leave it. Three seconds of H.264."""
    width_px, height_px, frames = 400, 360, 45
    wide = draw_scene(np.random.default_rng(CLIP_SEED), 960, height_px, DESCRIBER_STYLE).image
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=15, options={"crf": "23", "preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        for number in range(frames):
            left = round((wide.shape[1] - width_px) * number / (frames - 1))
            view = np.ascontiguousarray(wide[:, left : left + width_px])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    """Draw them all, then write their truth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SAMPLES)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_clip(out / "clip-01.mp4")
    entries = []
    for sample in WANTED:
        image, shapes = draw(sample)
        save(image, out / sample.name)
        entries.append(truth(sample, image, shapes))
    (out / "samples.json").write_text(json.dumps({"samples": entries}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
