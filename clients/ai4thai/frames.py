"""Reads the pictures of a folder or of a video, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ai4thai.image_input import ImageInput

IMAGE_SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))


@dataclass(frozen=True)
class Frames:
    """Pictures to come; `count` is None when nobody knows it beforehand."""

    pictures: Iterator[tuple[str, ImageInput]]
    count: int | None


def read_frames(source: Path, stride: int = 1, limit: int = 0) -> Frames:
    """Opens a folder of images (in the order of their names) or a video.

    Args:
        source: the folder or the video file.
        stride: every how many pictures one is taken, at least 1.
        limit: at most so many are taken; 0: all.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the folder has no images, the video can't be read, or nothing here reads videos.
    """
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)[::stride]
        paths = paths[:limit] if limit else paths
        if not paths:
            raise ValueError(f"The folder {source} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        return Frames(((path.name, path) for path in paths), len(paths))
    if not source.is_file():
        raise FileNotFoundError(f"There is no folder or video {source}.")
    if source.suffix.lower() in IMAGE_SUFFIXES:
        return Frames(iter([(source.name, source)]), 1)
    if find_spec("cv2"):
        return _by_opencv(source, stride, limit)
    if find_spec("av"):
        return Frames(_numbered(_by_pyav(source), stride, limit), None)
    raise ValueError("To read videos, opencv or PyAV is needed: pip install opencv-python-headless (or av).")


def _by_opencv(source: Path, stride: int, limit: int) -> Frames:
    cv2 = import_module("cv2")
    capture = cv2.VideoCapture(str(source))
    if not capture.isOpened():
        raise ValueError(f"{source} is no video that OpenCV can read.")
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    count = -(-total // stride) if total > 0 else None
    if count is not None and limit:
        count = min(count, limit)

    def frames() -> Iterator[Any]:
        try:
            while True:
                is_there, frame = capture.read()
                if not is_there:
                    return
                yield frame[:, :, ::-1]  # OpenCV's order is blue green red
        finally:
            capture.release()

    return Frames(_numbered(frames(), stride, limit), count)


def _by_pyav(source: Path) -> Iterator[Any]:
    av = import_module("av")
    with av.open(str(source)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _numbered(frames: Iterator[Any], stride: int, limit: int) -> Iterator[tuple[str, ImageInput]]:
    taken = 0
    for number, frame in enumerate(frames):
        if number % stride:
            continue
        yield f"frame {number}", frame
        taken += 1
        if limit and taken >= limit:
            return
