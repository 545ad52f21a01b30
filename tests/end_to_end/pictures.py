"""Scenes that no training has seen, with their truth, as files of every format."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from ai4thai.vision.v1 import detection_pb2, image_pb2
from PIL import Image

from vision_server.shapes.boxes import Found, Truth, matched_boxes
from vision_server.shapes.foreign_scenes import draw_foreign_scene
from vision_server.shapes.scenes import Shape, draw_scene

# Far from the seeds that the models were trained with and measured on.
GENERATOR_SEED = 7_300_000
FOREIGN_SEED = 8_400_000
SIZES_PX = ((640, 480), (480, 640), (512, 512), (800, 600))

# EXIF orientation → how a picture that is to be seen upright is stored under it.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """An RGB image with the shapes in it, left to right."""

    image: Image.Image
    shapes: tuple[Shape, ...]

    @property
    def truth(self) -> list[Truth]:
        """Label and box (x0, y0, x1, y1 in pixels) of every shape."""
        return [(shape.label, shape.box) for shape in self.shapes]

    def resized(self, width_px: int, height_px: int) -> Picture:
        """The same at another size, boxes included."""
        scale = np.array([width_px / self.image.width, height_px / self.image.height] * 2)
        shapes = tuple(
            Shape(s.label, s.colour, tuple((np.array(s.box) * scale).tolist()), (), s.rgb) for s in self.shapes
        )
        return Picture(self.image.resize((width_px, height_px), Image.Resampling.LANCZOS), shapes)

    def fitted(self, side_px: int) -> Picture:
        """The same with its longer side at `side_px`."""
        scale = side_px / max(self.image.size)
        return self.resized(round(self.image.width * scale), round(self.image.height * scale))


@cache
def generated(index: int) -> Picture:
    """A scene of the training generator under a seed of ours."""
    rng = np.random.default_rng(GENERATOR_SEED + index)
    while not (scene := draw_scene(rng, *SIZES_PX[index % len(SIZES_PX)])).shapes:
        pass
    return Picture(Image.fromarray(scene.image), scene.shapes)


@cache
def foreign(index: int, min_shapes: int = 1, max_shapes: int = 5) -> Picture:
    """A flat scene drawn by another hand."""
    scene = draw_foreign_scene(FOREIGN_SEED + index, max_shapes, min_shapes)
    return Picture(scene.image, tuple(Shape(s.label, s.colour, s.box, (), (0, 0, 0)) for s in scene.shapes))


def unseen(count: int) -> list[Picture]:
    """Scenes of both kinds in turn."""
    return [generated(index) if index % 2 else foreign(index) for index in range(count)]


def encoded(image: Image.Image, form: str, **how: Any) -> bytes:
    """The image as a file: `JPEG`, `PNG`, `WEBP`, `BMP`, `TIFF`, `GIF`."""
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def jpeg(image: Image.Image) -> bytes:
    """The image as a JPEG of usual quality."""
    return encoded(image, "JPEG", quality=90)


def turned_jpeg(image: Image.Image, orientation: int) -> bytes:
    """A JPEG whose pixels are stored turned, with the EXIF orientation that makes a viewer show `image`."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    how = STORED_AS[orientation]
    return encoded(image if how is None else image.transpose(how), "JPEG", quality=90, exif=exif)


def as_raw(image: Image.Image) -> image_pb2.Image:
    """The image as bare pixels."""
    rgb = image.convert("RGB")
    raw = image_pb2.RawImage(width_px=rgb.width, height_px=rgb.height, rgb=rgb.tobytes())
    return image_pb2.Image(raw=raw)


def png_bomb(width_px: int, height_px: int) -> bytes:
    """A true, complete PNG of a few kilobytes that would be huge once decoded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(bytes((width_px + 7) // 8 + 1) * height_px, 9)  # one bit a pixel, all black
    header = struct.pack(">IIBBBBB", width_px, height_px, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def found(detections: Sequence[detection_pb2.Detection]) -> list[Found]:
    """Detections as label, confidence, box."""
    return [
        (d.label, d.confidence, (d.box.x_min_px, d.box.y_min_px, d.box.x_max_px, d.box.y_max_px)) for d in detections
    ]


@dataclass
class Agreement:
    """How well detections agree with the truth, over any number of pictures."""

    true_count: int = 0
    found_count: int = 0
    hit_count: int = 0

    def add(self, detections: Sequence[detection_pb2.Detection], truth: Sequence[Truth]) -> None:
        """Counts one picture: a hit has the right label and overlaps its true box by at least a half (IoU)."""
        boxes = found(detections)
        self.true_count += len(truth)
        self.found_count += len(boxes)
        self.hit_count += len(matched_boxes(boxes, truth, 0.5))

    @property
    def recall(self) -> float:
        """Share of the true shapes that were found."""
        return self.hit_count / self.true_count

    @property
    def precision(self) -> float:
        """Share of the found boxes that are true."""
        return self.hit_count / max(1, self.found_count)


def assert_all_found(detections: Sequence[detection_pb2.Detection], picture: Picture) -> None:
    """Every shape found once, with its label, where it is; nothing else."""
    agreement = Agreement()
    agreement.add(detections, picture.truth)
    assert agreement.hit_count == agreement.true_count == agreement.found_count, (found(detections), picture.truth)
