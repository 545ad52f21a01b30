"""Decodes JPEGs on an NVIDIA GPU: whoever's turn it is decodes for all threads that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

from vision_server.colour import Pixels

if TYPE_CHECKING:
    import torch

# JPEG files, uint8 of one dimension each, to pictures of 3 × height × width on the device; raises when one cannot be decoded.
DecodeAll = Callable[[Sequence["torch.Tensor"]], Sequence["torch.Tensor"]]


class _Wanted:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.done = False
        self.picture: torch.Tensor | None = None


class GpuDecoder:
    """nvJPEG decodes several files at once faster than one after the other; decode() is for any number of threads.

    `on_stream` gives the context in which the GPU is used.
    """

    def __init__(
        self, decode_all: DecodeAll, on_stream: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._decode_all = decode_all
        self._on_stream = on_stream
        self._waiting: list[_Wanted] = []
        self._waiting_lock = threading.Lock()
        self._turn = threading.Lock()

    def decode(self, content: bytes, width_px: int, height_px: int, reduction: int) -> Pixels | None:
        """As decoders.JpegDecoder says; None for a file that the GPU refuses or has no memory for."""
        wanted = _Wanted(content)
        with self._waiting_lock:
            self._waiting.append(wanted)
        with self._turn:
            # Another thread may have decoded it while this one waited for its turn.
            if not wanted.done:
                with self._waiting_lock:
                    batch, self._waiting = self._waiting, []
                with self._on_stream():
                    self._decode(batch)
        picture = wanted.picture
        if picture is None or tuple(picture.shape) != (3, height_px, width_px):
            return None
        try:
            with self._on_stream():
                return _to_host(picture, reduction)
        except Exception:  # out of memory, or a lost device, which the detector reports
            return None

    def _decode(self, batch: Sequence[_Wanted]) -> None:
        import torch

        try:
            # The copies are writable, which torch wants of memory that it shares.
            files = [torch.from_numpy(np.frombuffer(wanted.content, np.uint8).copy()) for wanted in batch]
            for wanted, picture in zip(batch, self._decode_all(files), strict=True):
                wanted.picture, wanted.done = picture, True
        except Exception:
            # One bad file spoils the whole call: each alone, then. One that fails alone is the CPU's.
            if len(batch) > 1:
                for wanted in batch:
                    self._decode([wanted])
            else:
                batch[0].done = True


def find_gpu_decoder(device: str) -> GpuDecoder | None:
    """The decoder of `device` ("cuda:0"); None where there is no CUDA, or torchvision was built without nvJPEG.

    Takes seconds the first time: off the event loop.
    """
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    from torchvision.io import ImageReadMode, decode_jpeg

    # A stream of its own: on the common one every picture would wait for the batches that the detector runs.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    decoder = GpuDecoder(
        lambda files: decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device),
        on_stream=lambda: torch.cuda.stream(stream),
    )
    example = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    return decoder if decoder.decode(example, 16, 16, 1) is not None else None


def _to_host(picture: torch.Tensor, reduction: int) -> Pixels:
    """Height × width × 3 in the host's memory; reduced as the CPU's decoder does, by the mean of what becomes one pixel."""
    import torch

    if reduction > 1:
        mean = torch.nn.functional.avg_pool2d(picture.float(), reduction, ceil_mode=True)
        picture = mean.round_().to(torch.uint8)
    return picture.permute(1, 2, 0).contiguous().cpu().numpy()
