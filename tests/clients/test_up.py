"""`ai4thai up` with the real broker, queue server and worker, and a vision server in shape only, which is there at once."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ai4thai import Health, QueueClient, Unavailable, VisionClient
from ai4thai.part import Part, PartEnded
from ai4thai.stack import Ports, Stack

from tests.clients.fake_servers import FakeServer, FakeVision
from tests.ports import free_port
from tests.processes import ROOT

VISION_IN_SHAPE = """
import http.server, json, os, pathlib, signal, sys, time

MODELS = json.loads(os.environ.get("FAKE_MODELS", "[]"))
PORT = os.environ["VISION_SERVICE_PORT"]
TOLD = pathlib.Path(os.environ.get("FAKE_TELLS_PORT", os.devnull))  # the first to come waits until this says "go"

class Face(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = not MODELS
        body = json.dumps({"models": MODELS}).encode()
        self.send_response(200 if ready or self.path == "/info" else 503)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if not TOLD.exists():
    TOLD.write_text(PORT)
    while TOLD.read_text() != "go":
        time.sleep(0.01)
http.server.ThreadingHTTPServer(("127.0.0.1", int(PORT)), Face).serve_forever()
"""


class Up:
    """A running `ai4thai up`, and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def text(self) -> str:
        return self._output.read_text()

    def wait_for(self, words: str) -> str:
        """What it has printed, once these words are in it."""
        self.wait_until(repr(words), lambda: words in self.text)
        return self.text

    def wait_until(self, what: str, holds: Callable[[], object]) -> None:
        """Waits for something that is to come about while it runs."""
        until_s = time.monotonic() + 40
        while not holds():
            if self.process.poll() is not None or time.monotonic() > until_s:
                raise AssertionError(f"{what} did not come; exit code {self.process.poll()}:\n{self.text}")
            time.sleep(0.05)

    def children(self) -> dict[str, psutil.Process]:
        """By the module that each runs."""
        return {child.cmdline()[-1]: child for child in psutil.Process(self.process.pid).children()}


Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    package = tmp_path / "stand_in" / "vision_server"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(VISION_IN_SHAPE)
    paths = os.pathsep.join(map(str, (tmp_path / "stand_in", ROOT / "clients", ROOT)))
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **env: str) -> Up:
        command = [sys.executable, "-m", "ai4thai.cli", "up", *arguments]
        output = tmp_path / f"up-{len(started)}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                text=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, "AI4THAI_DATA_DIR": str(tmp_path / "data"), **env},
            )
        started.append(process)
        return Up(process, output)

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@contextmanager
def nothing_left_of(up: Up) -> Iterator[None]:
    """Whatever ran when the block began has ended soon after it."""
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 4
    yield
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_ctrl_c_stops_everything_in_order(start: Start, tmp_path: Path) -> None:
    up = start("--free-ports")
    printed = up.wait_for("Ctrl-C stops everything")
    vision, queue = re.findall(r"localhost:\d+", printed)[0], re.findall(r"AI4THAI_QUEUE_ADDRESS=(\S+)", printed)[0]
    assert f"AI4THAI_VISION_ADDRESS={vision}" in printed
    with QueueClient(queue) as client:
        assert len(client.workers()) == 1
    children = up.children()
    assert set(children) == {"queue_server.broker", "vision_server", "queue_server", "queue_server.worker"}

    with nothing_left_of(up):
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 0, up.text

    assert "Stopped." in up.text and "Traceback" not in up.text
    # Each process has written its last line before the one it needs was told to stop.
    ends = [(tmp_path / "data" / "logs" / f"{name}.log").stat().st_mtime_ns for name in ("worker", "queue")]
    assert ends == sorted(ends)


def test_sigterm_does_the_same(start: Start) -> None:
    up = start("--free-ports")
    up.wait_for("Ctrl-C stops everything")
    with nothing_left_of(up):
        up.process.terminate()
        assert up.process.wait(60) == 0, up.text


def is_whole(client: QueueClient) -> bool:
    try:
        return client.health("ai4thai.queue.v1.QueueService") is Health.SERVING and len(client.workers()) > 0
    except Unavailable:
        return False


def test_processes_that_die_are_started_again(start: Start, tmp_path: Path) -> None:
    """Jobs that were accepted before are there after."""
    up = start("--free-ports")
    printed = up.wait_for("Ctrl-C stops everything")
    before = up.children()
    with QueueClient(re.findall(r"AI4THAI_QUEUE_ADDRESS=(\S+)", printed)[0]) as client:
        job = client.submit_detect([b"image"], delay_s=600, request_id="before")
        media = client.upload(b"large" * 600_000)
        assert [path.stat().st_size for path in (tmp_path / "data" / "media").rglob("*") if path.is_file()] == [
            3_000_000
        ]
        for victim in before.values():
            victim.kill()
        for name in ("broker", "vision", "queue", "worker"):
            assert f"{name} was killed by SIGKILL; it is started again in 1 s." in up.wait_for(
                f"{name} was started again"
            )
        until_s = time.monotonic() + 30
        while not is_whole(client):
            assert time.monotonic() < until_s
            time.sleep(0.1)
        assert client.get(job.job_id).state == "SCHEDULED"
        assert client.download(media.media_id, tmp_path / "copy").size_bytes == 3_000_000
    after = up.children()
    assert set(after) == set(before) and not {child.pid for child in after.values()} & {
        child.pid for child in before.values()
    }
    log = (tmp_path / "data" / "logs" / "queue.log").read_text()
    assert log.count("listening") == 2  # what it wrote before is kept

    with nothing_left_of(up):
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 0, up.text


def test_a_process_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    part = Part("vision", [sys.executable, "-c", "raise SystemExit('no such GPU')"], {}, tmp_path / "vision.log")
    part.spawn()
    stack = Stack(Ports(), tmp_path, parts=[part], restart_s=0.01)
    told: list[str] = []

    with pytest.raises(PartEnded, match=r"vision ended with 1.*\n.*no such GPU"):
        while True:
            told += [news for _, news in stack.mend()]
            time.sleep(0.01)

    assert told[:2] == ["ended with 1; it is started again in 0.01 s", "was started again"]
    assert len(told) == 10 and "again in 0.16 s" in told[8]


def test_logs_of_earlier_runs_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    part = Part("worker", [sys.executable, "-c", "print('said')"], {}, log)
    for run in range(5):
        log.write_text(f"run {run}")
        part.keep_earlier_logs()
    part.spawn()
    assert part.process is not None and part.process.wait(20) == 0
    logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert logs == {
        "worker.log": "said\n",
        "worker.log.1": "run 4",
        "worker.log.2": "run 3",
        "worker.log.3": "run 2",
    }


def test_nothing_outlives_a_killed_up(start: Start) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells children that their parent has died")
    up = start("--free-ports")
    up.wait_for("Ctrl-C stops everything")
    with nothing_left_of(up):
        up.process.kill()
        up.process.wait(10)


def test_a_port_that_is_taken_is_named(start: Start) -> None:
    with FakeServer(FakeVision()) as other, VisionClient(other.address) as client:
        assert client.info().version
        up = start("--vision-port", str(other.port), "--queue-port", str(free_port()))
        assert up.process.wait(60) == 1
        assert f"Port {other.port}" in up.text and "--free-ports" in up.text


def test_a_redis_of_ones_own_is_used_and_a_wrong_one_is_told(start: Start, tmp_path: Path) -> None:
    up = start("--free-ports", REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    up.wait_for("Started vision, queue, worker")
    log = tmp_path / "data" / "logs" / "queue.log"
    # `up` asks for the workers in each of its rounds: when it does so again it has seen what the first one said.
    up.wait_until("the second round", lambda: log.read_text().count("ListWorkers") >= 2)
    assert "health check does not pass check=redis" in log.read_text()
    assert "Ready" not in up.text
    with_broker = start("--free-ports", "--data-dir", "other")
    printed = with_broker.wait_for("Ctrl-C stops everything")
    assert "embedded broker" in printed


def test_a_model_that_cannot_be_loaded_is_told_and_the_rest_serves(start: Start) -> None:
    failed = '[{"name": "big[model]", "state": "MODEL_STATE_FAILED", "state_reason": "no such file"}]'
    up = start("--free-ports", FAKE_MODELS=failed)
    printed = up.wait_for("Ctrl-C stops everything")
    assert "the model big[model] could not be loaded: no such file" in printed


def test_a_free_port_that_somebody_takes_before_the_server_binds_it_is_left_to_them(
    start: Start, tmp_path: Path
) -> None:
    told = tmp_path / "port.txt"
    up = start("--free-ports", FAKE_TELLS_PORT=str(told))
    up.wait_until("the vision server's port", lambda: told.exists() and told.read_text())
    port = told.read_text()
    with socket.create_server(("127.0.0.1", int(port))):
        told.write_text("go")
        printed = up.wait_for("Ctrl-C stops everything")
    assert "A port that was free has been taken meanwhile" in printed
    ready = printed.partition("Ready")[2]
    assert "localhost:" in ready and f"localhost:{port}" not in ready


def test_verbose_shows_the_processes_lines(start: Start) -> None:
    up = start("--free-ports", "--verbose")
    up.wait_until("a line", lambda: re.search(r"^(queue|worker|broker) +\S", up.text, re.MULTILINE))


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "localhost:2001"),
        ("0.0.0.0", "localhost:2001"),
        ("192.0.2.7", "192.0.2.7:2001"),
        ("2001:db8::7", "[2001:db8::7]:2001"),
    ],
)
def test_the_servers_are_looked_for_where_they_listen(host: str, address: str, tmp_path: Path) -> None:
    assert Stack(Ports(), tmp_path, host=host).vision_address == address
