"""Turns what callers hold as a job's file (path, bytes, image, media_id) into what is sent inline or uploaded."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from ai4thai.image_input import ImageInput, read_file
from ai4thai.job_results import Media

JobFileInput: TypeAlias = ImageInput | Media
"""An image or video as a path, a whole file's bytes, an array or a Pillow image; or a stored file: a Media, or its `sha256:…`."""

_MEDIA_ID: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class JobFile:
    """A file of a job before it is sent: one of media_id (stored already), path and content."""

    size_bytes: int = 0
    media_id: str = ""
    path: Path | None = None
    content: bytes = field(default=b"", repr=False)

    def read(self) -> bytes:
        """The whole file's bytes.

        Raises:
            OSError: the file can't be read.
        """
        return self.path.read_bytes() if self.path is not None else self.content


def is_media_id(word: object) -> bool:
    """Whether this is the id of a stored file: `sha256:` and 64 hex digits."""
    return isinstance(word, str) and _MEDIA_ID.fullmatch(word) is not None


def read_job_file(source: JobFileInput) -> JobFile:
    """Looks at a file; one named by its path is read only when it is sent.

    Raises:
        OSError: there is no such file.
        TypeError, ValueError: no file or image of a known kind.
    """
    if isinstance(source, Media):
        return JobFile(media_id=source.media_id)
    if isinstance(source, str) and is_media_id(source):
        return JobFile(media_id=source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        return JobFile(size_bytes=path.stat().st_size, path=path)
    content = read_file(source)
    return JobFile(size_bytes=len(content), content=content)
