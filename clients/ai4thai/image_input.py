"""Turns what callers hold as an image (path, bytes, array, Pillow image) into what goes over the wire."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable


@runtime_checkable
class ArrayLike(Protocol):
    """An H x W x 3 array of uint8, red green blue, such as numpy's; numpy itself isn't needed here."""

    @property
    def shape(self) -> Any:
        """Height, width, 3."""

    @property
    def dtype(self) -> Any:
        """uint8."""

    def tobytes(self) -> bytes:
        """The bytes row by row."""


@runtime_checkable
class PillowLike(Protocol):
    """A PIL.Image.Image; Pillow itself isn't needed here."""

    @property
    def size(self) -> tuple[int, int]:
        """Width, height."""

    @property
    def mode(self) -> Any:
        """`RGB`, `L`, …."""

    def convert(self, mode: str) -> Any:
        """The image in another mode."""

    def tobytes(self) -> bytes:
        """The bytes row by row."""


ImageInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | ArrayLike | PillowLike
"""A path, a whole file's bytes, an H x W x 3 uint8 array in RGB order (OpenCV's is BGR: turn it), or a Pillow image."""


@dataclass(frozen=True)
class FileImage:
    """A whole file: JPEG, PNG, WebP, BMP, TIFF or GIF."""

    content: bytes


@dataclass(frozen=True)
class RawPixels:
    """Bare pixels, three bytes (red, green, blue) each, row by row."""

    width_px: int
    height_px: int
    rgb: bytes


def read_image(image: ImageInput) -> FileImage | RawPixels:
    """Reads an image for a direct call; pixels stay pixels.

    Raises:
        OSError: the file can't be read.
        TypeError, ValueError: not an image of a known kind, or an array of another shape or type.
    """
    if isinstance(image, str | os.PathLike):
        return FileImage(Path(image).read_bytes())
    if isinstance(image, bytes | bytearray | memoryview):
        return FileImage(bytes(image))
    if isinstance(image, PillowLike):
        return _pixels_of_pillow(image)
    if isinstance(image, ArrayLike):
        return _pixels_of_array(image)
    raise TypeError(
        f"An image is a path, bytes, an H x W x 3 uint8 array or a Pillow image, not {type(image).__name__}."
    )


def read_file(image: ImageInput) -> bytes:
    """Reads an image for a job, which takes files only: pixels are written as PNG, for which Pillow is needed.

    Raises:
        OSError: the file can't be read.
        TypeError, ValueError: as in read_image; ValueError also when Pillow is needed and missing.
    """
    read = read_image(image)
    if isinstance(read, FileImage):
        return read.content
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("A job takes image files. To send pixels, install pillow, or pass the file's bytes.") from None
    buffer = io.BytesIO()
    Image.frombytes("RGB", (read.width_px, read.height_px), read.rgb).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _pixels_of_array(array: ArrayLike) -> RawPixels:
    shape, kind = tuple(array.shape), str(array.dtype)
    if len(shape) != 3 or shape[2] != 3 or kind != "uint8":
        raise ValueError(
            f"The array has shape {shape} and type {kind}; it must be height x width x 3 of uint8, red green blue."
        )
    return RawPixels(width_px=int(shape[1]), height_px=int(shape[0]), rgb=array.tobytes())


def _pixels_of_pillow(image: PillowLike) -> RawPixels:
    from PIL import Image, ImageOps  # whoever holds a Pillow image has Pillow

    if not isinstance(image, Image.Image):
        raise TypeError(f"An image is a path, bytes, an array or a Pillow image, not {type(image).__name__}.")
    # A photograph that Pillow opened still lies as the camera lay; its file's bytes would be turned by the server.
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return RawPixels(width_px=upright.width, height_px=upright.height, rgb=upright.tobytes())
