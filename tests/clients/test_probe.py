"""`ai4thai health --grpc` and `--worker`, as a container's health check runs them: a fresh process, one line, an exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from ai4thai.probe import ask_worker
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from queue_server.beats import BeatFile, delete_dead_beats
from tests.processes import ROOT, ServerProcess


class Answer(NamedTuple):
    code: int
    line: str


def probe(*arguments: str, env: dict[str, str] | None = None) -> Answer:
    paths = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-m", "ai4thai", "health", *arguments],
        env={**os.environ, "PYTHONPATH": paths, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = (ended.stdout + ended.stderr).strip().splitlines()
    return Answer(ended.returncode, said[-1] if said else "")


def wait_for(what: Callable[[], Answer], begins: str) -> Answer:
    until_s = time.monotonic() + 30
    while not (answer := what()).line.startswith(begins):
        assert time.monotonic() < until_s, answer
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def closed_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def queue_server(closed_port: int) -> Iterator[ServerProcess]:
    """The real queue server, whose Redis is away."""
    with ServerProcess(
        "queue_server", env={"REDIS_URL": f"redis://127.0.0.1:{closed_port}/0", "QUEUE_WORKER_PORT": "0"}
    ) as process:
        process.wait_for("listening")
        yield process


class Listing(health.HealthServicer):
    """The health service that grpcio ships, with the method that it leaves out."""

    def List(self, request: object, context: object) -> health_pb2.HealthListResponse:
        names = ("", "ai4thai.vision.v1.VisionService")
        return health_pb2.HealthListResponse(
            statuses={name: self.Check(health_pb2.HealthCheckRequest(service=name), context) for name in names}
        )


@contextmanager
def serving(servicer: health.HealthServicer) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


class TestGrpc:
    def test_a_server_that_lives_and_is_not_ready_is_told_apart_and_says_why(self, queue_server: ServerProcess) -> None:
        alive = probe("--grpc", queue_server.address, "--service", "")
        assert alive == (0, f"SERVING {queue_server.address}")

        ready = wait_for(lambda: probe("--grpc", queue_server.address), "NOT_SERVING")
        assert ready.code == 1
        assert "redis:" in ready.line  # the reason, as GET /health gives it

    def test_ready_is_what_the_services_say_and_not_that_the_process_lives(self) -> None:
        servicer, name, statuses = Listing(), "ai4thai.vision.v1.VisionService", health_pb2.HealthCheckResponse
        with serving(servicer) as address:
            servicer.set(name, statuses.NOT_SERVING)
            assert probe("--grpc", address) == (1, f"NOT_SERVING {address}: {name}")
            servicer.set(name, statuses.SERVING)
            assert probe("--grpc", address) == (0, f"SERVING {address}")

    def test_a_server_of_others_that_cannot_list_is_asked_for_itself(self) -> None:
        with serving(health.HealthServicer()) as address:
            assert probe("--grpc", address) == (0, f"SERVING {address}")
            answer = probe("--grpc", address, "--service", "nobody")
            assert (answer.code, answer.line.split()[0]) == (1, "NOT_FOUND")

    def test_nobody_there(self, closed_port: int) -> None:
        answer = probe("--grpc", f"localhost:{closed_port}")
        assert answer.code == 1
        assert answer.line.startswith(f"UNREACHABLE localhost:{closed_port}")

    def test_a_server_that_hangs_is_given_up(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            answer = probe("--grpc", f"127.0.0.1:{deaf.getsockname()[1]}", "--timeout", "0.3")
        assert (answer.code, "0.3 s" in answer.line) == (1, True)

    @pytest.mark.parametrize("arguments", [["--grpc", "nowhere"], ["--grpc", "a:1", "--timeout", "0"]])
    def test_what_cannot_be_asked_is_another_exit_code(self, arguments: list[str]) -> None:
        assert probe(*arguments).code == 2


class TestWorker:
    def test_one_worker_from_start_to_end(self, closed_port: int, tmp_path: Path) -> None:
        env = {"TMPDIR": str(tmp_path), "REDIS_URL": f"redis://127.0.0.1:{closed_port}/0"}

        def ask() -> Answer:
            return probe("--worker", env=env)

        assert ask() == (1, "NOT_RUNNING no worker has told here that it lives")
        (of_the_dead := tmp_path / "ai4thai-worker-1.json").write_text("{}")

        with ServerProcess("queue_server.worker", env=env) as worker:
            # Redis is away: it waits, and starting it again would cure nothing.
            waiting = wait_for(ask, "WAITING")
            assert waiting.code == 0
            assert str(closed_port) in waiting.line
            assert not of_the_dead.exists()

            with ServerProcess(
                "queue_server.broker", "--port", str(closed_port), "--data-dir", str(tmp_path / "redis")
            ):
                assert wait_for(ask, "BEATING").code == 0

            # It hangs: its last word is old. (The word is aged, so that nobody has to wait.)
            worker.signal(signal.SIGSTOP)
            (file,) = tmp_path.glob("ai4thai-worker-*.json")
            beat = json.loads(file.read_bytes())
            file.write_text(json.dumps({**beat, "at_monotonic_s": beat["at_monotonic_s"] - 100}))
            stuck = ask()
            assert (stuck.code, stuck.line.split()[0]) == (1, "STUCK")
            worker.signal(signal.SIGCONT)
            assert wait_for(ask, "WAITING").code == 0

            worker.signal(signal.SIGTERM)
            assert worker.wait(60) == 0
        assert not list(tmp_path.glob("ai4thai-worker-*"))


class TestBeats:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize("age_s", [0, 1000, -1000])
    def test_one_that_was_killed_leaves_its_last_word_and_is_gone(self, folder: Path, age_s: float) -> None:
        """However fresh or old (the clock of a machine that was restarted begins anew), and whoever has its process id now."""
        word = {"worker": "killed", "pid": os.getpid(), "at_monotonic_s": time.monotonic() - age_s, "redis_error": ""}
        (file := folder / "ai4thai-worker-1.json").write_text(json.dumps(word))
        assert ask_worker(folder).line == "NOT_RUNNING no worker has told here that it lives"

        (lives := BeatFile("lives")).write("")
        assert ask_worker(folder) == (True, "BEATING lives")
        delete_dead_beats()
        assert not file.exists()
        assert ask_worker(folder) == (True, "BEATING lives")
        lives.delete()
        assert not list(folder.iterdir())

    @pytest.mark.parametrize("word", ["", "[]", "{}", '{"worker": "w", "at_monotonic_s": null, "redis_error": ""}'])
    def test_a_file_that_is_no_word_of_a_worker(self, folder: Path, word: str) -> None:
        (folder / "ai4thai-worker-1.json").write_text(word)
        (lives := BeatFile("lives")).write("")
        assert ask_worker(folder) == (True, "BEATING lives")
        (file,) = folder.glob(f"*-{os.getpid()}.json")
        file.write_text(word)
        assert not ask_worker(folder).is_well
        lives.delete()

    def test_one_that_tells_while_it_is_asked_is_never_missed(self, folder: Path) -> None:
        (lives := BeatFile("lives")).write("")

        def tell() -> None:
            for _ in range(300):
                lives.write("")

        with futures.ThreadPoolExecutor(1) as teller:
            telling = teller.submit(tell)
            while not telling.done():
                delete_dead_beats()
                assert ask_worker(folder) == (True, "BEATING lives")
        lives.delete()


def test_a_probe_imports_little() -> None:
    code = (
        "import sys; from ai4thai import probe; probe.main(['--worker']); quick = set(sys.modules);"
        "probe.main(['--grpc', '127.0.0.1:1']); print(sorted({'grpc', 'asyncio'} & quick),"
        "sorted({'typer', 'rich', 'httpx', 'ai4thai.cli', 'ai4thai.vision_client'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "clients")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.splitlines()[-1] == "[] []", ended.stderr
