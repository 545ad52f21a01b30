"""A Redis that comes back without its last second: who submitted learns it; what Redis promises is told."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import redis
from ai4thai.queue.v1 import queue_service_pb2 as pb

from queue_server import durability, keys
from queue_server.broker import Broker
from queue_server.service import NAME
from serving.health import Warned
from serving.telemetry import REGISTRY
from tests.ports import free_port
from tests.queue_server.conftest import Front, queue_settings, serve, state
from tests.queue_server.test_failover import serving
from tests.queue_server.test_submit import refusal


class FrailRedis:
    """A Redis that loses power: what it wrote last is not on its disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = Broker(folder, free_port(), "64mb")
        running = self.broker.start()
        self.url, self._port = running.url, running.port

    @property
    def _log(self) -> Path:
        # Redis 6.2 has one file, later ones have a folder.
        (path,) = [*self.folder.glob("appendonlydir/*.incr.aof"), *self.folder.glob("appendonly.aof")]
        return path

    def size_bytes(self) -> int:
        """How long the append-only file is, once all that was written is in it."""
        with redis.Redis.from_url(self.url) as client:
            client.config_set("appendfsync", "always")
            client.set("{vq}:mark", "here")
            client.delete("{vq}:mark")
            client.config_set("appendfsync", "everysec")
        return self._log.stat().st_size

    def lose_power(self, keep_bytes: int) -> None:
        """Kills it; of its file remain so many bytes."""
        process = self.broker._process
        assert process is not None
        process.kill()
        process.wait()
        self.broker.stop()
        os.truncate(self._log, keep_bytes)

    def start_again(self) -> None:
        """On the same port."""
        self.broker = Broker(self.folder, self._port, "64mb")
        self.broker.start()


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[FrailRedis]:
    frail = FrailRedis(tmp_path)
    yield frail
    frail.broker.stop()


def lost_count() -> float:
    return REGISTRY.get_sample_value("ai4thai_queue_jobs_lost_total") or 0.0


async def watched_to_its_end(front: Front, job_id: str) -> grpc.aio.AioRpcError:
    """Watches as a client does, again after each UNAVAILABLE, until another answer comes."""
    async with asyncio.timeout(20):
        while True:
            try:
                await front.watch(job_id)
                raise AssertionError("it ended")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    return error
                await asyncio.sleep(0.05)


async def test_the_submitter_learns_which_jobs_a_power_loss_has_taken(
    frail: FrailRedis, start_worker, start_process
) -> None:
    process = start_process("queue_server", REDIS_URL=frail.url, QUEUE_WORKER_PORT="0")
    (*_, line) = await asyncio.to_thread(process.lines_until, '"listening"')
    async with (
        serve(queue_settings(frail.url)) as front,
        grpc.aio.insecure_channel(f"127.0.0.1:{json.loads(line)['port']}") as channel,
    ):
        await serving(front, True)
        other = Front(channel, front.service, front.health)
        # Given jobs on disk, and a watched one that was acknowledged within the last second before the power fails
        kept = [await server.submit(request_id=f"kept {number}") for number, server in enumerate((front, other))]
        size_bytes = frail.size_bytes()
        lost = await front.submit(request_id="lost")
        unwatched = await front.submit()
        watch = asyncio.create_task(watched_to_its_end(front, lost.job_id))
        await asyncio.sleep(0.2)
        frail.lose_power(size_bytes)
        with pytest.raises(grpc.aio.AioRpcError) as away:
            await front.get(lost.job_id)
        assert away.value.code() is grpc.StatusCode.UNAVAILABLE
        frail.start_again()
        # Then the watch ends with the truth, and so does every question at any server
        error = await watch
        assert error.code() is grpc.StatusCode.NOT_FOUND
        for server in (front, other):
            for call in (
                server.get(lost.job_id),
                server.stub.CancelJob(pb.CancelJobRequest(job_id=lost.job_id)),
                server.stub.DeleteJob(pb.DeleteJobRequest(job_id=lost.job_id)),
                server.stub.RetryJob(pb.RetryJobRequest(job_id=lost.job_id)),
                server.watch(lost.job_id),
            ):
                code, reason, details = await refusal(call)
                assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "JOB_LOST")
                assert details["ErrorInfo"].metadata["request_id"] == "lost"
        assert (await refusal(front.get(unwatched.job_id)))[1] == "JOB_LOST"
        assert (await refusal(front.get("0" * 26)))[1] == "JOB_NOT_FOUND"
        assert lost_count() == 2
        # And the others are there, the same request_id makes a new job, all of them are done
        again = await front.submit(request_id="lost")
        assert again.job_id != lost.job_id
        await start_worker(redis_url=frail.url)
        for job in (*kept, again):
            assert state(await front.end(job.job_id)) == "SUCCEEDED"
    # And a server that was started later knows it too
    async with serve(queue_settings(frail.url)) as later:
        assert (await refusal(later.get(lost.job_id)))[1] == "JOB_LOST"


async def test_a_watcher_of_a_job_that_was_set_back_sees_its_end(frail: FrailRedis, start_worker) -> None:
    async with serve(queue_settings(frail.url)) as front:
        job = await front.submit()
        size_bytes = frail.size_bytes()
        # Given a watcher that has seen changes which Redis loses
        seen: list[pb.WatchJobResponse] = []
        watch = front.service._watches.watch(job.job_id, 0)
        with redis.Redis.from_url(frail.url) as client:
            first = await anext(watch)
            assert first.revision == 1
            for number in range(5):
                client.eval(
                    "redis.call('HINCRBY', KEYS[1], 'rev', 1)"
                    "redis.call('RPUSH', KEYS[1] .. ':ev', cjson.encode({msg = 'x', rev = ARGV[1]}))"
                    "redis.call('XADD', KEYS[2], '*', 'j', ARGV[2])",
                    2,
                    keys.job(job.job_id),
                    keys.DOOR,
                    number + 2,
                    job.job_id,
                )
        for _ in range(5):
            assert (await anext(watch)).revision > 1
        frail.lose_power(size_bytes)
        frail.start_again()
        await serving(front, True)
        await start_worker(redis_url=frail.url)
        # Then it is told of the job as it is now, and of its end
        async with asyncio.timeout(15):
            seen = [change async for change in watch]
        assert seen[-1].state == "SUCCEEDED" and [one.state for one in seen].count("SUCCEEDED") == 1
        assert seen[0].revision < 6


async def test_a_deleted_job_is_not_a_lost_one(frail: FrailRedis) -> None:
    async with serve(queue_settings(frail.url)) as front:
        await serving(front, True)
        job = await front.submit()
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        await front.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.job_id))
        frail.lose_power(frail.size_bytes())
        frail.start_again()
        await serving(front, True)
        began_s = time.monotonic()
        assert (await refusal(front.get(job.job_id)))[1] == "JOB_NOT_FOUND"
        # It has waited until the other servers have found out what they have lost.
        assert time.monotonic() - began_s < 5
        assert lost_count() == 0


@pytest.mark.parametrize(
    ("info", "config", "promise", "warns"),
    [
        ({"aof_enabled": 1}, {"appendfsync": "always"}, "nothing", False),
        ({"aof_enabled": 1}, {"appendfsync": "everysec", "save": ""}, "at most the last second", False),
        ({"aof_enabled": 1}, {"appendfsync": "no"}, "half a minute", True),
        ({"aof_enabled": 1}, None, "cannot be read", False),
        ({"aof_enabled": 1, "aof_last_write_status": "err"}, {"appendfsync": "always"}, "cannot be written", True),
        ({"aof_enabled": 0}, {"save": "3600 1"}, "since the last snapshot", True),
        ({"aof_enabled": 0}, {"save": ""}, "loses every job (nothing is on disk)", True),
        ({}, None, "unknown", True),
    ],
)
def test_the_promise_is_read_from_redis_own_settings(info, config, promise: str, warns: bool) -> None:
    judged = durability.judge(info, config)
    assert promise in judged.promise
    assert bool(judged.warning) == warns


async def test_health_warns_of_a_redis_that_keeps_nothing_on_disk(frail: FrailRedis) -> None:
    async with serve(queue_settings(frail.url)) as front:
        await serving(front, True)
        (check,) = [check for check in front.health.checks if check.name == "redis"]
        assert not check.warns and "at most the last second" in check.detail
    with redis.Redis.from_url(frail.url) as client:
        client.config_set("appendonly", "no")
        client.config_set("save", "")
    async with serve(queue_settings(frail.url)) as front:
        # It is used all the same
        await serving(front, True)
        (check,) = [check for check in front.health.checks if check.name == "redis"]
        assert check.ok and check.status == "WARNING" and isinstance(check.detail, Warned)
        assert "nothing on disk" in check.detail and "appendonly yes" in check.detail


async def test_a_replica_is_not_used(frail: FrailRedis, redis_url) -> None:
    with redis.Redis.from_url(frail.url) as client:
        client.replicaof("127.0.0.1", int(redis_url.rpartition(":")[2].split("/")[0]))
    async with serve(queue_settings(frail.url)) as front:
        async with asyncio.timeout(10):
            while not any("replica" in why for why in front.health.why_not(NAME)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        code, reason, _ = await refusal(front.submit())
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
