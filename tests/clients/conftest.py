from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from ai4thai import AsyncQueueClient, AsyncVisionClient, QueueClient, VisionClient, channel

from tests.clients.fake_servers import FakeQueue, FakeServer, FakeVision


@pytest.fixture
def vision_server() -> Iterator[FakeServer]:
    with FakeServer(FakeVision()) as server:
        yield server


@pytest.fixture
def queue_server() -> Iterator[FakeServer]:
    with FakeServer(FakeQueue()) as server:
        yield server


@pytest.fixture
def fake_vision(vision_server: FakeServer) -> FakeVision:
    assert isinstance(vision_server.fake, FakeVision)
    return vision_server.fake


@pytest.fixture
def fake_queue(queue_server: FakeServer) -> FakeQueue:
    assert isinstance(queue_server.fake, FakeQueue)
    return queue_server.fake


@pytest.fixture
def vision(vision_server: FakeServer) -> Iterator[VisionClient]:
    with VisionClient(vision_server.address, timeout_s=20) as client:
        yield client


@pytest.fixture
def queue(queue_server: FakeServer) -> Iterator[QueueClient]:
    with QueueClient(queue_server.address, timeout_s=20) as client:
        yield client


@pytest.fixture
async def async_vision(vision_server: FakeServer) -> AsyncIterator[AsyncVisionClient]:
    async with AsyncVisionClient(vision_server.address, timeout_s=20) as client:
        yield client


@pytest.fixture
async def async_queue(queue_server: FakeServer) -> AsyncIterator[AsyncQueueClient]:
    async with AsyncQueueClient(queue_server.address, timeout_s=20) as client:
        yield client


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that are made from now on try as often as ever, with shorter pauses. test_retries.py has the true ones."""
    (methods,) = channel.SERVICE_CONFIG["methodConfig"]
    quick = {**methods, "retryPolicy": {**channel.RETRY_CONFIG, "initialBackoff": "0.01s"}}
    config = json.dumps({**channel.SERVICE_CONFIG, "methodConfig": [quick]})
    options = {**dict(channel._OPTIONS), "grpc.service_config": config}
    monkeypatch.setattr(channel, "_OPTIONS", tuple(options.items()))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file that the fakes take for an image."""
    path = tmp_path / "scene.jpg"
    path.write_bytes(b"\xff\xd8 a picture")
    return path
