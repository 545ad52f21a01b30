"""What is known of a stored file, and the numbers that its readers and writers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

PIECE_BYTES = 512 << 10
"""Redis is asked for no more at once: moving it takes well under a millisecond, and every other caller waits that long."""
OBJECT_PART_BYTES = 8 << 20
"""One part of a multi-part upload; S3 allows 10,000 of them, each of at least 5 MiB."""
OBJECT_PARTS_AT_ONCE = 2
PART_TTL_MS = 300_000
"""Bytes in Redis that belong to no file yet are deleted when no more have come for this long."""
WRITE_MS = 300_000
"""An object that is being written is swept when its writer has said nothing for this long; several times its longest pause."""
RENEW_S = 60.0
"""How often whoever writes or reads a large file says so."""
DEFAULT_TYPE = "application/octet-stream"


class MediaSettings(Protocol):
    """The settings that the queue server and the workers share, as far as files are concerned."""

    media_url: str
    media_inline_bytes: int
    max_redis_media_bytes: int
    max_media_bytes: int
    keep_media_s: float


@dataclass(frozen=True)
class StoredFile:
    """A file whose bytes are all there; `object_name` empty: they lie in Redis; `expire_ms`: since 1970, 0: a job needs it."""

    media_id: str
    size_bytes: int
    content_type: str
    object_name: str
    expire_ms: int


def read_found(media_id: str, row: Sequence[bytes]) -> StoredFile | None:
    """What touch_media answers for one file."""
    if not row:
        return None
    size, content_type, object_name, expire_ms = (part.decode() for part in row)
    return StoredFile(media_id, int(size), content_type or DEFAULT_TYPE, object_name, int(expire_ms))


def new_object_name() -> str:
    """A name that was never used before: nobody can be storing what is deleted under it."""
    name = uuid4().hex
    return f"{name[:2]}/{name}"


def largest_bytes(settings: MediaSettings) -> tuple[int, str]:
    """The largest file that can be stored, and what to do for larger ones."""
    if settings.media_url:
        return settings.max_media_bytes, "Send a smaller one, or raise QUEUE_MAX_MEDIA_BYTES."
    return (
        min(settings.max_redis_media_bytes, settings.max_media_bytes),
        "Send a smaller one, raise QUEUE_MAX_REDIS_MEDIA_BYTES, or set QUEUE_MEDIA_URL to keep large files outside of Redis.",
    )


def belongs_outside(size_bytes: int, settings: MediaSettings) -> bool:
    """Whether a file of this size goes to the object store."""
    return bool(settings.media_url) and size_bytes > settings.media_inline_bytes
