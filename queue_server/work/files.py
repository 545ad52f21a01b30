"""The files of a submission: their bytes leave the work, which keeps their ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from ai4thai.queue.v1 import work_pb2

from queue_server.errors import InvalidField

MAX_IMAGES = 1000

_MEDIA_ID = re.compile(r"sha256:[0-9a-f]{64}")


class Files:
    """Collects the files while a submission is read."""

    def __init__(self, max_image_bytes: int) -> None:
        self._max_image_bytes = max_image_bytes
        self._media_ids: dict[str, None] = {}
        self.contents: dict[str, bytes] = {}
        """The files that came along, by their ids."""

    @property
    def media_ids(self) -> tuple[str, ...]:
        """Every file that the work needs, each once."""
        return tuple(self._media_ids)

    def image(self, source: work_pb2.MediaSource, field: str) -> work_pb2.MediaSource:
        """The same image by its id; raises InvalidField."""
        size_bytes = len(source.content)
        if size_bytes > self._max_image_bytes:
            raise InvalidField(
                f"{field}.content",
                f"The image has {size_bytes} bytes; the limit is {self._max_image_bytes}.",
                cure="Send a smaller one, or raise QUEUE_MAX_IMAGE_BYTES.",
                size_bytes=size_bytes,
                limit_bytes=self._max_image_bytes,
            )
        return self.file(source, field)

    def images(self, sources: Iterable[work_pb2.MediaSource], field: str) -> list[work_pb2.MediaSource]:
        """The same images by their ids, 1 to 1000 of them; raises InvalidField."""
        light = [self.image(source, f"{field}[{index}]") for index, source in enumerate(sources)]
        if not 1 <= len(light) <= MAX_IMAGES:
            raise InvalidField(field, f"There are {len(light)} images; it must be 1 to {MAX_IMAGES}.")
        return light

    def file(self, source: work_pb2.MediaSource, field: str) -> work_pb2.MediaSource:
        """The same file by its id, however large: the submission as a whole has its limit. Raises InvalidField."""
        if source.WhichOneof("source") == "media_id":
            if not _MEDIA_ID.fullmatch(source.media_id):
                raise InvalidField(
                    f"{field}.media_id",
                    f"{source.media_id[:80]!r} is no media id.",
                    cure="It is `sha256:` and 64 hex digits.",
                )
            media_id = source.media_id
        elif source.content:
            media_id = "sha256:" + hashlib.sha256(source.content).hexdigest()
            self.contents[media_id] = source.content
        else:
            raise InvalidField(field, "The file is empty: neither content nor media_id is set.")
        self._media_ids[media_id] = None
        return work_pb2.MediaSource(media_id=media_id)
