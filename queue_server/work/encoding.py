"""Writes pictures as an MP4 that browsers play: H.264, yuv420p, its index at the front."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

# Fine enough for every frame rate there is; the usual one for video.
TICKS_PER_S = 90_000
# x264's own scale: 18 is all but lossless, 23 its default. "veryfast" costs a fifth of the default's time for a tenth more bytes.
CRF, PRESET = "23", "veryfast"
_ITU709, _ITU601 = 1, 5  # swscale's numbers
_LIMITED, _FULL = 1, 2  # AVColorRange


class AnnotatedVideo:
    """The video while it is written; to be used by one thread."""

    def __init__(self, path: Path, frame_rate: float, pixel_aspect: Fraction, threads: int) -> None:
        self._path = path
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._pixel_aspect = pixel_aspect
        self._threads = threads
        self._container: Any = None
        self._stream: Any = None
        self._reformatter: Any = None
        self._decoder: Any = None
        self._last_tick = -1

    def add(self, jpeg: bytes, time_s: float) -> None:
        """One more picture, a JPEG, to be seen from `time_s` on; later ones take the first one's size."""
        picture = self._decoded(jpeg)
        if self._container is None:
            self._open(picture)
        frame = self._reformatter.reformat(
            picture,
            width=self._stream.width,
            height=self._stream.height,
            format="yuv420p",
            src_colorspace=_ITU601,
            dst_colorspace=_ITU709,
            src_color_range=_FULL,
            dst_color_range=_LIMITED,
        )
        # Two pictures of one moment (a broken clock in the file) follow each other all the same.
        self._last_tick = max(self._last_tick + 1, round(time_s * TICKS_PER_S))
        frame.pts, frame.time_base = self._last_tick, Fraction(1, TICKS_PER_S)
        frame.pict_type = 0  # which ones are key frames is x264's affair, not the JPEG's, which all are
        self._container.mux(self._stream.encode(frame))

    @property
    def size_bytes(self) -> int:
        """What has been written so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def finish(self, check: Callable[[], None]) -> None:
        """Writes what the encoder still holds, asking `check` at each picture whether to go on, and the index."""
        if self._container is not None:
            for packet in self._stream.codec_context.encode_lazy(None):
                check()
                packet.stream = self._stream
                self._container.mux(packet)
            container, self._container = self._container, None
            container.close()

    def abandon(self) -> None:
        """Closes a file that nobody will read; quick, whatever its size."""
        if self._container is not None:
            from av.error import FFmpegError

            container, self._container = self._container, None
            # Closing moves the whole file to put the index at its front. Of an empty file there is nothing to move.
            if self._path.exists():  # it does not before the encoder's first output
                os.truncate(self._path, 0)
            with suppress(FFmpegError):
                container.close()

    def _open(self, picture: Any) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()
        self._container = av.open(str(self._path), "w", format="mp4", options={"movflags": "faststart"})
        stream: Any = self._container.add_stream("libx264", rate=self._rate, options={"crf": CRF, "preset": PRESET})
        # yuv420p has one colour for two by two pixels.
        stream.width, stream.height = max(2, picture.width // 2 * 2), max(2, picture.height // 2 * 2)
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = stream.time_base = Fraction(1, TICKS_PER_S)
        context.sample_aspect_ratio = self._pixel_aspect
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = _LIMITED, 1, 1, 1
        context.thread_count = self._threads
        self._stream = stream

    def _decoded(self, jpeg: bytes) -> Any:
        from av.codec import CodecContext
        from av.packet import Packet

        if self._decoder is None:
            self._decoder = cast("Any", CodecContext.create("mjpeg", "r"))
            self._decoder.thread_count = 1
        (picture,) = self._decoder.decode(Packet(jpeg))
        return picture
