"""Three vision servers, two places for queue servers and the edge before them: started once for all tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from ai4thai import VisionClient
from ai4thai.vision.v1 import image_pb2, vision_service_pb2, vision_service_pb2_grpc

from benchmarks.rehearsal_parts import ROOT, Certificates, Edge, Server, wait_until
from tests.ports import free_port
from tests.programs import needed

SCENE = ROOT / "clients" / "ai4thai" / "samples" / "scene-01.jpg"
UNREADY_S = 3.0
"""After SIGTERM the servers say so long that they are not ready before they refuse calls; the edge asks each 2 s."""


@dataclass
class Fleet:
    """The servers, whoever of them is alive, and the edge's door."""

    folder: Path
    servers: Sequence[Server]
    queue_ports: Sequence[int]
    certificates: Certificates
    tls: Path
    edge: Edge

    @property
    def vision(self) -> str:
        """The edge's address for vision."""
        return f"grpcs://localhost:{self.edge.vision_port}"

    @property
    def queue(self) -> str:
        """The edge's address for the queue."""
        return f"grpcs://localhost:{self.edge.queue_port}"

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """With which the edge's certificate is believed."""
        return grpc.ssl_channel_credentials(self.certificates.authority.read_bytes())

    def serving(self) -> set[str]:
        """The vision servers that the edge sends calls to."""
        return self.edge.healthy("vision_grpc")

    def wait_until_whole(self) -> None:
        """All three are there and get calls of both kinds."""
        for server in self.servers:
            if not server.is_alive:
                server.start()
        for server in self.servers:
            server.wait_until_ready()
        for cluster in ("vision_grpc", "vision_json"):
            wait_until(f"{cluster} is whole", lambda cluster=cluster: len(self.edge.healthy(cluster)) == 3)


@dataclass
class Load:
    """What the callers of `calling` have met so far."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    """Of the Python client, which repeats what is safe to repeat."""
    bare_failures: list[str] = field(default_factory=list)
    """Of stubs on gRPC's own channel, which repeats nothing that a server may have seen."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, call: Callable[[], Any], failures: list[str]) -> None:
        """Makes a call and counts how it ended."""
        try:
            call()
        except Exception as error:
            with self._lock:
                failures.append(repr(error))
        else:
            with self._lock:
                self.answers += 1

    def wait_for_more(self, count: int) -> None:
        """Until so many more calls have been answered."""
        wanted = self.answers + count
        wait_until(f"{count} more answers (failures: {self.failures[:3]})", lambda: self.answers >= wanted, 90)


@contextmanager
def calling(fleet: Fleet, clients: int = 3, bare: int = 3) -> Iterator[Load]:
    """Callers that call Detect one after the other as long as the block lasts, each over a connection of its own."""
    load, ended = Load(), threading.Event()
    content = SCENE.read_bytes()
    request = vision_service_pb2.DetectRequest(image=image_pb2.Image(content=content))

    def client_calls() -> None:
        with VisionClient(fleet.vision, credentials=fleet.credentials) as client:
            while not ended.is_set():
                load.note(lambda: client.detect(content), load.failures)

    def bare_calls() -> None:
        with grpc.secure_channel(fleet.vision.removeprefix("grpcs://"), fleet.credentials) as channel:
            stub: Any = vision_service_pb2_grpc.VisionServiceStub(channel)
            while not ended.is_set():
                load.note(lambda: stub.Detect(request, timeout=60), load.bare_failures)

    threads = [threading.Thread(target=client_calls) for _ in range(clients)]
    threads += [threading.Thread(target=bare_calls) for _ in range(bare)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        ended.set()
        for thread in threads:
            thread.join(90)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three vision servers with the shipped detector, behind the edge."""
    needed("openssl")
    folder = tmp_path_factory.mktemp("fleet")
    ports = [free_port() for _ in range(5)]
    certificates = Certificates(folder / "authority")
    tls = folder / "tls"
    certificates.renew(tls, "edge")
    servers = [
        Server(
            f"vision-{number}",
            "vision_server",
            {
                "AI4THAI_DATA_DIR": str(folder / "data"),
                **({} if number == 2 else {"VISION_DESCRIBER": ""}),
                "VISION_SERVICE_PORT": str(port),
                "SERVING_HOST": "127.0.0.1",
                "SERVING_UNREADY_SECONDS": f"{UNREADY_S:g}",
            },
            folder,
            port=port,
        )
        for number, port in enumerate(ports[:3])
    ]
    edge = Edge(
        folder,
        tls,
        ports=[free_port() for _ in range(4)],
        vision=[server.address for server in servers],
        queue=[f"127.0.0.1:{port}" for port in ports[3:]],
    )
    whole = Fleet(folder, servers, ports[3:], certificates, tls, edge)
    with ExitStack() as ends:
        for part in (*servers, edge):
            ends.callback(part.kill)
            part.start()
        whole.wait_until_whole()
        yield whole
