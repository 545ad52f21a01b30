"""How long files live: while they are used, while a job needs them, as long as the result they belong to; and no longer."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.queue.v1 import queue_service_pb2_grpc, work_pb2

from queue_server.connection import Connection
from queue_server.errors import MediaNotFound, ResultTooLarge, StoreUnavailable
from queue_server.jobs import JobState
from queue_server.media import library
from queue_server.media.objects import Objects
from queue_server.media.sweep import ObjectSweep
from queue_server.media.worker_files import WorkerFiles
from queue_server.work.task import Stopped
from queue_server.worker_store import Claim, Outcome, WorkerStore
from tests.queue_server.conftest import Front, Process, queue_settings, serve, worker_settings
from tests.queue_server.test_media import (
    PLACES,
    at,
    download,
    files_in,
    id_of,
    no_bytes_left,
    some_bytes,
    until,
    upload,
)
from tests.queue_server.test_submit import refusal

KEEP_S = 60.0
"""A file's lifetime here; nothing waits for it: Redis' clock cannot be turned, so what is left of a lifetime is."""


@pytest.fixture
def worker_store(redis_url: str) -> Iterator[WorkerStore]:
    store = WorkerStore(worker_settings(redis_url, "localhost:1", keep_media_s=KEEP_S, lease_s=3600))
    store.start()
    yield store
    store.stop()


def kept(place: str, folder: Path) -> dict[str, Any]:
    return at(place, folder, keep_media_s=KEEP_S, keep_failed_media_s=KEEP_S)


def left_s(client: Any, media_id: str) -> float:
    """What is left of a file's lifetime; -1: it has none, since a job needs it; -2: there is no such file."""
    # At one moment of Redis' clock.
    ms, blob_ms = client.pipeline().pttl("{vq}:media:" + media_id).pttl("{vq}:blob:" + media_id).execute()
    if blob_ms != -2:
        assert abs(blob_ms - ms) < 100
    return float(ms / 1000 if ms >= 0 else ms)


def let_pass(client: Any, *media_ids: str, but_s: float = 0.001) -> None:
    """Lets the files' lifetime pass, but for so many seconds."""
    for media_id in media_ids:
        for kind in ("media", "blob"):
            client.pexpire("{vq}:" + kind + ":" + media_id, round(but_s * 1000))
    for member in client.zrange("{vq}:objects", 0, -1):
        client.zadd("{vq}:objects", {member: 1})


def worker_files(store: WorkerStore, redis_url: str, **changes: Any) -> WorkerFiles:
    return WorkerFiles(store, worker_settings(redis_url, "localhost:1", **changes))


def fine() -> None:
    """Nothing stops the work."""


def needs(*media_ids: str) -> work_pb2.Work:
    return work_pb2.Work(detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(media_id=one) for one in media_ids]))


async def is_there(front: Front, media_id: str) -> bool:
    try:
        await download(front, media_id)
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND
        return False
    return True


@pytest.mark.parametrize("place", PLACES)
async def test_a_file_that_nobody_uses_dies(redis_url: str, redis_client: Any, place: str, tmp_path: Path) -> None:
    async with serve(queue_settings(redis_url, **{**kept(place, tmp_path), "keep_media_s": 0.3})) as front:
        media = await upload(front, some_bytes(5000))
        await until(lambda: no_bytes_left(redis_client, tmp_path))
        assert not await is_there(front, media.media_id)
        code, reason, _ = await refusal(front.submit(work=needs(media.media_id)))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND")


@pytest.mark.parametrize("place", PLACES)
async def test_use_renews_a_files_lifetime(
    redis_url: str, redis_client: Any, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "RENEW_S", 0.0)
    async with serve(queue_settings(redis_url, **kept(place, tmp_path))) as front:
        content = some_bytes(5_000_000)
        chunks = [content[begin : begin + (1 << 20)] for begin in range(0, len(content), 1 << 20)]
        media_id = (await upload(front, *chunks)).media_id
        # Given a file whose lifetime is nearly over, when it is used, then it begins anew
        for use in (
            lambda: upload(front, *chunks),
            lambda: upload(front, media_id=media_id),
            lambda: download(front, media_id, len(content)),
            lambda: download(front, media_id),
        ):
            let_pass(redis_client, media_id, but_s=10)
            await use()
            assert KEEP_S - 10 < left_s(redis_client, media_id) <= KEEP_S
        # And while it is read
        pieces = aiter(front.stub.GetMedia(pb.GetMediaRequest(media_id=media_id)))
        expire_time = (await anext(pieces)).media.expire_time
        assert 0 < expire_time.ToMilliseconds() / 1000 - redis_client.time()[0] <= KEEP_S + 1
        let_pass(redis_client, media_id, but_s=10)
        assert b"".join([piece.chunk async for piece in pieces]) == content
        assert left_s(redis_client, media_id) > KEEP_S - 10


@pytest.mark.parametrize("place", PLACES)
async def test_a_job_keeps_its_files(redis_url: str, redis_client: Any, place: str, tmp_path: Path) -> None:
    async with serve(queue_settings(redis_url, **kept(place, tmp_path))) as front:
        # Given two jobs that need a file
        media_id = (await upload(front, some_bytes(5000))).media_id
        jobs = [await front.submit(work=needs(media_id)) for _ in range(2)]
        # When one of them is over, then the file has no end, and the sweep leaves it
        for job in jobs:
            assert left_s(redis_client, media_id) == -1
            let_pass(redis_client)
            await asyncio.sleep(0.3)
            media, content = await download(front, media_id)
            assert not media.HasField("expire_time") and content == some_bytes(5000)
            await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        # When the other is over too, then it lives a lifetime more
        assert 0 < left_s(redis_client, media_id) <= KEEP_S
        let_pass(redis_client, media_id)
        await until(lambda: no_bytes_left(redis_client, tmp_path))


@pytest.mark.parametrize("place", PLACES)
async def test_a_results_files_live_and_die_with_their_job(
    redis_url: str, redis_client: Any, worker_store: WorkerStore, place: str, tmp_path: Path
) -> None:
    where = kept(place, tmp_path / "store")
    files = worker_files(worker_store, redis_url, **where)
    async with serve(queue_settings(redis_url, **where)) as front:
        # Given an attempt that stores two files: one of its own and one that is its input again
        given = (await upload(front, some_bytes(5000))).media_id
        job = await front.submit(work=needs(given))
        claim = worker_store.claim(job.job_id, 1, "claim", "w", b"")
        assert isinstance(claim, Claim)
        stored = []
        for name, content in (("own", some_bytes(700_000, 1)), ("again", some_bytes(5000))):
            path = tmp_path / name
            path.write_bytes(content)
            stored.append(await asyncio.to_thread(files.store, path, "video/mp4", fine))
            assert stored[-1] == id_of(content)
        assert 0 < left_s(redis_client, stored[0]) <= KEEP_S
        # When it has succeeded, then they are there for as long as the job is
        assert worker_store.finish(claim, Outcome(JobState.SUCCEEDED, result=b"", files=tuple(stored)))[0]
        assert [left_s(redis_client, one) for one in stored] == [-1, -1]
        media, content = await download(front, stored[0])
        assert content == some_bytes(700_000, 1) and media.content_type == "video/mp4"
        assert not media.HasField("expire_time")
        # And die when it is forgotten
        await front.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
        assert all(0 < left_s(redis_client, one) <= KEEP_S for one in stored)
        let_pass(redis_client, *stored)
        await until(lambda: no_bytes_left(redis_client, tmp_path / "store"))


async def test_the_files_of_an_attempt_that_failed_die_by_themselves(
    redis_url: str, redis_client: Any, worker_store: WorkerStore, tmp_path: Path
) -> None:
    where = kept("directory", tmp_path / "store")
    files = worker_files(worker_store, redis_url, **where)
    (tmp_path / "own").write_bytes(some_bytes(5000))
    async with serve(queue_settings(redis_url, **where)) as front:
        job = await front.submit(b"ok")
        first = worker_store.claim(job.job_id, 1, "first", "w", b"")
        assert isinstance(first, Claim)
        media_id = files.store(tmp_path / "own", "", fine)
        assert worker_store.finish(first, Outcome(JobState.QUEUED, error=b"", files=(media_id,)))[0]
        assert 0 < left_s(redis_client, media_id) <= KEEP_S
        let_pass(redis_client, media_id)
        await until(lambda: not files_in(tmp_path / "store"))
        # And a result that has lost its files is not recorded
        second = worker_store.claim(job.job_id, 2, "second", "w", b"")
        assert isinstance(second, Claim)
        recorded, why = worker_store.finish(second, Outcome(JobState.SUCCEEDED, files=(media_id,)))
        assert not recorded and media_id in why
        assert (await front.get(job.job_id)).attempt_count == 2


@pytest.mark.parametrize("place", PLACES)
async def test_a_worker_reads_what_was_stored(
    redis_url: str, redis_client: Any, worker_store: WorkerStore, place: str, tmp_path: Path
) -> None:
    where = at(place, tmp_path / "store", max_media_bytes=2_000_000, max_redis_media_bytes=2_000_000)
    files = worker_files(worker_store, redis_url, **where)
    async with serve(queue_settings(redis_url, **where)) as front:
        for size_bytes in (1, 524_288, 1_500_000):
            content = some_bytes(size_bytes)
            media_id = (
                await upload(front, *(content[begin:][:99_999] for begin in range(0, size_bytes, 99_999)))
            ).media_id
            assert files.content(media_id) == content
            files.copy(media_id, tmp_path / "copy", fine)
            assert (tmp_path / "copy").read_bytes() == content

        # A stopped attempt goes no further, in either direction, and leaves nothing
        def stopped() -> None:
            raise Stopped

        with pytest.raises(Stopped):
            files.copy(media_id, tmp_path / "copy", stopped)
        (tmp_path / "new").write_bytes(some_bytes(5000, 7))
        with pytest.raises(Stopped):
            files.store(tmp_path / "new", "", stopped)
        assert not await is_there(front, id_of(some_bytes(5000, 7))) and not redis_client.keys("{vq}:part:*")
        # What is gone, or too large, is told
        with pytest.raises(MediaNotFound):
            files.content(id_of(b"none"))
        (tmp_path / "large").write_bytes(bytes(2_000_001))
        with pytest.raises(ResultTooLarge):
            files.store(tmp_path / "large", "", fine)
        # No room just now is no fault of the job's
        redis_client.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable):
            files.store(tmp_path / "new", "", fine)


async def test_what_a_killed_server_was_writing_is_swept(
    redis_url: str, redis_client: Any, tmp_path: Path, start_process: Callable[..., Process]
) -> None:
    # Given a server that is killed in the middle of an upload
    process = start_process(
        "queue_server",
        REDIS_URL=redis_url,
        QUEUE_WORKER_PORT="0",
        QUEUE_MEDIA_URL=f"file://{tmp_path}",
        SERVING_HOST="127.0.0.1",
    )
    line = process.lines_until('"listening"')[-1]
    port = line.partition('"port": ')[2].partition(",")[0].rstrip("}\n ")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = queue_service_pb2_grpc.QueueServiceStub(channel).UploadMedia()
        await call.write(pb.UploadMediaRequest(config=pb.UploadMediaConfig()))
        for _ in range(12):
            await call.write(pb.UploadMediaRequest(chunk=bytes(1 << 20)))
        await until(lambda: bool(files_in(tmp_path)))
        process.kill(signal.SIGKILL)
        process.wait()
    ((name, due_ms),) = redis_client.zrange("{vq}:objects", 0, -1, withscores=True)
    assert due_ms > redis_client.time()[0] * 1000 + 60_000
    async with serve(queue_settings(redis_url, media_url=f"file://{tmp_path}", media_sweep_s=0.1)):
        # When another has its time, then it leaves what may still be written
        await asyncio.sleep(0.3)
        assert files_in(tmp_path)
        # And once the writer has been silent for long enough, nothing is left
        redis_client.zadd("{vq}:objects", {name: 1})
        await until(lambda: no_bytes_left(redis_client, tmp_path))


async def test_several_servers_sweep_at_once_and_spare_what_is_needed(
    redis_url: str, redis_client: Any, tmp_path: Path
) -> None:
    settings = queue_settings(redis_url, **{**kept("directory", tmp_path), "media_sweep_s": 3600.0})
    connection = Connection(redis_url, 2.0, settings.terms)
    await connection.start()
    objects = Objects(settings.media_url)
    async with serve(settings) as front:
        # Given files of which some are needed by jobs, some still live, and one whose object somebody else has deleted
        ids = [(await upload(front, some_bytes(2000, number))).media_id for number in range(9)]
        for media_id in ids[:3]:
            await front.submit(work=needs(media_id))
        names = dict(reversed(member.decode().split()) for member in redis_client.zrange("{vq}:objects", 0, -1))
        (tmp_path / "media" / names[ids[8]]).unlink()
        assert not await is_there(front, ids[8])
        let_pass(redis_client, *ids[6:])
        await asyncio.sleep(0.05)
        # When three sweep at the same moment
        counts = await asyncio.gather(*(ObjectSweep(connection, objects, settings).sweep_once() for _ in range(3)))
        # Then each object was deleted by one of them, and the others are there
        assert sum(counts) == 3
        assert len(files_in(tmp_path)) == 6 and redis_client.zcard("{vq}:objects") == 6
        assert [await is_there(front, media_id) for media_id in ids] == [True] * 6 + [False] * 3
    await connection.stop()


async def test_an_object_that_was_swept_while_it_was_written_becomes_no_file(
    redis_url: str, redis_client: Any, tmp_path: Path
) -> None:
    async with serve(queue_settings(redis_url, **at("directory", tmp_path))) as front:
        call = front.stub.UploadMedia()
        await call.write(pb.UploadMediaRequest(config=pb.UploadMediaConfig()))
        await call.write(pb.UploadMediaRequest(chunk=bytes(5000)))
        # Given an upload whose object the index no longer knows: a server took its writer for dead
        await until(lambda: redis_client.zcard("{vq}:objects") == 1)
        assert redis_client.delete("{vq}:objects")
        # When it comes to its end, then it is refused, to be tried again, and leaves nothing
        await call.done_writing()
        code, reason, details = await refusal(call)
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE") and "RetryInfo" in details
        await until(lambda: no_bytes_left(redis_client, tmp_path))
