"""The half of the fake queue server that stores files, and breaks off when told to."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc
from ai4thai.queue.v1 import queue_service_pb2 as pb

from serving.errors import Code, ServiceError


class FakeMedia:
    """Keeps files by their digest, like the real one."""

    script: Any

    def __init__(self) -> None:
        self.media: dict[str, tuple[bytes, str]] = {}
        self.uploads: list[int] = []  # the bytes that came in each call
        self.offsets: list[int] = []  # where each download began
        self.break_upload_at: deque[int] = deque()  # an upload breaks off once so many bytes have come
        self.break_download_at: deque[int] = deque()  # a download breaks off once so many bytes have gone

    def UploadMedia(self, requests: Any, context: Any) -> pb.UploadMediaResponse:
        config = next(requests).config
        self.script.begin("UploadMedia", config, context)
        self.uploads.append(0)
        if config.media_id not in self.media:
            context.send_initial_metadata((("x-chunks-wanted", "1"),))
            limit = self.break_upload_at.popleft() if self.break_upload_at else None
            content = b""
            for request in requests:
                content += request.chunk
                self.uploads[-1] = len(content)
                if limit is not None and len(content) >= limit:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "broke off")
            media_id = f"sha256:{hashlib.sha256(content).hexdigest()}"
            if config.media_id not in ("", media_id):
                self.script.refuse(
                    context, ServiceError(Code.INVALID_ARGUMENT, "MEDIA_INVALID", "Other bytes than announced came.")
                )
            self.keep(content, config.content_type)
        return pb.UploadMediaResponse(media=self._told(config.media_id))

    def GetMedia(self, request: pb.GetMediaRequest, context: Any) -> Iterator[pb.GetMediaResponse]:
        self.script.begin("GetMedia", request, context)
        self.offsets.append(request.offset_bytes)
        if request.media_id not in self.media:
            self.script.refuse(context, ServiceError(Code.NOT_FOUND, "MEDIA_NOT_FOUND", "There is no such file."))
        yield pb.GetMediaResponse(media=self._told(request.media_id))
        content = self.media[request.media_id][0]
        limit = self.break_download_at.popleft() if self.break_download_at else len(content)
        for begin in range(request.offset_bytes, limit, 1 << 16):
            yield pb.GetMediaResponse(chunk=content[begin : min(begin + (1 << 16), limit)])
        if limit < len(content):
            context.abort(grpc.StatusCode.UNAVAILABLE, "broke off")

    def keep(self, content: bytes, content_type: str) -> str:
        """Stores a file as if it had been uploaded."""
        media_id = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.media[media_id] = (content, content_type)
        return media_id

    def _told(self, media_id: str) -> pb.Media:
        content, content_type = self.media[media_id]
        media = pb.Media(media_id=media_id, size_bytes=len(content), content_type=content_type)
        media.expire_time.FromSeconds(2_000_000_000)
        return media
