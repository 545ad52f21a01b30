"""The whole platform as processes: a broker, a vision server, a queue server, two workers; started once for all tests."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.calling import Server
from tests.end_to_end.picture_host import picture_host
from tests.end_to_end.pictures import Picture, foreign, jpeg
from tests.end_to_end.unharmed import before, served_as_before
from tests.processes import ServerProcess

__all__ = ["before", "served_as_before"]  # fixtures of unharmed.py

READY_S = 110
WORKERS = 2

# Short enough to be waited for; everything else is as an operator finds it.
TIMES = {
    "SERVING_FIRST_BYTES_SECONDS": "4",
    "SERVING_HTTP_REQUEST_SECONDS": "6",
    "QUEUE_LEASE_S": "4",
    "QUEUE_RENEW_S": "0.5",
}


def wait_until(what: str, holds: Callable[[], object], timeout_s: float = 30) -> None:
    """Waits for something that is to come about by itself."""
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)


def wait_until_ready(process: ServerProcess, timeout_s: float = READY_S) -> None:
    """Waits for GET /health to say 200; tells what was missing, and the log's end, when it does not come."""
    until_s = time.monotonic() + timeout_s
    url = f"http://{process.address}/health"
    while True:
        try:  # an answer may take its time while models are loaded on a machine that is busy
            answer = httpx.get(url, trust_env=False, timeout=30)
        except httpx.TransportError as error:
            missing = repr(error)
        else:
            if answer.status_code == 200:
                return
            missing = answer.text
        if process.process.poll() is not None or time.monotonic() > until_s:
            raise AssertionError(f"not ready: {missing}; the log ends:\n" + "".join(process.lines[-40:]))
        time.sleep(0.1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the platform keeps what it keeps."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def pictures_at() -> Iterator[str]:
    """`host:port` that the vision server may fetch pictures from."""
    with picture_host() as place:
        yield place


@pytest.fixture(scope="session")
def vision_process(data_dir: Path, pictures_at: str) -> Iterator[ServerProcess]:
    """The vision server with the shipped models, perhaps still loading."""
    env = {
        **TIMES,
        "AI4THAI_DATA_DIR": str(data_dir),
        "VISION_SERVICE_PORT": "0",
        "VISION_IMAGE_URL_HOSTS": pictures_at,
    }
    with ServerProcess("vision_server", env=env) as process:
        yield process


@pytest.fixture(scope="session")
def redis_url(data_dir: Path) -> Iterator[str]:
    """The embedded broker's address."""
    with ServerProcess("queue_server.broker", "--port", "0", "--data-dir", str(data_dir / "broker")) as broker:
        wait_until("the broker's address", lambda: any(line.startswith("redis://") for line in broker.lines))
        yield next(line.strip() for line in broker.lines if line.startswith("redis://"))


@pytest.fixture(scope="session")
def queue_process(vision_process: ServerProcess, redis_url: str) -> Iterator[ServerProcess]:
    """The queue server."""
    env = {**TIMES, "REDIS_URL": redis_url, "QUEUE_WORKER_PORT": "0"}
    with ServerProcess("queue_server", env=env) as process:
        yield process


@pytest.fixture(scope="session")
def vision(vision_process: ServerProcess) -> Iterator[Server]:
    """The vision server, ready."""
    wait_until_ready(vision_process)
    server = Server(vision_process)
    yield server
    server.close()


@pytest.fixture(scope="session")
def queue(queue_process: ServerProcess) -> Iterator[Server]:
    """The queue server, ready; no worker is promised."""
    wait_until_ready(queue_process)
    server = Server(queue_process)
    yield server
    server.close()


@pytest.fixture(scope="session")
def workers(vision_process: ServerProcess, redis_url: str, queue: Server) -> Iterator[list[ServerProcess]]:
    """Two workers, known to the queue server."""
    env = {**TIMES, "REDIS_URL": redis_url, "QUEUE_VISION_ADDRESS": vision_process.address}
    with ExitStack() as running:
        processes = [running.enter_context(ServerProcess("queue_server.worker", env=env)) for _ in range(WORKERS)]
        for process in processes:
            process.wait_for("working")
        wait_until("the workers are listed", lambda: len(queue.web.get("/v1/workers").json()["workers"]) == WORKERS)
        yield processes


@pytest.fixture(scope="session")
def picture() -> Picture:
    """A scene of three shapes."""
    return foreign(3, 3, 3)


@pytest.fixture(scope="session")
def detect_body(picture: Picture) -> str:
    """A DetectRequest in JSON, the image in base64."""
    return json.dumps({"image": {"content": base64.b64encode(jpeg(picture.image)).decode()}})
