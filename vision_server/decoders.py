"""Reads image files: their header first, then upright RGB pixels, whole or reduced."""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
from collections.abc import Callable
from typing import Protocol

import cv2
import numpy as np
import simplejpeg
from PIL import Image as Pillow
from PIL import ImageFile as PillowFile
from PIL import _imaging

# Taken before Ultralytics replaces it in PIL.Image by one that looks for HEIF plugins.
from PIL.Image import open as open_image
from PIL.JpegImagePlugin import JpegImageFile

from vision_server.colour import GREY, RGB, Pixels, to_rgb, to_srgb
from vision_server.errors import ImageUnreadable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

# What the JPEG decoder can leave out while it decodes: only a half, a quarter or an eighth of the picture's frequencies.
REDUCTIONS = (8, 4, 2)
# Shrunk on from less than this, a picture is blurred twice. Measured with the shipped detector on drawn scenes of 640 to 2880
# px, against bilinear from the whole picture (mAP50-95 0.82, give or take 0.003): a reduced side of exactly the model's or of
# 1.25 times and more is within 0.004, as cv2.INTER_AREA is within 0.006; between 1 and 1.1 times it is up to 0.012 lower.
_MARGIN = 1.25

_START_OF_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN = b"\xff\xda"
_END_OF_JPEG = b"\xff\xd9"
# Encoders write 10, optimisers up to 20. A scan of 75 bytes can cost a tenth of a second at 50 megapixels.
_MAX_SCANS = 50

_ORIENTATION = 0x0112
# Turns and mirrors that EXIF's orientations ask for.
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda rgb: cv2.flip(rgb, 1),
    3: lambda rgb: cv2.rotate(rgb, cv2.ROTATE_180),
    4: lambda rgb: cv2.flip(rgb, 0),
    5: cv2.transpose,
    6: lambda rgb: cv2.rotate(rgb, cv2.ROTATE_90_CLOCKWISE),
    7: lambda rgb: cv2.flip(cv2.transpose(rgb), -1),
    8: lambda rgb: cv2.rotate(rgb, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def quieten() -> None:
    """Silences what hostile files make Pillow and libtiff print: it belongs into the caller's answer, where it is said too."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # Pillow has no way to it but the library that it brings; where that is built in otherwise, libtiff goes on printing.
    set_handler = getattr(ctypes.CDLL(_imaging.__file__), "TIFFSetErrorHandler", None)
    if set_handler is not None:
        set_handler(None)


class JpegDecoder(Protocol):
    """Another decoder for plain JPEGs, such as a GPU's."""

    def decode(self, content: bytes, width_px: int, height_px: int, reduction: int) -> Pixels | None:
        """The pixels as stored, not turned; None when it cannot: then the CPU does it."""


class ImageFile:
    """An image file whose header has been read; use it with `with`.

    The constructor and decode() raise ImageUnreadable, or whatever Pillow raises for hostile bytes.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._file = io.BytesIO(content)
        # A photo in several pictures (MPO) begins like any JPEG and is read as one.
        self.is_jpeg = content.startswith(_START_OF_JPEG)
        self._opened: PillowFile.ImageFile = (
            JpegImageFile(self._file) if self.is_jpeg else open_image(self._file, formats=FORMATS)
        )
        self._scan_offset = self._file.tell()  # of a JPEG: where the picture's own data begin
        # As stored, before it is turned.
        self.width_px, self.height_px = self._opened.size
        self._orientation = _orientation(self._opened) if self.is_jpeg else 1

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def upright_size_px(self) -> tuple[int, int]:
        """Width and height as seen, of a JPEG; other files tell theirs when they are decoded."""
        turned = self._orientation >= 5
        return (self.height_px, self.width_px) if turned else (self.width_px, self.height_px)

    def reduction(self, least_px: int | None, *, shorter_side: bool = False) -> int:
        """8, 4, 2 or 1: how many times smaller it may come for a model that wants `least_px`.

        What counts is the longer side, or the shorter one where that will fill the model's square. None: 1, the whole picture.
        Only JPEGs can be reduced.
        """
        if least_px is None or not self.is_jpeg:
            return 1
        shorter_px, longer_px = sorted((self.width_px, self.height_px))
        side_px = shorter_px if shorter_side else longer_px
        for reduction in REDUCTIONS:
            wanted_px = least_px * reduction
            enough = shorter_px >= reduction and (side_px == wanted_px or side_px >= wanted_px * _MARGIN)
            # What does not fill the last reduced pixel must stay at the right and at the bottom: see Image.
            whole = self.width_px % reduction == 0 and self.height_px % reduction == 0
            if enough and (whole or self._orientation in (1, 5)):
                return reduction
        return 1

    def size_bytes(self, reduction: int = 1) -> int:
        """What decode() gives, without decoding."""
        return -(-self.width_px // reduction) * -(-self.height_px // reduction) * 3

    def decode(self, reduction: int = 1, other: JpegDecoder | None = None) -> Pixels:
        """Upright sRGB, height × width × 3, contiguous; with a `reduction` of ceil(size / reduction)."""
        if not self.is_jpeg:
            rgb = self._load()
            return _upright(rgb, _orientation(self._opened))  # after load(): Pillow turns TIFFs itself
        self._check_scans()
        plain = self._decode_plain(reduction, other) if self._opened.mode in ("RGB", "L") else None
        return _upright(self._load(reduction) if plain is None else plain, self._orientation)

    def _check_scans(self) -> None:
        # Decoders fill what is missing of a truncated file with grey and say nothing. A 0xFF inside the picture's data is
        # always followed by 0, so these two bytes after the header are the end marker and nothing else.
        if self._content.rfind(_END_OF_JPEG, self._scan_offset) < 0:
            raise ImageUnreadable("The JPEG is truncated: its end is missing.", cure="Send the whole file.")
        if "progressive" in self._opened.info:
            scans = 1 + self._content.count(_START_OF_SCAN, self._scan_offset)
            if scans > _MAX_SCANS:
                raise ImageUnreadable(f"The JPEG has {scans:,} scans; at most {_MAX_SCANS} are decoded.")

    def _decode_plain(self, reduction: int, other: JpegDecoder | None) -> Pixels | None:
        """A colour or grey JPEG, not turned; None where Pillow must do it."""
        rgb = other.decode(self._content, self.width_px, self.height_px, reduction) if other else None
        if rgb is None:
            width_px, height_px = -(-self.width_px // reduction), -(-self.height_px // reduction)
            try:
                # Not strict: what a camera's firmware leaves between the segments is no reason to refuse its pictures.
                rgb = simplejpeg.decode_jpeg(
                    self._content, "RGB", min_width=width_px, min_height=height_px, strict=False
                )
            except ValueError:
                # Rare ways of sampling colours only Pillow's decoder knows; of a broken file it says what is wrong.
                return None
        space = GREY if self._opened.mode == "L" else RGB
        return to_srgb(rgb, self._opened.info.get("icc_profile"), space)

    def _load(self, reduction: int = 1) -> Pixels:
        if reduction > 1:
            self._opened.draft(None, (self.width_px // reduction, self.height_px // reduction))
        self._opened.load()  # the first frame; raises where data are missing
        return to_rgb(self._opened)


def _upright(rgb: Pixels, orientation: int) -> Pixels:
    turn = _UPRIGHT.get(orientation)
    return np.ascontiguousarray(turn(rgb)) if turn else rgb


def _orientation(opened: Pillow.Image) -> int:
    try:
        orientation = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken note about a picture does not break the picture
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
