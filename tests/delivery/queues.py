"""One Redis, and queue servers with workers that come and go behind the edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.processes import Measured
from benchmarks.rehearsal import Version
from benchmarks.rehearsal_parts import ROOT, Server, wait_until
from tests.delivery.fleet import UNREADY_S, Fleet


@dataclass
class QueueSide:
    """Makes what stands behind the edge's queue door."""

    fleet: Fleet
    url: str
    folder: Path

    def version(self, name: str, place: int, url: str = "") -> Version:
        """A queue server at one of the two places that the edge knows, and a worker; not started."""
        port = self.fleet.queue_ports[place]
        env = {
            "REDIS_URL": url or self.url,
            "SERVING_HOST": "127.0.0.1",
            "SERVING_UNREADY_SECONDS": f"{UNREADY_S:g}",
            "QUEUE_WORKER_PORT": str(port),
            "QUEUE_VISION_ADDRESS": self.fleet.vision,
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(self.fleet.certificates.authority),
            "QUEUE_LEASE_S": "4",
            "QUEUE_RENEW_S": "0.5",
        }
        queue = Server(f"{name}-queue", "queue_server", env, self.folder, port=port)
        return Version(name, ROOT, [], queue, [Server(f"{name}-worker", "queue_server.worker", env, self.folder)])

    @contextmanager
    def running(self, name: str, place: int = 0, url: str = "") -> Iterator[Version]:
        """The same, ready and known to the edge; killed at the block's end."""
        version = self.version(name, place, url)
        parts = (version.queue, *version.workers)
        try:
            for part in parts:
                part.start()
            version.queue.wait_until_ready()
            for cluster in ("queue_grpc", "queue_json"):
                wait_until(
                    "the edge knows it",
                    lambda cluster=cluster: version.queue.address in self.fleet.edge.healthy(cluster),
                )
            wait_until("a worker is there", lambda: version.workers[0].events("working"))
            yield version
        finally:
            for part in parts:
                part.kill()


@pytest.fixture(scope="module")
def queue_side(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueSide]:
    """A Redis of its own for each file of tests."""
    folder = tmp_path_factory.mktemp("queues")
    with Measured("queue_server.broker", "--port", "0", "--data-dir", str(folder / "redis"), ready="ready") as broker:
        yield QueueSide(fleet, broker.url, folder)
