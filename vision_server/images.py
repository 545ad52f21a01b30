"""Turns what callers send into upright RGB pixels, off the event loop."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

# Taken before Ultralytics replaces it in PIL.Image by one that looks for HEIF plugins.
from PIL.Image import open as open_image

from serving.errors import ServiceError
from vision_server.admission import GivenBack, Place
from vision_server.errors import ImageEmpty, ImageError, ImageTooLarge, ImageUnreadable
from vision_server.requests import EncodedImage, ImageSource, RawPixels

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
END_OF_JPEG = b"\xff\xd9"

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Image:
    """Upright pixels: `rgb` is uint8, height_px × width_px × 3, contiguous."""

    rgb: Pixels
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image and how long its decoding took, without the wait for a thread."""

    image: Image
    decode_ms: float


class Images:
    """A bounded pool of threads that decode; the decoders release the interpreter lock."""

    def __init__(self, *, threads: int, max_bytes: int, max_pixels: int) -> None:
        self._threads = threads
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Starts the pool."""
        # Our own limit, checked on the same header, takes the place of Pillow's warning.
        Pillow.MAX_IMAGE_PIXELS = None
        # One image a thread: OpenCV's own threads would only get in the way of the pool's.
        cv2.setNumThreads(1)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")

    def stop(self) -> None:
        """Ends the pool; what still waits in it is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    async def decode(self, source: ImageSource, place: Place) -> Decoded:
        """The upright pixels of an image.

        Raises ImageEmpty, ImageTooLarge or ImageUnreadable, and QueueFull when `place` cannot grow by its pixels.
        """
        decoded, _ = await self.decode_then(source, place, lambda image: None)
        return decoded

    async def decode_then(self, source: ImageSource, place: Place, then: Callable[[Image], T]) -> tuple[Decoded, T]:
        """Decodes and, in the same thread right after it, calls `then` (the detector's letterbox): one hop less an image."""
        if source.size_bytes == 0:
            raise ImageEmpty(source.field)
        if isinstance(source, EncodedImage) and source.size_bytes > self._max_bytes:
            raise ImageTooLarge(
                amount=source.size_bytes, limit=self._max_bytes, unit="bytes", setting="VISION_MAX_IMAGE_BYTES"
            ).at(source.field)
        assert self._pool is not None, "start() comes first"
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._work, source, place, then)

    async def run(self, work: Callable[[], T]) -> T:
        """Runs other work on pixels (drawing, encoding) in the same bounded pool."""
        assert self._pool is not None, "start() comes first"
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _work(self, source: ImageSource, place: Place, then: Callable[[Image], T]) -> tuple[Decoded, T]:
        began_s = time.perf_counter()
        try:
            image = self._from_raw(source, place) if isinstance(source, RawPixels) else self._from_file(source, place)
        except ImageError as error:
            raise error.at(source.field) from None
        decoded = Decoded(image, (time.perf_counter() - began_s) * 1000)
        return decoded, then(image)

    def _from_raw(self, source: RawPixels, place: Place) -> Image:
        if source.width_px < 1 or source.height_px < 1:
            raise ImageUnreadable(
                f"A raw image of {source.width_px} × {source.height_px} pixels cannot be.",
                cure="width_px and height_px are at least 1.",
            )
        self._check_pixels(source.width_px * source.height_px)
        expected_bytes = source.width_px * source.height_px * 3
        if len(source.rgb) != expected_bytes:
            raise ImageUnreadable(
                f"The raw image has {len(source.rgb):,} bytes; {source.width_px} × {source.height_px} × 3 is {expected_bytes:,}.",
                cure="Send three bytes a pixel, without padding.",
            )
        # No copy: the pixels are the message's own bytes, which the place counts already.
        rgb = np.frombuffer(source.rgb, np.uint8).reshape(source.height_px, source.width_px, 3)
        return Image(rgb, source.width_px, source.height_px)

    def _from_file(self, source: EncodedImage, place: Place) -> Image:
        file = io.BytesIO(source.content)
        try:
            with open_image(file, formats=FORMATS) as header:
                self._check_pixels(header.width * header.height)
                place.grow(header.width * header.height * 3)
                if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
                    rgb = _decode_jpeg(source.content, scan_offset=file.tell())
                else:
                    rgb = _decode_with_pillow(header)
        except (ServiceError, GivenBack):
            raise
        except UnidentifiedImageError:
            raise ImageUnreadable("The bytes are no image in a format that is known here.") from None
        except MemoryError:
            raise
        except Exception as error:
            # Decoders meet hostile bytes with exceptions of every kind; all of them mean a broken file.
            raise ImageUnreadable(f"The image is broken: {_without_addresses(error)}.") from None
        return Image(rgb, rgb.shape[1], rgb.shape[0])

    def _check_pixels(self, pixels: int) -> None:
        if pixels > self._max_pixels:
            raise ImageTooLarge(amount=pixels, limit=self._max_pixels, unit="pixels", setting="VISION_MAX_IMAGE_PIXELS")
        if pixels < 1:
            raise ImageUnreadable("The image has no pixels.")


def _decode_jpeg(content: bytes, scan_offset: int) -> Pixels:
    # OpenCV fills what is missing of a truncated file with grey and says nothing. A 0xFF inside the picture's data is
    # always followed by 0, so these two bytes after the header are the end marker and nothing else.
    if content.rfind(END_OF_JPEG, scan_offset) < 0:
        raise ImageUnreadable("The JPEG is truncated: its end is missing.", cure="Send the whole file.")
    rgb = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)  # turned as EXIF says
    if rgb is None:
        raise ImageUnreadable("The JPEG cannot be decoded.")
    return rgb  # type: ignore[no-any-return]


def _decode_with_pillow(opened: Pillow.Image) -> Pixels:
    opened.load()  # the first frame; raises where data is missing
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        # 16 bits a pixel; Pillow's own conversion would clip at 255 and turn the picture white.
        grey = (np.asarray(upright).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=2))
    if upright.mode == "F":
        raise ImageUnreadable("The image has floating-point pixels.", cure="Send 8 or 16 bits a channel.")
    if upright.has_transparency_data:
        # What is transparent looks white, as in a viewer; the hidden colour below it can be anything.
        with_alpha = upright.convert("RGBA")
        backdrop = Pillow.new("RGBA", with_alpha.size, "white")
        backdrop.alpha_composite(with_alpha)
        upright = backdrop
    return np.array(upright.convert("RGB"))


def _without_addresses(error: Exception) -> str:
    """The decoder's words, without the memory address of our buffer."""
    words = str(error).split("<_io.")[0].strip().rstrip(".:") or type(error).__name__
    return words[:200]


def decode_threads(wanted: int, core_count: int) -> int:
    """How many threads decode: as set, else as many as cores, at most 8."""
    return wanted or min(core_count, 8, os.cpu_count() or 1)
