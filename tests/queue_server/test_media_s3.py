"""Files in S3: written in parts, read from anywhere, given up without a trace, deleted when their lifetime has passed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ai4thai.queue.v1 import queue_service_pb2 as pb

from queue_server.media.worker_files import WorkerFiles
from queue_server.worker_store import WorkerStore
from tests.queue_server.conftest import queue_settings, serve, worker_settings
from tests.queue_server.s3_server import S3Server
from tests.queue_server.test_media import download, some_bytes, until, upload

WHERE: dict[str, Any] = {"media_url": "s3://bucket/some/prefix", "media_inline_bytes": 1000}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


async def test_files_go_to_s3_and_come_back(redis_url: str, redis_client: Any, s3: S3Server, tmp_path: Path) -> None:
    store = WorkerStore(worker_settings(redis_url, "localhost:1"))
    store.start()
    files = WorkerFiles(store, worker_settings(redis_url, "localhost:1", **WHERE))
    async with serve(queue_settings(redis_url, media_sweep_s=0.1, **WHERE)) as front:
        # Given a file of several parts and a small one, from outside, and one from a worker
        content = some_bytes(20_000_000)
        chunks = [content[begin : begin + 1_000_000] for begin in range(0, len(content), 1_000_000)]
        large, small = await upload(front, *chunks), await upload(front, b"x" * 2000)
        (tmp_path / "own").write_bytes(some_bytes(9_000_000, 1))
        own = await asyncio.to_thread(files.store, tmp_path / "own", "video/mp4", lambda: None)
        # Then they lie under the prefix, and no upload is left open
        assert sorted(len(one) for one in s3.objects.values()) == [2000, 9_000_000, 20_000_000]
        assert all(key.startswith("some/prefix/") for key in s3.objects)
        assert s3.completed >= 2 and not s3.uploads
        # And come back, from anywhere
        assert (await download(front, large.media_id, 19_000_000))[1] == content[19_000_000:]
        assert (await download(front, own))[1] == some_bytes(9_000_000, 1)
        assert await asyncio.to_thread(files.content, large.media_id) == content
        assert (await download(front, small.media_id))[1] == b"x" * 2000
        # When the lifetime of two has passed, then those are deleted
        for media_id in (large.media_id, own):
            assert redis_client.pexpire("{vq}:media:" + media_id, 1)
        for member in redis_client.zrange("{vq}:objects", 0, -1):
            redis_client.zadd("{vq}:objects", {member: 1})
        await until(lambda: len(s3.objects) == 1 and redis_client.zcard("{vq}:objects") == 1)
        assert (await download(front, small.media_id))[1] == b"x" * 2000
    store.stop()


async def test_an_upload_whose_sender_leaves_is_aborted_there(redis_url: str, redis_client: Any, s3: S3Server) -> None:
    async with serve(queue_settings(redis_url, **WHERE)) as front:
        call = front.stub.UploadMedia()
        await call.write(pb.UploadMediaRequest(config=pb.UploadMediaConfig()))
        for _ in range(20):
            await call.write(pb.UploadMediaRequest(chunk=bytes(1 << 20)))
        await until(lambda: any(parts for parts in s3.uploads.values()))
        call.cancel()
        await until(lambda: not s3.uploads and not redis_client.zcard("{vq}:objects"))
        assert not s3.objects


async def test_s3_that_refuses_us_is_told(redis_url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    async with serve(queue_settings(redis_url, **WHERE)) as front:
        await until(lambda: any(check.name == "media" and not check.ok for check in front.health.checks))
        (check,) = (check for check in front.health.checks if check.name == "media")
        assert "s3://bucket/some/prefix" in check.detail and "secret" not in check.detail
