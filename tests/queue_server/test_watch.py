"""A watcher hears every change once and in order, from where it left off to the job's end."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from ai4thai.queue.v1 import queue_service_pb2 as pb

from queue_server.jobs import JobState, Progress
from queue_server.worker_store import Claim, Outcome, WorkerStore
from tests.queue_server.conftest import Front, queue_settings, serve, state, worker_settings
from tests.queue_server.test_submit import refusal


async def test_every_change_once_and_in_order_to_the_end(front: Front, start_worker, vision) -> None:
    # Given a watcher of a waiting job
    job = await front.submit(b"ok", b"slow", b"ok")
    watching = asyncio.create_task(front.watch(job.job_id))
    await start_worker()
    # When it runs, has done one image, then the rest
    await front.until(job.job_id, lambda now: now.progress.completed_count == 1)
    vision.release()
    seen = await watching
    # Then each revision came once, in order, with the job as it was then; the last is the job at its end
    assert [one.revision for one in seen] == list(range(1, len(seen) + 1))
    assert all(one.revision == one.job.revision for one in seen)
    states = [state(one.job) for one in seen]
    assert states[0] == "QUEUED" and states[1] == "RUNNING" and states[-1] == "SUCCEEDED"
    assert [state for state in states if state == "SUCCEEDED"] == ["SUCCEEDED"]
    done = [one.job.progress.completed_count for one in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 3 and 1 in done
    assert [one.job.HasField("result") for one in seen] == [False] * (len(seen) - 1) + [True]
    assert not seen[0].job.attempts and len(seen[1].job.attempts) == 1
    assert seen[-1].job == await front.get(job.job_id)


async def test_a_watch_goes_on_where_it_broke_off(front: Front, start_worker) -> None:
    await start_worker()
    job = await front.submit(b"ok")
    whole = await front.watch(job.job_id)
    last = whole[-1].revision
    for revision in range(last):
        assert await front.watch(job.job_id, revision) == whole[revision:]
    # And one that has heard it all still hears how it ended
    assert await front.watch(job.job_id, last) == whole[-1:]
    code, reason, _ = await refusal(front.watch(job.job_id, last + 1))
    assert (code, reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION_OUT_OF_RANGE")
    code, _, _ = await refusal(front.watch(job.job_id, -1))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_many_watchers_of_many_jobs_hear_only_their_own(front: Front, start_worker) -> None:
    jobs = [await front.submit(f"ok {number}".encode()) for number in range(10)]
    watching = [asyncio.create_task(front.watch(job.job_id)) for job in jobs for _ in range(3)]
    await start_worker()
    for index, seen in enumerate(await asyncio.gather(*watching)):
        assert {one.job.job_id for one in seen} == {jobs[index // 3].job_id}
        assert [one.revision for one in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].job.result.detect.items[0].detection.model == f"ok {index // 3}"


async def test_a_change_reaches_a_watcher_at_once(front: Front) -> None:
    # Given a watcher that has heard the first change
    job = await front.submit()
    call = front.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))
    assert (await call.read()).revision == 1
    # When the job is cancelled, then it hears without waiting for its own next look (5 s)
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    async with asyncio.timeout(4.5):
        assert state((await call.read()).job) == "CANCELLED"
        assert await call.read() is grpc.aio.EOF


async def test_a_deleted_job_ends_its_watch(front: Front) -> None:
    job = await front.submit()
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    await front.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
    assert (await refusal(front.watch(job.job_id)))[1] == "JOB_NOT_FOUND"


async def test_watchers_are_bounded_and_leave_when_their_caller_does(redis_url: str) -> None:
    async with serve(queue_settings(redis_url, max_watchers=2)) as front:
        job = await front.submit()
        calls = [front.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)) for _ in range(2)]
        for call in calls:
            await call.read()
        code, reason, _ = await refusal(front.watch(job.job_id))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        calls[0].cancel()
        async with asyncio.timeout(5):
            while True:
                call = front.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))
                try:
                    await call.read()
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
        with pytest.raises(asyncio.CancelledError):
            await calls[0].read()


async def test_of_very_many_changes_the_last_thousand_are_kept(redis_url, front: Front, vision) -> None:
    # Given a job with more changes than are kept
    store = WorkerStore(worker_settings(redis_url, vision.address))
    store.start()
    job = await front.submit()
    claim = store.claim(job.job_id, 1, "claim", "w", b"")
    assert isinstance(claim, Claim)
    for number in range(1, 1201):
        assert store.renew(claim, Progress(number, 5000)) == "ok"
    store.finish(claim, Outcome(JobState.SUCCEEDED, Progress(5000, 5000)))
    store.stop()
    # Then a watcher hears those, each as it was, the first of them whole
    seen = await front.watch(job.job_id)
    last = 2 + 1200 + 1
    assert [one.revision for one in seen] == list(range(last - 999, last + 1))
    assert seen[0].job.queue == "default" and seen[0].job.attempts[0].worker == "w"
    assert seen[0].job.progress.completed_count == last - 999 - 2
    assert [state(one.job) for one in seen] == ["RUNNING"] * 999 + ["SUCCEEDED"]
    assert state(seen[-1].job) == "SUCCEEDED"
