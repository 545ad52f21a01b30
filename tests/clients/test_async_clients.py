from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from ai4thai import (
    AsyncQueueClient,
    AsyncVisionClient,
    Busy,
    Cancelled,
    DeadlineExceeded,
    Health,
    InvalidInput,
    JobState,
    Message,
    NotFound,
)
from ai4thai.job_results import DetectJobResult
from ai4thai.results import FrameResult
from ai4thai.vision.v1 import detection_pb2

from serving.errors import Code, ServiceError
from tests.clients.fake_servers import BROKEN, FakeQueue, FakeVision

FULL = ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "Full.", retry_after_s=2)


async def test_detect(async_vision: AsyncVisionClient, image: Path) -> None:
    result = await async_vision.detect(image, annotate=True)
    assert result.detections[0].label == "star" and result.annotated_image
    with pytest.raises(InvalidInput, match="no image"):
        await async_vision.detect(BROKEN)


@pytest.mark.usefixtures("quick_retries")
async def test_retries(async_vision: AsyncVisionClient, fake_vision: FakeVision, image: Path) -> None:
    fake_vision.script.fail_next("Detect", FULL, FULL)
    assert (await async_vision.detect(image)).detections
    fake_vision.script.fail_next("Analyze", *[FULL] * 9)
    with pytest.raises(Busy) as caught:
        await async_vision.analyze(image, "How many?")
    assert caught.value.retry_after_s == 2


async def test_a_stream_of_either_kind_of_iterable(async_vision: AsyncVisionClient) -> None:
    async def camera() -> AsyncIterator[bytes]:
        for picture in (b"first", BROKEN, b"third"):
            yield picture

    for images in ([b"first", BROKEN, b"third"], camera()):
        async with async_vision.detect_stream(images) as stream:
            results = [result async for result in stream]
        assert [result.error is None for result in results] == [True, False, True]
        assert stream.summary.received_count == 3


async def test_a_failing_image_source(async_vision: AsyncVisionClient) -> None:
    def camera() -> Iterator[bytes]:
        yield b"first"
        raise RuntimeError("the camera is unplugged")

    results: list[FrameResult] = []
    with pytest.raises(RuntimeError, match="unplugged"):
        async with async_vision.detect_stream(camera()) as stream:
            async for result in stream:
                results.append(result)
    assert len(results) == 1


async def test_text(async_vision: AsyncVisionClient, fake_vision: FakeVision, image: Path) -> None:
    stream = async_vision.ask(image, "มีดาวกี่ดวง", priority="interactive")
    pieces = [piece async for piece in stream]
    assert pieces == list(FakeVision.pieces)
    assert (await stream.summary()).text == "".join(pieces) == await stream.text()
    assert fake_vision.script.requests["Generate"].priority == detection_pb2.PRIORITY_INTERACTIVE
    assert await async_vision.generate([Message("user", "Hello")], priority="batch").text()
    assert fake_vision.script.requests["Generate"].priority == detection_pb2.PRIORITY_BATCH


async def test_leaving_a_text_stops_the_server(
    async_vision: AsyncVisionClient, fake_vision: FakeVision, image: Path
) -> None:
    async with async_vision.ask(image, "forever") as stream:
        assert await anext(stream) == "more "
    assert await asyncio.to_thread(fake_vision.left.wait, 10)
    with pytest.raises(Cancelled):
        await stream.text()


async def test_a_cancelled_task_stops_the_server_and_stays_cancelled(
    async_vision: AsyncVisionClient, fake_vision: FakeVision, image: Path
) -> None:
    began = asyncio.Event()

    async def read() -> None:
        async with async_vision.ask(image, "forever") as stream:
            async for _ in stream:
                began.set()

    task = asyncio.create_task(read())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(fake_vision.left.wait, 10)


async def test_deadlines(async_vision: AsyncVisionClient, image: Path) -> None:
    with pytest.raises(DeadlineExceeded):
        async for _ in async_vision.ask(image, "forever", timeout_s=0.3):
            pass


async def test_the_server_tells_of_itself(async_vision: AsyncVisionClient) -> None:
    assert (await async_vision.info()).version == "9.9"
    assert [model.name for model in await async_vision.list_models()] == ["fake-detector"]
    assert [device.kind for device in await async_vision.devices()] == ["cpu"]
    assert await async_vision.health() is Health.SERVING
    assert await async_vision.health("model/nobody") is Health.UNKNOWN_SERVICE


async def test_jobs(async_queue: AsyncQueueClient, fake_queue: FakeQueue, image: Path) -> None:
    fake_queue.break_watch_at.append(2)
    seen: list[int] = []

    submitted = await async_queue.submit_detect([image])
    job = await async_queue.wait(submitted.job_id, timeout_s=20, on_change=lambda change: seen.append(change.revision))

    assert seen == [1, 2, 3, 4]
    assert isinstance(job.outcome(), DetectJobResult)
    assert [item.job_id for item in (await async_queue.list()).jobs] == [job.job_id]
    await async_queue.delete(job.job_id)
    with pytest.raises(NotFound):
        await async_queue.get(job.job_id)


async def test_cancelling_a_job(async_queue: AsyncQueueClient, image: Path) -> None:
    job = await async_queue.submit_detect([image], labels={"pace": "slow"})
    states = []
    async for change in async_queue.watch(job.job_id, timeout_s=20):
        states.append(change.state)
        if change.state is JobState.RUNNING:
            await async_queue.cancel(job.job_id)
    assert states[-1] is JobState.CANCELLED


async def test_other_kinds_of_jobs(async_queue: AsyncQueueClient, fake_queue: FakeQueue, image: Path) -> None:
    assert (await async_queue.submit_generate([Message("user", [image, "What?"])])).kind == "generate"
    assert (await async_queue.submit_analyze([image], "How many?")).kind == "analyze"
    assert (await async_queue.stats()).worker_count == 1
    assert (await async_queue.workers())[0].concurrency == 8
    assert await async_queue.health("ai4thai.queue.v1.QueueService") is Health.SERVING
