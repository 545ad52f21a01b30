"""What SubmitJob accepts, what it refuses and how it says so; lists and deletions."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import grpc
import pytest
import redis
from ai4thai.queue.v1 import job_pb2, work_pb2
from ai4thai.queue.v1 import queue_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from tests.queue_server.conftest import Front, detect, queue_settings, serve, state


def stamp(unix_s: float) -> Timestamp:
    message = Timestamp()
    message.FromMilliseconds(round(unix_s * 1000))
    return message


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """The code, the reason, and the details by type of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details: dict[str, Any] = {}
    for key, value in caught.value.trailing_metadata():
        if key == "grpc-status-details-bin":
            for packed in Status.FromString(value).details:
                for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
                    message = kind()
                    if packed.Unpack(message):
                        details[kind.__name__] = message
    assert "ErrorInfo" in details, caught.value
    return caught.value.code(), details["ErrorInfo"].reason, details


async def test_the_same_request_id_gives_the_same_job(front: Front) -> None:
    # Given a submission, when it is sent again at once from twenty sides
    request = {"request_id": "mine", "labels": {"a": "1", "b": "2"}}
    answers = await asyncio.gather(*(front.submit_response(b"ok", **request) for _ in range(20)))
    # Then there is one job, and one of the answers made it
    assert len({answer.job.job_id for answer in answers}) == 1
    assert sum(answer.created for answer in answers) == 1
    jobs = (await front.stub.ListJobs(pb.ListJobsRequest())).jobs
    assert len(jobs) == 1
    # And the image by its id is the same body as the image itself
    media_id = "sha256:" + hashlib.sha256(b"ok").hexdigest()
    by_id = work_pb2.Work(detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(media_id=media_id)]))
    assert not (await front.submit_response(work=by_id, **request)).created


async def test_the_same_request_id_with_another_body_is_refused(front: Front) -> None:
    await front.submit(b"ok", request_id="mine")
    for changes in ({"queue": "other"}, {"labels": {"a": "1"}}, {"work": detect(b"ok", b"ok")}, {"max_attempts": 1}):
        code, reason, details = await refusal(front.submit(b"ok", request_id="mine", **changes))
        assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
        assert details["ErrorInfo"].domain == "queue.ai4thai"


async def test_without_request_id_every_call_is_a_new_job(front: Front) -> None:
    assert (await front.submit()).job_id != (await front.submit()).job_id


def conversation(**changes: Any) -> work_pb2.Work:
    work = work_pb2.Work()
    message = work.generate.messages.add(role=changes.get("role", 2))
    if "part" not in changes:
        message.parts.add(text="hi")
    elif changes["part"] is not None:
        message.parts.append(changes["part"])
    return work


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("work", {"work": work_pb2.Work()}),
        ("work.detect.images", {"work": work_pb2.Work(detect=work_pb2.DetectWork())}),
        ("work.detect.images", {"work": detect(*[b"ok"] * 1001)}),
        ("work.detect.images[1]", {"work": detect(b"ok", b"")}),
        ("work.detect.images[0].content", {"work": detect(b"x" * 2001)}),
        (
            "work.detect.images[0].media_id",
            {"work": work_pb2.Work(detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(media_id="sha256:1")]))},
        ),
        (
            "work.analyze.question",
            {"work": work_pb2.Work(analyze=work_pb2.AnalyzeWork(images=[work_pb2.MediaSource(content=b"ok")]))},
        ),
        ("work.generate.messages", {"work": work_pb2.Work(generate=work_pb2.GenerateWork())}),
        ("work.generate.messages", {"work": conversation(role=3)}),
        ("work.generate.messages[0].parts", {"work": conversation(part=None)}),
        ("work.generate.messages[0].parts[0]", {"work": conversation(part=work_pb2.WorkMessagePart())}),
        ("queue", {"queue": "Not A Queue"}),
        ("queue", {"queue": "x" * 65}),
        ("priority", {"priority": 9}),
        ("request_id", {"request_id": "x" * 129}),
        ("max_attempts", {"max_attempts": 21}),
        ("max_attempts", {"max_attempts": -1}),
        ("labels", {"labels": {str(number): "" for number in range(33)}}),
        ("labels", {"labels": {"x" * 129: ""}}),
        ("labels", {"labels": {"a=b": ""}}),
        ("deadline", {"deadline": Timestamp(seconds=1_000_000)}),
        ("deadline", {"deadline": Timestamp(seconds=-5)}),
        ("not_before_time", {"not_before_time": Timestamp(seconds=99_999_999_999)}),
        ("work", {"work": detect(*(bytes([number]) * 1900 for number in range(10)))}),
    ],
)
async def test_bad_fields_are_named(redis_url: str, field: str, fields: dict[str, Any]) -> None:
    async with serve(queue_settings(redis_url, max_image_bytes=2000, max_request_bytes=15_000)) as front:
        code, reason, details = await refusal(front.submit(**fields))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert details["BadRequest"].field_violations[0].field == field
        # And nothing was kept of it; images that were stored on the way die by themselves
        with redis.Redis.from_url(redis_url) as client:
            assert not client.keys("{vq}:job:*")
            assert all(client.ttl(key) > 0 for key in client.keys("{vq}:blob:*"))


async def test_an_unknown_media_id_is_not_found(front: Front) -> None:
    media_id = "sha256:" + "0" * 64
    work = work_pb2.Work(detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(media_id=media_id)]))
    code, reason, details = await refusal(front.submit(work=work))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND")
    assert details["ErrorInfo"].metadata["media_id"] == media_id


async def test_more_jobs_than_the_limit_are_refused(redis_url: str) -> None:
    async with serve(queue_settings(redis_url, max_depth=3, max_queues=1)) as front:
        for _ in range(3):
            await front.submit()
        code, reason, details = await refusal(front.submit())
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert details["RetryInfo"].retry_delay.seconds > 0
        # And a known request_id is still answered with its job
    async with serve(queue_settings(redis_url, max_queues=1)) as front:
        code, reason, _ = await refusal(front.submit(queue="another"))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")


async def test_a_full_redis_refuses_jobs_and_keeps_those_it_has(front: Front, redis_client, start_worker) -> None:
    # Given a waiting job, when Redis' memory is full
    kept = await front.submit(b"ok kept")
    redis_client.config_set("maxmemory", str(int(redis_client.info("memory")["used_memory"])))
    code, reason, details = await refusal(front.submit(b"ok" * 100_000))
    # Then a new one is refused, a job can be cancelled nevertheless, and with more memory jobs are accepted again
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert "RetryInfo" in details
    assert state((await front.stub.CancelJob(pb.CancelJobRequest(job_id=kept.job_id))).job) == "CANCELLED"
    redis_client.config_set("maxmemory", "256mb")
    async with asyncio.timeout(10):
        while True:
            try:
                await front.submit(b"ok later")
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)


async def test_unknown_jobs_are_not_found(front: Front) -> None:
    for job_id in ("0" * 32, "no such job", "{vq}:queues", "*"):
        for call in (
            front.stub.GetJob(pb.GetJobRequest(job_id=job_id)),
            front.stub.CancelJob(pb.CancelJobRequest(job_id=job_id)),
            front.stub.DeleteJob(pb.DeleteJobRequest(job_id=job_id)),
            front.watch(job_id),
        ):
            code, reason, _ = await refusal(call)
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
    code, reason, details = await refusal(front.stub.GetJob(pb.GetJobRequest()))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details["BadRequest"].field_violations[0].field == "job_id"


async def test_lists_are_paged_newest_first_and_filtered(front: Front) -> None:
    # Given nine jobs
    ids = []
    for number in range(9):
        work = detect(b"ok") if number % 3 else conversation()
        job = await front.submit(
            work=work, queue="even" if number % 2 == 0 else "odd", labels={"n": str(number), "all": ""}
        )
        ids.append(job.job_id)
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=ids[4]))

    async def listed(**filters: Any) -> list[int]:
        numbers, token = [], ""
        while True:
            page = await front.stub.ListJobs(pb.ListJobsRequest(page_token=token, **filters))
            assert len(page.jobs) <= (filters.get("page_size") or 50)
            numbers += [ids.index(job.job_id) for job in page.jobs]
            if not (token := page.next_page_token):
                return numbers

    # Then each filter finds its own, whatever the size of the pages
    for page_size in (0, 1, 2, 4, 9, 500):
        assert await listed(page_size=page_size) == [8, 7, 6, 5, 4, 3, 2, 1, 0]
        assert await listed(page_size=page_size, queue="even") == [8, 6, 4, 2, 0]
        assert await listed(page_size=page_size, kind="generate") == [6, 3, 0]
        assert await listed(page_size=page_size, label="n=7") == [7]
        assert await listed(page_size=page_size, label="n") == [8, 7, 6, 5, 4, 3, 2, 1, 0]
        assert await listed(page_size=page_size, label="none") == []
        assert await listed(page_size=page_size, states=[job_pb2.JOB_STATE_CANCELLED]) == [4]
        assert await listed(page_size=page_size, states=[1, 2, 6], queue="even", kind="detect") == [8, 4, 2]
    for bad in ({"page_size": 501}, {"page_size": -1}, {"page_token": "x"}, {"states": [77]}):
        code, _, _ = await refusal(front.stub.ListJobs(pb.ListJobsRequest(**bad)))
        assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_only_an_ended_job_can_be_deleted_and_leaves_nothing_behind(front: Front, redis_client) -> None:
    job = await front.submit(b"ok", request_id="mine")
    code, reason, _ = await refusal(front.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    await front.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
    assert (await refusal(front.get(job.job_id)))[0] == grpc.StatusCode.NOT_FOUND
    left = [key for key in redis_client.keys("*") if job.job_id.encode() in key]
    assert not left
    for index in ("{vq}:idx:all", "{vq}:idx:queue:default", "{vq}:idx:state:CANCELLED", "{vq}:ended"):
        assert redis_client.zcard(index) == 0
    # And the request_id is free again
    assert (await front.submit_response(b"other", request_id="mine")).created


async def test_images_live_as_long_as_a_job_needs_them(redis_url: str, redis_client) -> None:
    async with serve(queue_settings(redis_url, keep_media_s=0.5, keep_failed_media_s=0.5)) as front:
        # Given two jobs with the same image, waiting longer than images live by themselves
        first, second = await front.submit(b"ok shared"), await front.submit(b"ok shared")
        blob = "{vq}:blob:sha256:" + hashlib.sha256(b"ok shared").hexdigest()
        assert redis_client.ttl(blob) == -1
        # When one has ended, then the image stays; when both have, it dies soon
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=first.job_id))
        assert redis_client.ttl(blob) == -1
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=second.job_id))
        assert 0 <= redis_client.pttl(blob) <= 500
        await asyncio.sleep(0.6)
        assert not redis_client.keys("{vq}:blob:*")


async def test_ended_jobs_are_forgotten_after_their_lifetime(redis_url: str, redis_client) -> None:
    async with serve(queue_settings(redis_url, keep_ended_s=0.3)) as front:
        job = await front.submit()
        cancelled = (await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))).job
        assert cancelled.expire_time.ToMilliseconds() - cancelled.end_time.ToMilliseconds() == 300
        until_s = time.monotonic() + 5
        while redis_client.exists("{vq}:job:" + job.job_id):
            assert time.monotonic() < until_s
            await asyncio.sleep(0.05)
        assert (await refusal(front.get(job.job_id)))[1] == "JOB_NOT_FOUND"
        assert redis_client.zcard("{vq}:idx:all") == 0


async def test_stats_tell_depth_age_and_latency(front: Front, start_worker) -> None:
    await front.submit(queue="a")
    await front.submit(queue="a", not_before_time=stamp(time.time() + 60))
    await asyncio.sleep(0.2)
    stats = {one.queue: one for one in (await front.stub.GetQueueStats(pb.GetQueueStatsRequest())).queues}
    one = stats["a"]
    assert (one.depth, one.scheduled, one.running, one.backlog) == (1, 1, 0, 1)
    assert 0.1 < one.oldest_age.ToMilliseconds() / 1000 < 5
    assert not one.HasField("latency_p50")
    await start_worker()
    job = await front.submit(queue="b")
    await front.end(job.job_id)
    (two,) = (await front.stub.GetQueueStats(pb.GetQueueStatsRequest(queue="b"))).queues
    assert two.throughput_per_second > 0
    assert not two.HasField("oldest_age")
    ended = await front.get(job.job_id)
    took_ms = ended.end_time.ToMilliseconds() - ended.create_time.ToMilliseconds()
    assert took_ms / 1.15 - 1 <= two.latency_p50.ToMilliseconds() <= took_ms * 1.15 + 1
    assert two.latency_p95 == two.latency_p50
