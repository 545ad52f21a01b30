"""deploy/verify.sh against real servers: all right, still loading, and what can be wrong, by line and exit code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.end_to_end.conftest import wait_until
from tests.processes import ROOT, ServerProcess

VERIFY = ROOT / "deploy/verify.sh"
LINES = [
    *("vision /health", "queue /health", "vision /health/detailed", "queue /health/detailed"),
    *("vision /info", "queue /queue/stats", "vision detection", "queue job"),
]


@dataclass(frozen=True)
class Verified:
    """What verify.sh said: each line's mark and text by its name."""

    code: int
    output: str

    @property
    def marks(self) -> dict[str, str]:
        found = re.findall(r"^([✓✗–]) (\S+ \S+)", self.output, re.MULTILINE)
        return {name: mark for mark, name in found}

    @property
    def wrong(self) -> list[str]:
        return [name for name, mark in self.marks.items() if mark == "✗"]

    def line(self, name: str) -> str:
        return next(line for line in self.output.splitlines() if line[2:].startswith(f"{name} "))


def verify(vision: str, queue: str, *arguments: str, wait_s: int = 0) -> Verified:
    path = os.pathsep.join(["/usr/local/bin", "/usr/bin", "/bin", str(Path(sys.executable).parent)])
    done = subprocess.run(
        [VERIFY, "--vision", vision, "--queue", queue, "--wait", str(wait_s), *arguments],
        env={"PATH": path, "HOME": "/nonexistent", "LANG": "C.UTF-8"},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    return Verified(done.returncode, done.stdout)


@dataclass
class Platform:
    """A vision server, a queue server and a worker; `first` is what verify.sh said while the models were loading."""

    vision: ServerProcess
    queue: ServerProcess
    worker: ServerProcess
    first: Verified


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("verify")
    with ExitStack() as running:
        broker = running.enter_context(
            ServerProcess("queue_server.broker", "--port", "0", "--data-dir", str(folder / "broker"))
        )
        wait_until("the broker's address", lambda: any(line.startswith("redis://") for line in broker.lines))
        redis_url = next(line.strip() for line in broker.lines if line.startswith("redis://"))
        # The describer is left out, which takes seconds less to load.
        vision = running.enter_context(
            ServerProcess(
                "vision_server",
                env={"AI4THAI_DATA_DIR": str(folder), "VISION_SERVICE_PORT": "0", "VISION_DESCRIBER": ""},
            )
        )
        queue = running.enter_context(
            ServerProcess("queue_server", env={"REDIS_URL": redis_url, "QUEUE_WORKER_PORT": "0"})
        )
        worker = running.enter_context(
            ServerProcess("queue_server.worker", env={"REDIS_URL": redis_url, "QUEUE_VISION_ADDRESS": vision.address})
        )
        yield Platform(vision, queue, worker, verify(vision.address, queue.address, wait_s=240))


class Spoilt:
    """A vision server that passes all on to the real one, but for the paths that are given an answer of their own."""

    def __init__(self, vision: str, answers: dict[str, tuple[int, str]]) -> None:
        self._vision, self._answers = vision, answers

    def __enter__(self) -> str:
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])])
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        wait_until("the spoilt server listens", lambda: self._server.started)
        return f"127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    async def _answer(self, request: Request) -> Response:
        if request.url.path in self._answers:
            status, body = self._answers[request.url.path]
            return Response(body, status, media_type="application/json")
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            answer = await http.request(
                request.method,
                f"http://{self._vision}{request.url.path}",
                content=await request.body(),
                headers={"content-type": "application/json"},
            )
        return Response(answer.content, answer.status_code, media_type="application/json")


pytestmark = pytest.mark.timeout(300)


def test_models_that_load_are_told_and_waited_for(platform: Platform) -> None:
    first = platform.first
    assert re.search(r"^… vision .*shapes-detector (pending|loading \d+%|warming up)", first.output, re.MULTILINE)
    assert first.code == 0, first.output


def test_all_right(platform: Platform) -> None:
    found = verify(platform.vision.address, platform.queue.address)
    assert found.code == 0, found.output
    assert found.marks == dict.fromkeys(LINES, "✓")
    assert "4 found: circle, star, square, triangle" in found.line("vision detection")
    assert "SUCCEEDED; 1 item, 4 found" in found.line("queue job")
    assert "1 worker is alive" in found.line("queue /queue/stats")
    assert "All 8 are right" in found.output
    # It leaves nothing behind.
    jobs = httpx.get(f"http://{platform.queue.address}/v1/jobs", trust_env=False, timeout=20).json()
    assert jobs.get("jobs", []) == []


def test_vision_is_down(platform: Platform) -> None:
    found = verify("127.0.0.1:1", platform.queue.address, wait_s=1)
    assert found.code == 1
    assert found.wrong == ["vision /health"]
    assert "after 1 s: no answer" in found.line("vision /health")
    assert "docker logs --tail 100 team10-vision" in found.output
    assert found.marks["queue /queue/stats"] == "✓"
    assert {name for name, mark in found.marks.items() if mark == "–"} == {
        *("vision /health/detailed", "vision /info", "vision detection", "queue job")
    }


def test_queue_is_down(platform: Platform) -> None:
    found = verify(platform.vision.address, "127.0.0.1:1")
    assert (found.code, found.wrong) == (1, ["queue /health"])
    assert found.marks["vision detection"] == "✓" and found.marks["queue job"] == "–"


def test_a_model_that_failed_is_not_waited_for(platform: Platform) -> None:
    models = [
        {"name": "good", "state": "MODEL_STATE_READY"},
        {
            "name": "yolo11s.pt",
            "state": "MODEL_STATE_FAILED",
            "state_reason": "no such file, and VISION_OFFLINE is set",
        },
    ]
    answers = {"/health": (503, '{"why": ["x"]}'), "/info": (200, json.dumps({"version": "1", "models": models}))}
    with Spoilt(platform.vision.address, answers) as vision:
        found = verify(vision, platform.queue.address, wait_s=200)
    assert found.code == 1
    assert "yolo11s.pt has FAILED: no such file, and VISION_OFFLINE is set" in found.line("vision /health")
    assert "yolo11s.pt has FAILED" in found.line("vision /info")
    assert "HF_TOKEN" in found.output


def test_somebody_else_listens_there(platform: Platform) -> None:
    with Spoilt(platform.vision.address, {"/health": (404, "<html>"), "/info": (200, "<html>")}) as vision:
        found = verify(vision, platform.queue.address, wait_s=200)
    assert found.code == 1
    assert "says 404: is that our server?" in found.line("vision /health")
    assert "an answer that is not ours: <html>" in found.line("vision /info")


def test_the_two_ports_are_mixed_up(platform: Platform) -> None:
    found = verify(platform.queue.address, platform.queue.address, wait_s=200)
    assert found.code == 1
    assert f"what answers at http://{platform.queue.address} is no vision server" in found.line("vision /info")
    assert "VISION_SERVICE_PORT" in found.output


def test_a_check_fails(platform: Platform) -> None:
    check = {"status": "NOT_OK", "detail": "no answer within 2 s", "latency_ms": 2000, "for_seconds": 9}
    detailed = {"status": "NOT_SERVING", "why": [], "draining": False, "services": {}, "checks": {"redis": check}}
    with Spoilt(platform.vision.address, {"/health/detailed": (503, json.dumps(detailed))}) as vision:
        found = verify(vision, platform.queue.address)
    assert (found.code, found.wrong) == (1, ["vision /health/detailed"])
    assert "redis: no answer within 2 s" in found.line("vision /health/detailed")


def test_detection_is_refused(platform: Platform) -> None:
    error = json.dumps({"error": {"code": 500, "status": "INTERNAL", "message": "CUDA error: device-side assert"}})
    with Spoilt(platform.vision.address, {"/v1/vision:detect": (500, error)}) as vision:
        found = verify(vision, platform.queue.address)
    assert (found.code, found.wrong) == (1, ["vision detection"])
    assert "500: CUDA error: device-side assert" in found.line("vision detection")
    assert "nvidia-smi" in found.output


def test_detection_finds_nothing(platform: Platform, tmp_path: Path) -> None:
    """The real server with a picture of nothing: neither the call nor the job counts as right."""
    Image.new("RGB", (320, 240), "white").save(tmp_path / "nothing.png")
    found = verify(platform.vision.address, platform.queue.address, "--image", str(tmp_path / "nothing.png"))
    assert (found.code, found.wrong) == (1, ["vision detection", "queue job"])
    assert "nothing was found in nothing.png" in found.line("vision detection")
    assert "SUCCEEDED; nothing was found" in found.line("queue job")
    assert "--image FILE (VERIFY_IMAGE)" in found.output


def test_another_detector_gets_a_street(platform: Platform) -> None:
    models = [{"name": "yolo", "state": "MODEL_STATE_READY", "is_default": True, "labels": ["person", "bus"]}]
    answers = {
        "/info": (200, json.dumps({"version": "1", "device": "cuda:0", "models": models})),
        "/v1/vision:detect": (200, json.dumps({"detections": []})),
    }
    with Spoilt(platform.vision.address, answers) as vision:
        found = verify(vision, platform.queue.address)
    assert "nothing was found in street.jpg" in found.line("vision detection")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--wiat", "3"), "Unknown option --wiat"),
        (("--wait",), "--wait needs a value"),
        (("--wait", "long"), "whole seconds are wanted"),
        (("--image", "/nonexistent.jpg"), "The picture /nonexistent.jpg cannot be read"),
    ],
)
def test_what_cannot_be_tried_ends_with_2(arguments: tuple[str, ...], words: str) -> None:
    found = verify("127.0.0.1:1", "127.0.0.1:1", *arguments)
    assert found.code == 2 and words in found.output


def test_help() -> None:
    done = subprocess.run([VERIFY, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "--wait" in done.stdout and "Ends with 0" in done.stdout


def test_no_worker(platform: Platform) -> None:
    """The last: it stops the worker."""
    platform.worker.process.terminate()
    platform.worker.wait()
    with closing(httpx.Client(trust_env=False, base_url=f"http://{platform.queue.address}", timeout=20)) as http:
        wait_until("the worker is gone", lambda: not http.get("/v1/workers").json().get("workers"))
    found = verify(platform.vision.address, platform.queue.address)
    assert (found.code, found.wrong) == (1, ["queue /queue/stats"])
    assert "no worker is alive" in found.line("queue /queue/stats")
    assert "docker compose up -d worker" in found.output
    assert "not tried: no worker is alive" in found.line("queue job")
