"""A real Redis-protocol server, a real queue server on a real socket, real workers, a vision server that does as it is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from ai4thai.queue.v1 import job_pb2, queue_service_pb2_grpc, work_pb2
from ai4thai.queue.v1 import queue_service_pb2 as pb

from queue_server.broker import Broker
from queue_server.service import NAME, QueueService
from queue_server.settings import QueueSettings, WorkerSettings
from queue_server.worker import Worker
from serving.health import Health
from serving.rpc import build_server
from serving.settings import ServingSettings
from tests.queue_server.fake_vision import FakeVision

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' workers, which run beside this one's, neither leave anything there nor clean up."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.fixture(scope="session")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    broker = Broker(tmp_path_factory.mktemp("broker"), 0, "256mb")
    try:
        yield broker.start().url
    finally:
        broker.stop()


@pytest.fixture
def redis_url(broker_url: str) -> Iterator[str]:
    """Redis with nothing in it."""
    with redis.Redis.from_url(broker_url) as client:
        client.flushall()
        yield broker_url
        client.config_set("maxmemory", "256mb")


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def vision() -> Iterator[FakeVision]:
    fake = FakeVision()
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()


def queue_settings(redis_url: str, **changes: Any) -> QueueSettings:
    """Quick ones: sweeps each 0.1 s."""
    defaults: dict[str, Any] = {"redis_url": redis_url, "sweep_s": 0.1, "lease_s": 2.0, "overdue_s": 1.0}
    return QueueSettings(**{**defaults, **changes})


def worker_settings(redis_url: str, vision_address: str, **changes: Any) -> WorkerSettings:
    """Quick ones: retries from 0.1 s."""
    defaults: dict[str, Any] = {
        "redis_url": redis_url,
        "vision_address": vision_address,
        "worker_threads": 4,
        # Nobody loses a job because this machine stands still for a moment: a test that wants that says so.
        "lease_s": 20.0,
        "renew_s": 0.5,
        "watch_s": 0.1,
        "retry_first_s": 0.1,
        "retry_limit_s": 0.5,
        "circuit_limit_s": 0.3,
        "vision_connect_s": 0.5,
    }
    return WorkerSettings(**{**defaults, **changes})


class Front:
    """The queue server's front door."""

    def __init__(self, channel: grpc.aio.Channel, service: QueueService, health: Health, address: str = "") -> None:
        self.address = address
        self.stub: Any = queue_service_pb2_grpc.QueueServiceStub(channel)
        self.service = service
        self.health = health

    async def submit(self, *images: bytes, **fields: Any) -> job_pb2.Job:
        return (await self.submit_response(*images, **fields)).job

    async def submit_response(self, *images: bytes, **fields: Any) -> pb.SubmitJobResponse:
        fields.setdefault("work", detect(*(images or (b"ok",))))
        response: pb.SubmitJobResponse = await self.stub.SubmitJob(pb.SubmitJobRequest(**fields))
        return response

    async def get(self, job_id: str) -> job_pb2.Job:
        job: job_pb2.Job = (await self.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job
        return job

    async def watch(self, job_id: str, after_revision: int = 0) -> list[pb.WatchJobResponse]:
        """Every message, to the end."""
        request = pb.WatchJobRequest(job_id=job_id, after_revision=after_revision)
        return [response async for response in self.stub.WatchJob(request)]

    async def end(self, job_id: str, timeout_s: float = 20) -> job_pb2.Job:
        """The job at its end."""
        async with asyncio.timeout(timeout_s):
            return (await self.watch(job_id))[-1].job

    async def until(self, job_id: str, true: Callable[[job_pb2.Job], bool], timeout_s: float = 10) -> job_pb2.Job:
        """The job once something is true of it."""
        async with asyncio.timeout(timeout_s):
            while True:
                job = await self.get(job_id)
                if true(job):
                    return job
                await asyncio.sleep(0.02)


def detect(*images: bytes) -> work_pb2.Work:
    return work_pb2.Work(detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(content=image) for image in images]))


def state(job: job_pb2.Job) -> str:
    return job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")


def let_pass(client: redis.Redis, index: str, job_id: str) -> None:
    """A job's time in an index (keys.DEADLINES, LEASES, …): Redis' clock cannot be turned, so what it is compared with is."""
    client.zadd(index, {job_id: 1}, xx=True)


@asynccontextmanager
async def serve(settings: QueueSettings) -> AsyncIterator[Front]:
    """A queue server on a port of its own, for as long as the block takes."""
    service, health = QueueService(settings, "test"), Health()
    server = build_server(service.add_to, [NAME], service.domain, health, ServingSettings())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await service.start(health)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Front(channel, service, health, f"127.0.0.1:{port}")
    finally:
        await server.stop(0.2)
        await service.stop()
        await health.stop()


@pytest.fixture
async def front(redis_url: str) -> AsyncIterator[Front]:
    async with serve(queue_settings(redis_url)) as front:
        yield front


@pytest.fixture
def start_worker(redis_url: str, vision: FakeVision) -> Iterator[Callable[..., Awaitable[Worker]]]:
    """Starts a worker in this process; the changes are those of its settings."""
    workers: list[Worker] = []

    async def start(**changes: Any) -> Worker:
        url, address = changes.pop("redis_url", redis_url), changes.pop("vision_address", vision.address)
        settings = worker_settings(url, address, **changes)
        worker = Worker(settings)
        workers.append(worker)
        await asyncio.to_thread(worker.start)
        return worker

    yield start
    for worker in workers:
        worker.stop()


class Process:
    """A process of ours, `python -m module`."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "clients:.", "SERVING_LOG_FORMAT": "json", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = 15) -> int:
        return self.popen.wait(timeout_s)

    def lines_until(self, text: str, timeout_s: float = 20) -> list[str]:
        """The lines of stderr up to the one that has the text."""
        lines: list[str] = []
        until_s = time.monotonic() + timeout_s
        assert self.popen.stderr is not None
        while time.monotonic() < until_s:
            line = self.popen.stderr.readline()
            if not line:
                break
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"{text!r} did not come; {''.join(lines)}")


@pytest.fixture
def start_process() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(module: str, *arguments: str, **environment: str) -> Process:
        processes.append(Process(module, *arguments, **environment))
        return processes[-1]

    yield start
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.communicate()


def worker_environment(redis_url: str, vision: FakeVision, **changes: str) -> dict[str, str]:
    """The settings of a worker process, as quick as those above; it may be killed, so its lease is 2 s."""
    settings = worker_settings(redis_url, vision.address, lease_s=2.0)
    names = ("worker_threads", "lease_s", "renew_s", "watch_s", "retry_first_s", "retry_limit_s", "vision_connect_s")
    return {
        "REDIS_URL": redis_url,
        "QUEUE_VISION_ADDRESS": vision.address,
        **{f"QUEUE_{name.upper()}": str(getattr(settings, name)) for name in names},
        **changes,
    }
