"""Puts a small platform into the situations that docs/operations.md is for: its commands are run where they are needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from ai4thai import QueueClient

from serving.errors import Code
from tests.processes import ROOT, ServerProcess
from tests.queue_server.fake_vision import FakeVision, error
from tests.queue_server.redis_servers import Server, make_certificates

# `<!-- in: SITUATION; exit: 1; prints: words, words -->` before a block of `sh`; `exit` may be left out.
_BLOCK = re.compile(
    r"<!-- in: (?P<situation>[^;]+?)(?:; exit: (?P<exit>\d+))?; prints: (?P<words>.+?) -->\n```sh\n(?P<code>.+?)```",
    re.DOTALL,
)
_KEPT = ("--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory", "256mb", "--save", "")
_QUICK = {
    "QUEUE_LEASE_S": "2",
    "QUEUE_OVERDUE_S": "1",
    "QUEUE_RENEW_S": "0.5",
    "QUEUE_RETRY_FIRST_S": "0.1",
    "QUEUE_RETRY_LIMIT_S": "0.2",
    "QUEUE_CIRCUIT_LIMIT_S": "0.3",
    "QUEUE_VISION_CONNECT_S": "0.5",
}


@dataclass(frozen=True)
class Block:
    """Commands of the runbook, with what they must print in which situation."""

    situation: str
    exit_code: int
    words: tuple[str, ...]
    code: str


def blocks_of(page: str) -> list[Block]:
    """Those of a page, in order."""
    return [
        Block(found["situation"], int(found["exit"] or 0), tuple(found["words"].split(", ")), found["code"])
        for found in _BLOCK.finditer(page)
    ]


class Platform:
    """Redis, a queue server and a worker as processes, and a vision server that answers as it is told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.redis = Server(folder / "redis", *_KEPT)
        self.vision = FakeVision()
        self.vision.start()
        self._env = {
            **_QUICK,
            "REDIS_URL": f"redis://127.0.0.1:{self.redis.port}/0",
            "QUEUE_WORKER_PORT": "0",
            "QUEUE_VISION_ADDRESS": f"localhost:{self.vision.port}",
            "AI4THAI_DATA_DIR": str(folder / "data"),
        }
        for name in ("data", "vision"):
            (folder / name).mkdir()
        self._mistyped_env = {
            "AI4THAI_DATA_DIR": str(folder / "vision"),
            "VISION_DETECTOR": "cameras.pt",
            "VISION_DESCRIBER": "",
            "VISION_OFFLINE": "true",
        }
        # Begun first: it takes the longest, beside the others.
        self.mistyped = ServerProcess("vision_server", env={**self._mistyped_env, "VISION_SERVICE_PORT": "0"})
        self.mistyped.__enter__()
        (folder / "picture.jpg").write_bytes(b"ok picture")
        self.queue = ServerProcess("queue_server", env=self._env)
        self.queue.__enter__()
        self.worker = self._start_worker()
        self.client = QueueClient(self.queue.address, timeout_s=10)
        self.until("the platform works", lambda: self._get("/health").status_code == 200 and self.workers())

    def stop(self) -> None:
        """Backwards; the order needs no care."""
        self.client.close()
        self.mistyped.__exit__()
        self.worker.__exit__()
        self.queue.__exit__()
        self.vision.stop()
        self.redis.stop()

    def workers(self) -> list[Any]:
        """Those alive."""
        return list(self._get("/v1/workers").json().get("workers", []))

    def run(self, block: Block, extra: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """The block's commands, with the guide's addresses replaced by the real ones."""
        addresses = {
            "localhost:2003": self.queue.address,
            "localhost:2001": extra.get("VISION", f"localhost:{self.vision.port}"),
        }
        code = block.code
        for written, real in addresses.items():
            code = code.replace(written, real)
        paths = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
        env = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("AI4THAI_", "REDIS_", "VISION_"))
            },
            **self._env,
            "AI4THAI_QUEUE_ADDRESS": addresses["localhost:2003"],
            "AI4THAI_VISION_ADDRESS": addresses["localhost:2001"],
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": paths,
            "COLUMNS": "200",
            **extra,
        }
        return subprocess.run(
            ["bash", "-uo", "pipefail", "-c", code],
            cwd=self._folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    @staticmethod
    def until(what: str, holds: Callable[[], object], timeout_s: float = 60) -> None:
        """Waits for something that is to come about by itself."""
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                if holds():
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < until_s, f"{what}: not within {timeout_s:g} s"
            time.sleep(0.05)

    def check_of(self, name: str, what: str = "status") -> str:
        """The status, or the detail, of one check of /health/detailed."""
        return str(self._get("/health/detailed").json()["checks"][name][what])

    # ---- situations: what is wrong for as long as the block lasts; each gives the block its variables

    @contextmanager
    def all_is_well(self) -> Iterator[Mapping[str, str]]:
        """Nothing is wrong."""
        yield {"JOB": self.client.submit_detect([b"ok picture"]).job_id}

    @contextmanager
    def redis_is_away(self) -> Iterator[Mapping[str, str]]:
        """Redis was killed."""
        self.redis.kill()
        try:
            self.until("it is noticed", lambda: self._get("/health").status_code == 503)
            yield {}
        finally:
            self._start_redis()

    @contextmanager
    def redis_is_full(self) -> Iterator[Mapping[str, str]]:
        """Redis' memory is nearly used up."""
        with self.redis.client() as client:
            client.eval("for i = 1, 400 do redis.call('set', 'ballast' .. i, string.rep('x', 50000)) end", 0)
            client.config_set("maxmemory", int(client.info()["used_memory"] * 1.05))
            self.until("it is noticed", lambda: "of 256 MB" not in self.check_of("redis", "detail"))
            try:
                yield {}
            finally:
                client.config_set("maxmemory", "256mb")
                client.eval("for i = 1, 400 do redis.call('del', 'ballast' .. i) end", 0)
                self.until("there is room again", lambda: "of 256 MB" in self.check_of("redis", "detail"))

    @contextmanager
    def redis_evicts(self) -> Iterator[Mapping[str, str]]:
        """Redis would delete what it has accepted."""
        with self.redis.client() as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            self.until("it is noticed", lambda: self._get("/health").status_code == 503)
            try:
                yield {}
            finally:
                client.config_set("maxmemory-policy", "noeviction")
                self.until("all is well", lambda: self._get("/health").status_code == 200)

    @contextmanager
    def jobs_are_lost(self) -> Iterator[Mapping[str, str]]:
        """Redis came back with an empty disk."""
        self.client.pause("default")
        job_id = self.client.submit_detect([b"ok picture"]).job_id
        self.redis.kill()
        self.until("it is noticed", lambda: self._get("/health").status_code == 503)
        shutil.rmtree(self._folder / "redis")
        self._start_redis()
        self.until("it is noticed", lambda: re.search(r"jobs_lost_total [1-9]", self._get("/metrics").text))
        yield {"JOB": job_id}

    @contextmanager
    def no_worker(self) -> Iterator[Mapping[str, str]]:
        """The worker was killed; a job waits."""
        self.worker.process.kill()
        self.until("it is noticed", lambda: not self.workers())
        job_id = self.client.submit_detect([b"ok picture"]).job_id
        try:
            yield {"JOB": job_id}
        finally:
            self.worker.__exit__()
            self.worker = self._start_worker()
            self.client.wait(job_id, timeout_s=30)

    @contextmanager
    def a_job_that_always_fails(self) -> Iterator[Mapping[str, str]]:
        """Each attempt at it breaks the vision server's call."""
        self.vision.always = error(Code.INTERNAL, "INTERNAL")
        try:
            job_id = self.client.submit_detect([b"poison"]).job_id
            self.client.wait(job_id, timeout_s=60)
            yield {"JOB": job_id}
        finally:
            self.vision.always = None

    @contextmanager
    def vision_is_away(self) -> Iterator[Mapping[str, str]]:
        """The vision server is not there; a job waits."""
        port = self.vision.port
        self.vision.stop()
        job_id = self.client.submit_detect([b"ok picture"]).job_id
        self.until("an attempt has failed", lambda: "VISION_UNAVAILABLE" in self._get(f"/v1/jobs/{job_id}").text)
        try:
            yield {"JOB": job_id}
        finally:
            self.vision.start(port)
            self.client.wait(job_id, timeout_s=30)

    @contextmanager
    def a_paused_queue(self) -> Iterator[Mapping[str, str]]:
        """Somebody has paused it."""
        self.client.pause("default")
        yield {"JOB": self.client.submit_detect([b"ok picture"]).job_id}

    @contextmanager
    def a_model_that_is_not_there(self) -> Iterator[Mapping[str, str]]:
        """A real vision server, whose operator has mistyped a name."""
        address = self.mistyped.address

        def has_failed() -> bool:
            return "FAILED" in httpx.get(f"http://{address}/info", trust_env=False).text

        self.until("the model has failed", has_failed, 100)
        yield {**self._mistyped_env, "VISION": address}

    @contextmanager
    def a_certificate_that_ends(self) -> Iterator[Mapping[str, str]]:
        """Two days before its end."""
        folder = self._folder / "tls"
        folder.mkdir()
        make_certificates(folder)
        (folder / "server.pem").rename(folder / "tls.crt")
        yield {"EDGE_TLS_DIR": str(folder)}

    def _start_redis(self) -> None:
        self.redis = Server(self._folder / "redis", *_KEPT, port=self.redis.port)
        self.until("Redis is back", lambda: self._get("/health").status_code == 200 and self.workers())

    def _start_worker(self) -> ServerProcess:
        worker = ServerProcess("queue_server.worker", env=self._env)
        worker.__enter__()
        return worker

    def _get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://{self.queue.address}{path}", trust_env=False)


SITUATIONS: dict[str, Callable[[Platform], Any]] = {
    "all is well": Platform.all_is_well,
    "Redis is away": Platform.redis_is_away,
    "Redis is full": Platform.redis_is_full,
    "Redis evicts": Platform.redis_evicts,
    "no worker": Platform.no_worker,
    "a job that always fails": Platform.a_job_that_always_fails,
    "vision is away": Platform.vision_is_away,
    "a paused queue": Platform.a_paused_queue,
    "a model that is not there": Platform.a_model_that_is_not_there,
    "a certificate that ends": Platform.a_certificate_that_ends,
    "jobs are lost": Platform.jobs_are_lost,
}
"""By the name that the runbook uses."""
