"""Decodes a video: its frames, one in so many, upright, each as a JPEG with its moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from queue_server.errors import VideoUnreadable
from queue_server.work.task import Stopped

# Formats that hold everything in one file. FFmpeg also reads lists of other files (HLS, DASH, concat) and opens what they name:
# an uploaded list could have it fetch addresses and files that its sender may not see.
FORMATS = (
    *(
        "mov",
        "mp4",
        "matroska",
        "webm",
        "avi",
        "mpegts",
        "mpeg",
        "mpegvideo",
        "m4v",
        "h264",
        "hevc",
        "av1",
        "obu",
        "ivf",
    ),
    *("flv", "asf", "ogg", "gif", "mxf", "nut", "rm", "dv", "yuv4mpegpipe", "mjpeg", "apng", "wtv"),
)
CURE = "Send an MP4, MOV, MKV, WebM or AVI file with a video stream; `ffprobe` tells what is in it."
# What a file without a rate is taken to have.
FALLBACK_RATE = 25.0
# A frame that comes earlier than the one before it by more than this, or so much later, says that the file's clock was set anew
# (parts that were joined, a broken file): time goes on from there. MP4 cannot keep a frame for longer than 13 hours.
CLOCK_JITTER_S, MAX_GAP_S = 1.0, 12 * 3600.0
# So many damaged places without a frame between them: the rest is none that can be decoded.
MAX_DAMAGED = 1000
# What a file says that it lasts is believed up to a year.
MAX_DURATION_S = 366 * 24 * 3600.0
# Quality of the JPEGs, FFmpeg's qscale: 2 is the best that its encoder gives, about 95 of the usual 100.
JPEG_QSCALE = 2
# From this height on, a video that does not say how its colours are written is taken for HD (ITU-R BT.709), as players do.
HD_HEIGHT_PX = 720
_ITU709, _ITU601 = 1, 5  # swscale's numbers
_BT709, _UNSPECIFIED = 1, 2  # those of AVColorSpace
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: an album's cover is no video


@dataclass(frozen=True)
class Limits:
    """What a video may ask of the worker: pixels of a frame, seconds without one, threads that decode."""

    max_pixels: int
    stall_s: float
    threads: int


@dataclass(frozen=True)
class VideoFacts:
    """What the file says of itself; `frame_count` and `duration_s` are 0 when it does not, sizes are of the picture as seen."""

    width_px: int
    height_px: int
    duration_s: float
    frame_rate: float
    frame_count: int
    pixel_aspect: Fraction


@dataclass(frozen=True)
class Picture:
    """A frame that is looked at. `number` counts the video's frames from 0, `time_s` from the first one's moment."""

    number: int
    time_s: float
    jpeg: bytes
    corrupt: bool


@dataclass(frozen=True)
class Damage:
    """A place where nothing could be decoded."""

    number: int
    time_s: float
    error: VideoUnreadable


class Video:
    """An open video file; its frames are read once. To be used by one thread."""

    def __init__(self, container: Any, stream: Any, limits: Limits, stopped: Callable[[], bool]) -> None:
        self._container = container
        self._stream = stream
        self._limits = limits
        self._stopped = stopped
        self._encoder: _JpegEncoder | None = None
        self._first_s = 0.0
        self._last_s = 0.0
        self.decoded_count = 0
        """Frames decoded so far."""
        self.complete = False
        """Whether the file was read to its end."""
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        self._rate = float(rate) if rate and 0 < rate < 1000 else FALLBACK_RATE

    @property
    def facts(self) -> VideoFacts:
        """What the file says of itself, surer once the frames have been read."""
        context, stream = self._stream.codec_context, self._stream
        aspect = stream.sample_aspect_ratio or Fraction(1)
        size = (context.width, context.height)
        if self._encoder is not None:
            size = (self._encoder.width_px, self._encoder.height_px)
            aspect = 1 / aspect if self._encoder.sideways else aspect
        duration_s = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        if not duration_s and self._container.duration:
            duration_s = self._container.duration / 1_000_000
        if not 0 < duration_s < MAX_DURATION_S:
            duration_s = self._next_s()
        count = self.decoded_count if self.complete else stream.frames or round(duration_s * self._rate)
        return VideoFacts(*size, duration_s, self._rate, max(0, count), aspect)

    def frames(self, stride: int, max_pictures: int) -> Iterator[Picture | Damage]:
        """Every `stride`-th frame, the first included, and every place that could not be decoded, in the file's order.

        Raises:
            VideoUnreadable: there is no frame at all, one is too large, or none comes for too long.
            Stopped: `stopped` became true.
        """
        pictures = 0
        for found in self._decoded():
            if isinstance(found, Damage):
                yield found
                continue
            number, time_s, frame = found
            if number % stride:
                continue
            if pictures == max_pictures:
                return
            pictures += 1
            if self._encoder is None or not self._encoder.fits(frame):
                self._encoder = _JpegEncoder(frame)
            yield Picture(number, time_s, self._encoder.encode(frame), bool(frame.is_corrupt))
        if not self.decoded_count:
            raise VideoUnreadable("No frame of the video can be decoded.", cure=CURE)

    def _decoded(self) -> Iterator[tuple[int, float, Any] | Damage]:
        from av.error import FFmpegError

        packets = self._container.demux(self._stream)
        damaged = 0
        began_s = time.monotonic()
        while damaged < MAX_DAMAGED:
            if self._stopped():
                raise Stopped
            if time.monotonic() - began_s > self._limits.stall_s:
                raise VideoUnreadable(
                    f"No frame of the video came for {self._limits.stall_s:g} s.", cure=CURE, at_s=self._last_s
                )
            try:
                packet = next(packets, None)
            except FFmpegError as error:
                # The file ends in the middle of something, or is broken so that nothing behind can be found.
                yield self._damage(error)
                return
            if packet is None:
                self.complete = True
                return
            try:
                frames = packet.decode()
            except FFmpegError as error:
                damaged += 1
                yield self._damage(error)
                began_s = time.monotonic()
                continue
            for frame in frames:
                check_size(frame.width, frame.height, self._limits.max_pixels)
                yield self.decoded_count, self._moment_s(frame), frame
                self.decoded_count += 1
                # Only now: whoever takes the frames may have taken their time.
                damaged, began_s = 0, time.monotonic()

    def _moment_s(self, frame: Any) -> float:
        """When the frame is to be seen; never before the one ahead of it."""
        at_s = float(frame.pts * frame.time_base) if frame.pts is not None and frame.time_base else None
        if not self.decoded_count:
            self._first_s = at_s or 0.0
            return 0.0
        since_s = self._next_s() if at_s is None else at_s - self._first_s
        if at_s is not None and not self._last_s - CLOCK_JITTER_S <= since_s <= self._last_s + MAX_GAP_S:
            since_s = self._next_s()
            self._first_s = at_s - since_s
        self._last_s = max(self._last_s, since_s)
        return self._last_s

    def _damage(self, error: Exception) -> Damage:
        at_s = self._next_s()
        words = f"The video is damaged: {_words(error)}."
        return Damage(self.decoded_count, at_s, VideoUnreadable(words, at_s=at_s))

    def _next_s(self) -> float:
        return self._last_s + 1 / self._rate if self.decoded_count else 0.0


@contextmanager
def opened(path: Path, limits: Limits, stopped: Callable[[], bool]) -> Iterator[Video]:
    """The file's first video stream.

    Raises:
        VideoUnreadable: the file is none that FFmpeg can read as a video, or its frames are too large.
    """
    import av
    from av.error import FFmpegError

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        container = av.open(
            str(path), "r", container_options=options, timeout=limits.stall_s, metadata_errors="replace"
        )
    except (FFmpegError, ValueError, OSError) as error:
        raise VideoUnreadable(f"The file is no video that can be read: {_words(error)}.", cure=CURE) from error
    with container:
        streams = [one for one in container.streams.video if not int(one.disposition) & _ATTACHED_PICTURE]
        if not streams:
            raise VideoUnreadable("The file has no video in it.", cure=CURE)
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoUnreadable("The video is written in a way that cannot be decoded here.", cure=CURE)
        check_size(stream.codec_context.width, stream.codec_context.height, limits.max_pixels)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = limits.threads
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        yield Video(container, stream, limits, stopped)


def check_size(width_px: int, height_px: int, max_pixels: int) -> None:
    """Raises VideoUnreadable for frames that are too large."""
    if width_px * height_px > max_pixels:
        raise VideoUnreadable(
            f"The video's frames have {width_px} × {height_px} pixels; the limit is {max_pixels} pixels.",
            cure="Send a smaller one, or raise QUEUE_VIDEO_MAX_PIXELS.",
        )


class _JpegEncoder:
    """Turns frames of one size and form upright and writes them as JPEG."""

    def __init__(self, frame: Any) -> None:
        from av.video.reformatter import VideoReformatter

        self._form = _form(frame)
        self._reformatter = VideoReformatter()
        turn = round(frame.rotation / 90) % 4  # quarter turns against the clock
        self.sideways = turn % 2 == 1
        self.width_px, self.height_px = (frame.height, frame.width) if self.sideways else (frame.width, frame.height)
        self._turning = _turning(frame, turn) if turn else None
        hd = frame.colorspace == _BT709 or (frame.colorspace == _UNSPECIFIED and frame.height >= HD_HEIGHT_PX)
        self._colours = _ITU709 if hd else _ITU601
        self._context = _jpeg_context(self.width_px, self.height_px)
        self._count = 0

    def fits(self, frame: Any) -> bool:
        """Whether the frame has the size and form that this encoder is for."""
        return bool(_form(frame) == self._form)

    def encode(self, frame: Any) -> bytes:
        """The frame as a JPEG file, as it is to be seen."""
        even = self._reformatter.reformat(
            frame, format="yuvj420p", src_colorspace=self._colours, dst_colorspace=_ITU601, dst_color_range=2
        )
        if self._turning is not None:
            self._turning.vpush(even)
            even = self._turning.vpull()
        even.pts, even.time_base = self._count, Fraction(1, 25)  # the encoder wants times that grow
        self._count += 1
        return b"".join(bytes(packet) for packet in self._context.encode(even))


def _form(frame: Any) -> tuple[object, ...]:
    return (frame.width, frame.height, frame.format.name, frame.rotation, frame.colorspace)


def _jpeg_context(width_px: int, height_px: int) -> Any:
    from av.codec import CodecContext

    context = cast("Any", CodecContext.create("mjpeg", "w"))
    context.width, context.height, context.pix_fmt = width_px, height_px, "yuvj420p"
    context.time_base = Fraction(1, 25)
    context.qmin = context.qmax = JPEG_QSCALE
    context.color_range = 2
    context.thread_count = 1
    return context


def _turning(frame: Any, turn: int) -> Any:
    from av.filter import Graph
    from av.video.format import VideoFormat

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=VideoFormat("yuvj420p", frame.width, frame.height),
        time_base=Fraction(1, 25),
    )
    steps = {1: ["transpose=cclock"], 2: ["hflip", "vflip"], 3: ["transpose=clock"]}[turn]
    filters = [graph.add(*step.split("=")) for step in steps]
    graph.link_nodes(source, *filters, graph.add("buffersink"))
    graph.configure()
    return graph


def _words(error: BaseException) -> str:
    """FFmpeg's own words, without the path of the temporary file."""
    return str(getattr(error, "strerror", None) or type(error).__name__)


def picture_count(facts: VideoFacts, stride: int, max_pictures: int) -> int:
    """How many frames are going to be looked at, 0 when that is unknown."""
    return min(max_pictures, math.ceil(facts.frame_count / stride))
