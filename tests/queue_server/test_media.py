"""Files: stored once, read from anywhere, kept as long as they are used or needed, and nothing left of those that broke off."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.queue.v1 import work_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_server.media import library
from tests.queue_server.conftest import Front, queue_settings, serve, state
from tests.queue_server.test_submit import refusal

PLACES = ("redis", "directory")


def at(place: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings with which all but the smallest files lie there."""
    if place == "directory":
        changes |= {"media_url": f"file://{folder}/media", "media_inline_bytes": 1000, "media_sweep_s": 0.1}
    return changes


async def upload(front: Front, *chunks: bytes, **config: Any) -> pb.Media:
    async def messages() -> AsyncIterator[pb.UploadMediaRequest]:
        yield pb.UploadMediaRequest(config=pb.UploadMediaConfig(**config))
        for chunk in chunks:
            yield pb.UploadMediaRequest(chunk=chunk)

    media: pb.Media = (await front.stub.UploadMedia(messages())).media
    return media


async def download(front: Front, media_id: str, offset_bytes: int = 0) -> tuple[pb.Media, bytes]:
    request = pb.GetMediaRequest(media_id=media_id, offset_bytes=offset_bytes)
    first, *rest = [response async for response in front.stub.GetMedia(request)]
    assert not first.chunk and all(not piece.HasField("media") and len(piece.chunk) <= 1 << 20 for piece in rest)
    return first.media, b"".join(piece.chunk for piece in rest)


def id_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def some_bytes(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.02)


def no_bytes_left(client: Any, folder: Path) -> bool:
    kinds = ("{vq}:media:*", "{vq}:blob:*", "{vq}:part:*")
    return not files_in(folder) and not any(client.keys(kind) for kind in kinds) and not client.zcard("{vq}:objects")


@pytest.mark.parametrize("place", PLACES)
def test_any_chunks_give_the_same_file_from_any_offset(
    redis_url: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a server whose pieces are so small that little files have many
    monkeypatch.setattr(library, "PIECE_BYTES", 700)
    with asyncio.Runner() as runner:
        server = serve(queue_settings(redis_url, **at(place, tmp_path)))
        front = runner.run(server.__aenter__())

        @settings(max_examples=40, deadline=None)
        @given(
            sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=6).filter(any),
            seed=st.integers(0, 9),
            announced=st.booleans(),
            cut=st.floats(0, 1),
        )
        def check(sizes: list[int], seed: int, announced: bool, cut: float) -> None:
            content = some_bytes(sum(sizes), seed)
            chunks = [content[sum(sizes[:number]) :][:size] for number, size in enumerate(sizes)]
            config = {"media_id": id_of(content), "size_bytes": len(content)} if announced else {}
            # When it is stored in these chunks, then it is named by its bytes, and they come back from everywhere
            media = runner.run(upload(front, *chunks, content_type="video/mp4", **config))
            assert (media.media_id, media.size_bytes) == (id_of(content), len(content))
            offset_bytes = round(cut * len(content))
            found, rest = runner.run(download(front, media.media_id, offset_bytes))
            assert rest == content[offset_bytes:]
            assert (found.size_bytes, found.content_type) == (len(content), "video/mp4")

        check()
        runner.run(server.__aexit__(None, None, None))


@pytest.mark.parametrize("place", PLACES)
async def test_the_same_bytes_are_stored_once(redis_url: str, redis_client: Any, place: str, tmp_path: Path) -> None:
    async with serve(queue_settings(redis_url, **at(place, tmp_path))) as front:
        content = some_bytes(3_000_000)
        chunks = [content[begin : begin + (1 << 20)] for begin in range(0, len(content), 1 << 20)]
        # When five senders store the same file at once
        stored = await asyncio.gather(*(upload(front, *chunks, content_type="video/mp4") for _ in range(5)))
        assert {media.media_id for media in stored} == {id_of(content)}
        # Then its bytes lie there once
        await until(lambda: redis_client.zcard("{vq}:objects") == len(files_in(tmp_path)))
        assert len(files_in(tmp_path)) == (place == "directory")
        assert len(redis_client.keys("{vq}:blob:*")) == (place == "redis") and not redis_client.keys("{vq}:part:*")

        # And one who announces it is answered without sending it
        async def endless() -> AsyncIterator[pb.UploadMediaRequest]:
            yield pb.UploadMediaRequest(config=pb.UploadMediaConfig(media_id=id_of(content)))
            await asyncio.Event().wait()

        async with asyncio.timeout(5):
            again = (await front.stub.UploadMedia(endless())).media
        assert (again.media_id, again.content_type) == (id_of(content), "video/mp4")


@pytest.mark.parametrize("place", PLACES)
async def test_what_is_not_as_announced_is_refused_and_leaves_nothing(
    redis_url: str, redis_client: Any, place: str, tmp_path: Path
) -> None:
    limits = {"max_media_bytes": 100_000, "max_redis_media_bytes": 100_000}
    async with serve(queue_settings(redis_url, **at(place, tmp_path, **limits))) as front:
        content = some_bytes(60_000)
        for chunks, config, reason in (
            ([], {}, "MEDIA_INVALID"),
            ([b"", b""], {}, "MEDIA_INVALID"),
            ([content, content], {}, "MEDIA_INVALID"),
            # Of grpc.aio's clients, one that finds the call closed while it writes is told nothing: they are heard out.
            ([content] * 40, {"size_bytes": 100_001}, "MEDIA_INVALID"),
            ([content] * 40, {}, "MEDIA_INVALID"),
            ([content], {"size_bytes": 59_999}, "MEDIA_INVALID"),
            ([content], {"size_bytes": 60_001}, "MEDIA_INVALID"),
            ([content], {"media_id": id_of(b"other")}, "MEDIA_INVALID"),
            ([content], {"media_id": "sha256:../.."}, "INVALID_FIELD"),
            ([content], {"size_bytes": -1}, "INVALID_FIELD"),
            ([content], {"content_type": "video"}, "INVALID_FIELD"),
            ([content], {"content_type": "text/html\r\nx: y"}, "INVALID_FIELD"),
            ([b"x" * ((1 << 20) + 1)], {}, "INVALID_FIELD"),
        ):
            code, found, details = await refusal(upload(front, *chunks, **config))
            assert (code, found) == (grpc.StatusCode.INVALID_ARGUMENT, reason), (config, details)
            assert details["BadRequest"].field_violations[0].field
        for messages in ([], [pb.UploadMediaRequest(chunk=b"x")], [pb.UploadMediaRequest()]):
            assert (await refusal(front.stub.UploadMedia(iter(messages))))[1] == "INVALID_FIELD"
        twice = [pb.UploadMediaRequest(config=pb.UploadMediaConfig())] * 2
        assert (await refusal(front.stub.UploadMedia(iter(twice))))[1] == "INVALID_FIELD"
        assert no_bytes_left(redis_client, tmp_path)
        # And what is as announced is taken, parameters of its type included
        kind = 'video/mp4; codecs="avc1.42E01E, mp4a.40.2"'
        media = await upload(front, content, media_id=id_of(content), size_bytes=60_000, content_type=kind)
        assert media.content_type == kind


async def test_a_file_that_is_not_there_is_not_found(front: Front) -> None:
    media = await upload(front, b"12345")

    async def get(media_id: str, offset_bytes: int = 0) -> None:
        await download(front, media_id, offset_bytes)

    assert (await refusal(get(id_of(b"none"))))[:2] == (grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND")
    assert (await refusal(get("../../etc/passwd")))[:2] == (grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND")
    assert (await refusal(get("")))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert (await refusal(get(media.media_id, -1)))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert (await refusal(get(media.media_id, 6)))[:2] == (grpc.StatusCode.OUT_OF_RANGE, "INVALID_FIELD")
    found, nothing = await download(front, media.media_id, 5)
    assert (found.media_id, nothing) == (media.media_id, b"")
    assert media.content_type == "application/octet-stream"


@pytest.mark.parametrize("place", PLACES)
async def test_a_sender_that_leaves_leaves_nothing(
    redis_url: str, redis_client: Any, place: str, tmp_path: Path
) -> None:
    async with serve(queue_settings(redis_url, **at(place, tmp_path, max_uploads=1))) as front:

        async def begin() -> Any:
            call = front.stub.UploadMedia()
            await call.write(pb.UploadMediaRequest(config=pb.UploadMediaConfig()))
            for _ in range(12):
                await call.write(pb.UploadMediaRequest(chunk=bytes(1 << 20)))
            await until(
                lambda: bool(files_in(tmp_path)) if place == "directory" else bool(redis_client.keys("{vq}:part:*"))
            )
            return call

        # Given an upload that is under way; another finds no place meanwhile
        call = await begin()
        code, reason, details = await refusal(upload(front, b"other"))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL") and "RetryInfo" in details
        # When its sender leaves, then nothing is left of it
        call.cancel()
        await until(lambda: no_bytes_left(redis_client, tmp_path))
        # And the place is free again
        await upload(front, b"other")


@pytest.mark.parametrize("place", PLACES)
async def test_an_upload_that_does_not_go_on_is_given_up(
    redis_url: str, redis_client: Any, place: str, tmp_path: Path
) -> None:
    async with serve(queue_settings(redis_url, **at(place, tmp_path, upload_idle_s=0.3))) as front:

        async def stuck(*before: pb.UploadMediaRequest) -> AsyncIterator[pb.UploadMediaRequest]:
            for message in before:
                yield message
            await asyncio.Event().wait()

        config, chunk = (
            pb.UploadMediaRequest(config=pb.UploadMediaConfig()),
            pb.UploadMediaRequest(chunk=bytes(900_000)),
        )
        for before in ([], [config], [config, chunk, chunk]):
            code, reason, _ = await refusal(front.stub.UploadMedia(stuck(*before)))
            assert (code, reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        await until(lambda: no_bytes_left(redis_client, tmp_path))


async def test_a_full_redis_refuses_files_and_keeps_nothing_of_them(redis_url: str, redis_client: Any) -> None:
    async with serve(queue_settings(redis_url)) as front:
        kept = await upload(front, b"small")
        redis_client.config_set("maxmemory", redis_client.info()["used_memory"] + (8 << 20))
        # When a file comes that does not fit
        code, reason, details = await refusal(upload(front, *(bytes(1 << 20) for _ in range(20))))
        # Then it is refused with the word to come later, and its bytes are gone
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL") and "RetryInfo" in details
        assert not redis_client.keys("{vq}:part:*") and len(redis_client.keys("{vq}:media:*")) == 1
        # And when memory is nearly full, then even one that would fit, so that jobs can go on
        redis_client.config_set("maxmemory", "256mb")
        redis_client.setrange("others'", 64 << 20, b"x")
        redis_client.config_set("maxmemory", round(redis_client.info()["used_memory"] * 1.06))
        await until(lambda: front.service._store._memory_full)
        assert "New jobs are refused" in await front.service._store.check()  # what /health/detailed tells
        code, reason, _ = await refusal(upload(front, b"other"))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        # And what is stored can still be had, and stored again
        redis_client.config_set("maxmemory", 1)
        assert (await download(front, kept.media_id))[1] == b"small"
        assert (await upload(front, b"small", media_id=kept.media_id)).media_id == kept.media_id


async def test_large_images_of_a_submission_lie_in_the_object_store(
    redis_url: str, redis_client: Any, tmp_path: Path, start_worker: Callable[..., Awaitable[Any]]
) -> None:
    where = at("directory", tmp_path, media_inline_bytes=10)
    await start_worker(**where)
    async with serve(queue_settings(redis_url, **where)) as front:
        job = await front.submit(b"ok", b"ok " + b"x" * 700_000)
        ended = await front.end(job.job_id)
        assert state(ended) == "SUCCEEDED"
        assert [len(item.detection.model) for item in ended.result.detect.items] == [2, 700_003]
        assert [path.stat().st_size for path in files_in(tmp_path)] == [700_003]
        assert len(redis_client.keys("{vq}:blob:*")) == 1


async def test_an_object_store_that_is_away_is_told(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "media").write_text("a file where a directory should be")
    async with serve(queue_settings(redis_url, **at("directory", tmp_path))) as front:
        code, reason, details = await refusal(upload(front, bytes(2000)))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE") and "RetryInfo" in details
        # Small files, and all that needs none, go on
        await upload(front, bytes(900))
        source = work_pb2.MediaSource(media_id=id_of(bytes(900)))
        assert state(await front.submit(work=work_pb2.Work(detect=work_pb2.DetectWork(images=[source])))) == "QUEUED"
        await until(lambda: any(check.name == "media" and not check.ok for check in front.health.checks))
