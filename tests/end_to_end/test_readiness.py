"""A vision server's life: live at once, ready when its models are, gone in order."""

from __future__ import annotations

import queue as queues
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from ai4thai.vision.v1 import image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from grpc_health.v1 import health_pb2

from tests.end_to_end.calling import Refusal, Server, detect_request, generate_request, refused
from tests.end_to_end.conftest import READY_S, TIMES, wait_until
from tests.end_to_end.pictures import assert_all_found, foreign, jpeg
from tests.processes import ServerProcess

VISION = "ai4thai.vision.v1.VisionService"
STATES = ["PENDING", "LOADING", "WARMING_UP", "READY"]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PICTURE = foreign(3, 3, 3)
GOOD = jpeg(PICTURE.image)


@dataclass
class Start:
    """What a caller saw of a server that began."""

    server: Server
    until_listening_s: float
    live: httpx.Response
    live_probe: int
    health: httpx.Response
    detailed: httpx.Response
    ready_probe: int
    info: dict[str, Any]
    detect: Refusal
    history: list[dict[str, Any]] = field(default_factory=list)
    """/info, again and again until no model was on its way any more."""

    def models(self) -> dict[str, dict[str, Any]]:
        """The models by name, as they are now."""
        return {model["name"]: model for model in self.server.web.get("/info").json()["models"]}


def probe(server: Server, service: str) -> int:
    return int(server.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A server with the shipped models and two that cannot be loaded: one is garbage, one is nowhere."""
    data_dir: Path = tmp_path_factory.mktemp("broken")
    (data_dir / "models").mkdir()
    (data_dir / "models" / "nonsense.pt").write_bytes(b"these are no weights" * 1000)
    env = {
        **TIMES,
        "AI4THAI_DATA_DIR": str(data_dir),
        "VISION_SERVICE_PORT": "0",
        "VISION_DETECTOR": "shapes-detector,nonsense.pt,absent.pt",
        "VISION_OFFLINE": "true",
        "SERVING_UNREADY_SECONDS": "0.5",
    }
    began_s = time.monotonic()
    with ServerProcess("vision_server", env=env) as process:
        process.wait_for("listening")
        until_listening_s = time.monotonic() - began_s
        server = Server(process)
        seen = Start(
            server,
            until_listening_s,
            live=server.web.get("/health/live"),
            live_probe=probe(server, ""),
            health=server.web.get("/health"),
            detailed=server.web.get("/health/detailed"),
            ready_probe=probe(server, VISION),
            info=server.web.get("/info").json(),
            detect=refused(lambda: server.vision.Detect(detect_request(GOOD), timeout=30)),
        )
        until_s = time.monotonic() + READY_S
        while True:
            seen.history.append(server.web.get("/info").json())
            if {model["state"] for model in seen.history[-1]["models"]} <= {"MODEL_STATE_READY", "MODEL_STATE_FAILED"}:
                break
            assert time.monotonic() < until_s, seen.history[-1]
            time.sleep(0.05)
        yield seen
        server.close()


def test_the_server_is_live_before_anything_is_loaded(started: Start) -> None:
    assert (started.live.status_code, started.live.json()) == (200, {"status": "SERVING"})
    assert started.live_probe == SERVING
    # It takes about a second; the bound is wide because tests may share their machine with others.
    assert started.until_listening_s < 15


def test_it_says_that_it_is_not_ready_and_why(started: Start) -> None:
    assert started.health.status_code == 503
    body = started.health.json()
    assert body["status"] == "NOT_SERVING"
    assert any("loading" in why for why in body["why"])
    assert started.ready_probe == NOT_SERVING
    assert started.detailed.status_code == 503
    assert started.detailed.json()["why"] == body["why"]


def test_a_caller_is_told_to_come_back(started: Start) -> None:
    assert (started.detect.code, started.detect.reason) == ("UNAVAILABLE", "MODEL_LOADING")
    assert started.detect.retry_after_s is not None and started.detect.retry_after_s > 0
    assert "shapes-detector" in started.detect.message


@pytest.mark.parametrize("name", ["shapes-detector", "shapes-describer"])
def test_loading_shows_its_progress(started: Start, name: str) -> None:
    history = [model for info in [started.info, *started.history] for model in info["models"] if model["name"] == name]
    states = [model["state"].removeprefix("MODEL_STATE_") for model in history]
    assert states == sorted(states, key=STATES.index)
    assert states[0] != "READY" and states[-1] == "READY"
    progress = [model["load_progress"] for model in history]
    assert progress == sorted(progress)
    assert progress[0] < 1 and progress[-1] == 1
    assert len(set(states)) >= 3 or len(set(progress)) >= 3, (states, progress)


@pytest.mark.parametrize("name", ["nonsense.pt", "absent.pt"])
def test_a_model_that_cannot_be_loaded_says_why_everywhere(started: Start, name: str) -> None:
    model = started.models()[name]
    assert model["state"] == "MODEL_STATE_FAILED"
    reason = model["state_reason"]
    assert len(reason) > 20 and "Traceback" not in reason
    check = started.server.web.get("/health/detailed").json()["checks"][f"model/{name}"]
    assert check["status"] == "NOT_OK"
    assert reason in check["detail"]
    assert probe(started.server, f"model/{name}") == NOT_SERVING
    logged = [line for line in started.server.process.events if line.get("model") == name and "reason" in line]
    assert [(line["level"], line["reason"]) for line in logged] == [("error", reason)]
    said = refused(lambda: started.server.vision.Detect(detect_request(GOOD, model=name), timeout=30))
    assert (said.code, said.reason) == ("FAILED_PRECONDITION", "MODEL_FAILED")
    assert reason in said.message


def test_the_others_serve_meanwhile(started: Start) -> None:
    server = started.server
    assert probe(server, "") == SERVING
    assert probe(server, "model/shapes-detector") == SERVING
    assert probe(server, "model/shapes-describer") == SERVING
    assert_all_found(server.vision.Detect(detect_request(GOOD), timeout=20).detections, PICTURE)
    *_, last = server.vision.Generate(generate_request(GOOD, "How many shapes are there?"), timeout=30)
    assert last.summary.text == "There are 3."
    assert server.web.get("/info").json()["ready"] is False


def test_sigterm_answers_the_frames_of_a_running_stream_and_tells_it_to_go_elsewhere(started: Start) -> None:
    """The last test of this process: it ends it."""
    server, sending = started.server, queues.SimpleQueue[pb.DetectStreamRequest | None]()

    def send(frame_id: int) -> None:
        sending.put(pb.DetectStreamRequest(frame=pb.Frame(frame_id=frame_id, image=image_pb2.Image(content=GOOD))))

    sending.put(pb.DetectStreamRequest(config=pb.StreamConfig()))
    for number in range(5):
        send(number)
    call = server.vision.DetectStream(iter(sending.get, None), timeout=60)
    numbers = [next(call).result.frame_id for _ in range(2)]
    watch = server.health.Watch(health_pb2.HealthCheckRequest(service="model/shapes-detector"), timeout=30)
    assert next(watch).status == SERVING

    server.process.signal(signal.SIGTERM)
    assert next(watch).status == NOT_SERVING  # not ready comes before not accepting
    server.process.wait_for("draining")

    def refuses() -> bool:
        try:
            httpx.get(f"http://{server.address}/health", trust_env=False)
        except httpx.TransportError:
            return True
        return False

    wait_until("the port is closed to new callers", refuses, timeout_s=10)
    send(5)  # a camera goes on: nobody reads it here any more
    results = []
    said = refused(lambda: results.extend(call))
    assert [*numbers, *(response.result.frame_id for response in results)] == list(range(5))
    assert_all_found(results[-1].result.detection.detections, PICTURE)
    assert (said.code, said.reason) == ("UNAVAILABLE", "DRAINING")
    assert said.retry_after_s
    sending.put(None)
    assert server.process.wait(30) == 0
    assert server.process.events[-1]["event"] == "stopped"
    with pytest.raises(grpc.RpcError):
        server.vision.Detect(detect_request(GOOD), timeout=5)
