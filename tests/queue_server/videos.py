"""Small videos with a blue disc that moves to the right and a red corner at the top left."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw

SIZE_PX = (160, 120)
DISC_PX = 40
STEP_PX = 3
FRAME_MS = 40


def left_px(number: int) -> int:
    """Where the disc's left edge is in a frame."""
    return 10 + STEP_PX * number


def picture(number: int, size_px: tuple[int, int] = SIZE_PX) -> Image.Image:
    image = Image.new("RGB", size_px, (225, 225, 225))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 19, 19), fill=(220, 0, 0))
    pen.ellipse((left_px(number), 50, left_px(number) + DISC_PX, 50 + DISC_PX), fill=(30, 50, 220))
    return image


def write_video(
    path: Path,
    times_ms: Sequence[int],
    *,
    codec: str = "libx264",
    size_px: tuple[int, int] = SIZE_PX,
    turned: int = 0,
    audio: bool = False,
    **options: str,
) -> bytes:
    """A video with a frame at each of the times; `turned`: the degrees, against the clock, that a player is to turn it by."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size_px
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if turned:
            stream.set_display_rotation(turned)
        sound = _sound_stream(container) if audio else None
        container.start_encoding()
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_image(picture(number, size_px))
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_sound(container, sound)
    return path.read_bytes()


def even(count: int) -> list[int]:
    """The times of so many frames, one each 40 ms."""
    return [FRAME_MS * number for number in range(count)]


def write_audio(path: Path) -> bytes:
    """A second of silence."""
    with av.open(str(path), "w") as container:
        _write_sound(container, _sound_stream(container))
    return path.read_bytes()


def _sound_stream(container: Any) -> Any:
    return container.add_stream("aac", rate=16000, layout="mono")


def _write_sound(container: Any, stream: Any) -> None:
    for number in range(16):
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1000)
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        frame.sample_rate, frame.pts, frame.time_base = 16000, 1000 * number, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def read_video(path: Path) -> tuple[list[Any], list[float]]:
    """The frames as pictures, and when each is to be seen."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [frame.to_image() for frame in frames], [float(frame.time) for frame in frames]
