"""The clients against the real queue server: what the contract promises, seen through them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from ai4thai import (
    AsyncQueueClient,
    InvalidInput,
    NotFound,
    QueueClient,
    Submission,
    WrongMoment,
    submissions,
)
from ai4thai.job_results import DetectJobResult

from tests.clients.cutting_proxy import cutting_proxy
from tests.queue_server.conftest import (
    Front,
    broker_url,
    front,
    redis_client,
    redis_url,
    start_worker,
    vision,
)

__all__ = ["broker_url", "front", "redis_client", "redis_url", "start_worker", "vision"]

StartWorker = Callable[..., Awaitable[object]]


@pytest.fixture
async def client(front: Front) -> AsyncIterator[AsyncQueueClient]:
    async with AsyncQueueClient(front.address, timeout_s=20) as client:
        yield client


async def test_a_file_goes_up_and_down_over_a_line_that_breaks(front: Front, tmp_path: Path) -> None:
    content = os.urandom(6_000_000)
    source, target = tmp_path / "ภาพถ่าย.mp4", tmp_path / "สำเนา.mp4"
    source.write_bytes(content)

    def there_and_back() -> None:
        with cutting_proxy(front.address) as proxy:
            proxy.cut_after.extend([1_500_000, 4_500_000])
            with QueueClient(proxy.address) as queue:
                media = queue.upload(source)
                assert media.media_id == f"sha256:{hashlib.sha256(content).hexdigest()}"
                assert (media.size_bytes, media.content_type) == (len(content), "video/mp4")
                assert proxy.cuts == 2
                before = proxy.bytes
                assert queue.upload(source).media_id == media.media_id
                assert proxy.bytes - before < 10_000
        with cutting_proxy(front.address) as proxy:
            proxy.cut_after.extend([3_000_000, 5_500_000])
            with QueueClient(proxy.address) as queue:
                queue.download(media.media_id, target)
            assert proxy.cuts == 2
            # What had come was not sent again (it would be 1.9 times as much); what was on its way at a cut was.
            assert proxy.bytes < 1.75 * len(content)

    await asyncio.to_thread(there_and_back)
    assert target.read_bytes() == content


async def test_files_for_asyncio(client: AsyncQueueClient, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    media = await client.upload(content, content_type="video/mp4")
    assert (await client.upload(content)).content_type == "video/mp4"  # the one that is stored
    await client.download(media.media_id, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    changing = tmp_path / "changing"
    changing.write_bytes(content)

    def change(done_bytes: int, whole_bytes: int) -> None:
        changing.write_bytes(bytes(len(content)))

    with pytest.raises(InvalidInput) as caught:
        changing.write_bytes(b"x" + content)
        await client.upload(changing, on_progress=change)
    assert caught.value.reason == "MEDIA_INVALID"


async def test_large_images_are_uploaded_and_the_job_finds_them(
    client: AsyncQueueClient, start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        submissions, "MAX_INLINE_FILE_BYTES", 100_000
    )  # more than 4 MB the fake vision server takes not
    await start_worker()
    large = tmp_path / "ใหญ่.jpg"
    large.write_bytes(b"ok" + bytes(200_000))

    job = await client.submit_detect([b"ok", large], labels={"ป้าย": "ทดสอบ"}, client="ann@home")

    job = await client.wait(job.job_id, timeout_s=30)
    media_id = f"sha256:{hashlib.sha256(large.read_bytes()).hexdigest()}"
    assert (await client.download(media_id, tmp_path / "copy")).size_bytes == 200_002
    assert isinstance(job.result, DetectJobResult) and len(job.result.items) == 2
    assert all(item.detection for item in job.result.items)
    assert (job.client, job.labels) == ("ann@home", {"ป้าย": "ทดสอบ"})


async def test_many_at_once_each_with_its_own_outcome(client: AsyncQueueClient) -> None:
    many = [Submission.detect([b"ok"], labels={"number": str(number)}) for number in range(250)]
    many[3] = Submission.detect([])

    outcomes = await client.submit_many(many)

    refused = outcomes.pop(3)
    assert isinstance(refused.error, InvalidInput) and refused.job is None
    assert all(outcome.created for outcome in outcomes)
    again = await client.submit_many(many[:3])
    assert [(outcome.job and outcome.job.job_id, outcome.created) for outcome in again] == [
        (outcome.job and outcome.job.job_id, False) for outcome in outcomes[:3]
    ]
    assert len([job async for job in client.list_all(page_size=100)]) == 249


async def test_a_paused_queue_holds_its_jobs(client: AsyncQueueClient, start_worker: StartWorker) -> None:
    await start_worker()
    await client.pause("night")
    first = await client.submit_detect([b"ok"], queue="night", client="a")
    other = await client.submit_detect([b"ok"], queue="day", client="b")
    assert (await client.wait(other.job_id, timeout_s=20)).state == "SUCCEEDED"
    assert (await client.get(first.job_id)).held
    [counts] = (await client.stats("night")).queues
    assert (counts.paused, counts.held, counts.depth) == (True, 1, 1)
    assert [(one.client, one.waiting) for one in counts.clients] == [("a", 1)]
    assert [job.job_id for job in (await client.list(client="a")).jobs] == [first.job_id]

    await client.resume("night")

    assert (await client.wait(first.job_id, timeout_s=20)).state == "SUCCEEDED"
    with pytest.raises(WrongMoment):
        await client.retry(first.job_id)


async def test_purged_jobs_can_be_queued_again(client: AsyncQueueClient, start_worker: StartWorker) -> None:
    await client.pause("night")
    jobs = [await client.submit_detect([b"ok"], queue="night") for _ in range(3)]
    assert await client.purge("night") == 3
    assert {(await client.get(job.job_id)).state for job in jobs} == {"CANCELLED"}
    with pytest.raises(NotFound):
        await client.purge("never")

    assert (await client.retry(jobs[0].job_id)).state == "QUEUED"

    await client.resume("night")
    await start_worker()
    assert (await client.wait(jobs[0].job_id, timeout_s=20)).state == "SUCCEEDED"
