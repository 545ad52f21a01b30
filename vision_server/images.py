"""Turns what callers send into upright RGB pixels, off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from serving.errors import ServiceError
from serving.logs import get_logger
from vision_server.admission import GivenBack, Place
from vision_server.colour import Pixels
from vision_server.decoders import ImageFile, JpegDecoder, quieten
from vision_server.errors import ImageEmpty, ImageError, ImageTooLarge, ImageUnreadable
from vision_server.gpu_decode import find_gpu_decoder
from vision_server.requests import EncodedImage, ImageSource, RawPixels

T = TypeVar("T")
_log = get_logger("images")


@dataclass(frozen=True, slots=True)
class Image:
    """Upright pixels: `rgb` is uint8, rows × columns × 3, contiguous; width_px × height_px is what the caller sent, as seen.

    With a `reduction` of k (2, 4 or 8) `rgb` has ceil(height_px / k) × ceil(width_px / k) pixels, each of which stands for
    k × k of the original's, from the top left on; the last row and column may stand for fewer.
    """

    rgb: Pixels
    width_px: int
    height_px: int
    reduction: int = 1


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image and how long its decoding took, without the wait for a thread."""

    image: Image
    decode_ms: float


class Images:
    """A bounded pool of threads that decode; the decoders release the interpreter lock.

    `gpu` ("cuda:0") decodes plain JPEGs on that device once it is found to be able to; empty: the CPU decodes everything.
    """

    def __init__(self, *, threads: int, max_bytes: int, max_pixels: int, gpu: str = "") -> None:
        self.threads = threads
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._gpu = gpu
        self._gpu_decoder: JpegDecoder | None = None
        self._pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Starts the pool."""
        # Our own limit, checked on the same header, takes the place of Pillow's warning.
        Pillow.MAX_IMAGE_PIXELS = None
        quieten()
        # One image a thread: OpenCV's own threads would only get in the way of the pool's.
        cv2.setNumThreads(1)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        if self._gpu:
            self._pool.submit(self._find_gpu_decoder)

    def stop(self) -> None:
        """Ends the pool; what still waits in it is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    async def decode(
        self, source: ImageSource, place: Place, least_px: int | None = None, *, shorter_side: bool = False
    ) -> Decoded:
        """The upright pixels of an image; where and why they may be fewer, decode_then() says.

        Raises ImageEmpty, ImageTooLarge or ImageUnreadable, and QueueFull when `place` cannot grow by its pixels.
        """
        decoded, _ = await self.decode_then(source, place, lambda image: None, least_px, shorter_side=shorter_side)
        return decoded

    async def decode_then(
        self,
        source: ImageSource,
        place: Place,
        then: Callable[[Image], T],
        least_px: int | None = None,
        *,
        shorter_side: bool = False,
    ) -> tuple[Decoded, T]:
        """Decodes and, in the same thread right after it, calls `then` (the detector's letterbox): one hop less an image.

        `least_px`: the side of the square that it is for. A JPEG far larger comes reduced to a half, a quarter or an eighth
        then, which costs half the time or less, a fraction of the memory and no accuracy (decoders.py has the figures).
        `shorter_side`: its shorter side is to fill that square, the rest is cut off. None: the whole picture.
        """
        if source.size_bytes == 0:
            raise ImageEmpty(source.field)
        if isinstance(source, EncodedImage) and source.size_bytes > self._max_bytes:
            raise ImageTooLarge(
                amount=source.size_bytes, limit=self._max_bytes, unit="bytes", setting="VISION_MAX_IMAGE_BYTES"
            ).at(source.field)
        assert self._pool is not None, "start() comes first"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._work, source, place, then, least_px, shorter_side)

    async def run(self, work: Callable[[], T]) -> T:
        """Runs other work on pixels (drawing, encoding) in the same bounded pool."""
        assert self._pool is not None, "start() comes first"
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _find_gpu_decoder(self) -> None:
        try:
            self._gpu_decoder = find_gpu_decoder(self._gpu)
        except Exception:
            _log.warning("the GPU's JPEG decoder cannot be loaded", device=self._gpu, exc_info=True)
        _log.info("JPEGs are decoded", by=self._gpu if self._gpu_decoder else "cpu")

    def _work(
        self,
        source: ImageSource,
        place: Place,
        then: Callable[[Image], T],
        least_px: int | None,
        shorter_side: bool,
    ) -> tuple[Decoded, T]:
        began_s = time.perf_counter()
        try:
            if isinstance(source, RawPixels):
                image = self._from_raw(source)
            else:
                image = self._from_file(source, place, least_px, shorter_side)
        except ImageError as error:
            raise error.at(source.field) from None
        decoded = Decoded(image, (time.perf_counter() - began_s) * 1000)
        return decoded, then(image)

    def _from_raw(self, source: RawPixels) -> Image:
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

    def _from_file(self, source: EncodedImage, place: Place, least_px: int | None, shorter_side: bool) -> Image:
        try:
            with ImageFile(source.content) as file:
                self._check_pixels(file.width_px * file.height_px)
                reduction = file.reduction(least_px, shorter_side=shorter_side)
                place.grow(file.size_bytes(reduction))
                rgb = file.decode(reduction, self._gpu_decoder)
                if reduction > 1:
                    return Image(rgb, *file.upright_size_px, reduction)
                return Image(rgb, rgb.shape[1], rgb.shape[0])
        except (ServiceError, GivenBack):
            raise
        except UnidentifiedImageError:
            raise ImageUnreadable("The bytes are no image of a kind that is known here.") from None
        except MemoryError:
            raise
        except Exception as error:
            # Decoders meet hostile bytes with exceptions of every kind; all of them mean a broken file.
            raise ImageUnreadable(f"The image is broken: {_without_addresses(error)}.") from None

    def _check_pixels(self, pixels: int) -> None:
        if pixels > self._max_pixels:
            raise ImageTooLarge(amount=pixels, limit=self._max_pixels, unit="pixels", setting="VISION_MAX_IMAGE_PIXELS")
        if pixels < 1:
            raise ImageUnreadable("The image has no pixels.")


def _without_addresses(error: Exception) -> str:
    """The decoder's words, without the memory address of our buffer."""
    words = str(error).split("<_io.")[0].strip().rstrip(".:") or type(error).__name__
    return words[:200]


def decode_threads(wanted: int, core_count: int) -> int:
    """How many threads decode: as set, else as many as cores, at most 8."""
    return wanted or min(core_count, 8)
