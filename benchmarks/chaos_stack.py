"""The processes of a chaos run, each started again when it ends, by a supervisor that is none of those who wait for answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from benchmarks.chaos_power import PowerCuts
from benchmarks.processes import ENVIRONMENT, ROOT, free_ports
from queue_server.broker import find_program
from queue_server.keys import LEASES, job

WORKERS = 3
# Quicker than the defaults, so that a run of minutes sees many leases lost and many retries.
LEASE_S = 3.0
SETTINGS: Mapping[str, str] = {
    "QUEUE_LEASE_S": str(LEASE_S),
    "QUEUE_RENEW_S": "0.7",
    "QUEUE_OVERDUE_S": "4",
    "QUEUE_WORKER_THREADS": "6",
    "QUEUE_RETRY_FIRST_S": "0.2",
    "QUEUE_RETRY_LIMIT_S": "2",
    "QUEUE_CIRCUIT_LIMIT_S": "2",
    "QUEUE_VISION_CONNECT_S": "1",
    "QUEUE_MAX_WATCHERS": "5000",
    "SERVING_LOG_FORMAT": "json",
}
RESTART_S = 0.1
START_S = 30.0


class Supervised:
    """A process that is started again when it ends, whatever ended it."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], folder: Path, before_start: Callable[[], None]
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.killed_s: list[float] = []
        """When it was killed, by time.monotonic()."""
        self._command = list(command)
        self._env = dict(env)
        self._before_start = before_start
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._supervise, name=name, daemon=True)

    def start(self) -> None:
        """Begins to supervise."""
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process's number; 0: it is not started yet."""
        return self._process.pid if self._process is not None else 0

    @property
    def is_alive(self) -> bool:
        """Whether it runs at this moment."""
        with self._lock:
            return self._process is not None and self._process.poll() is None

    def kill(self) -> bool:
        """kill -9; whether there was a process to kill. Returns when it has ended."""
        now_s = time.monotonic()
        if not self._signal(signal.SIGKILL):
            return False
        self.killed_s.append(now_s)
        if self._process is not None:
            self._process.wait()
        return True

    def pause(self) -> bool:
        """SIGSTOP; whether there was a process to stop."""
        return self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends it for good, by kill -9 once more: how a process ends in order is tested elsewhere."""
        self._stopping.set()
        self.kill()
        if self._thread.is_alive():
            self._thread.join()

    def _signal(self, number: signal.Signals) -> bool:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return False
            self._process.send_signal(number)
            return True

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            self._before_start()
            with self.log.open("ab") as log, self._lock:
                if self._stopping.is_set():
                    return
                self._process = subprocess.Popen(self._command, cwd=ROOT, env=self._env, stdout=log, stderr=log)
            self._process.wait()
            self._stopping.wait(RESTART_S)


class Stack:
    """Redis, the vision server, the queue server and the workers; a context manager that ends them."""

    def __init__(
        self,
        folder: Path,
        *,
        appendfsync: str = "everysec",
        without: str = "",
        real_vision: bool = False,
        settings: Mapping[str, str] = SETTINGS,
    ) -> None:
        """Remembers what to start.

        Args:
            folder: for logs and Redis' data.
            appendfsync: Redis' setting.
            without: the safeguard of benchmarks.chaos_without that is taken out; empty: none.
            real_vision: the vision server with the shipped detector instead of benchmarks.chaos_vision.
            settings: the environment of queue server and workers.
        """
        self.redis_port, self.queue_port, self.vision_port = free_ports(3)
        self.lease_s = float(settings["QUEUE_LEASE_S"])
        self.data_dir = folder / "redis"
        self.data_dir.mkdir()
        self.power = PowerCuts(self.data_dir)
        env = {
            **ENVIRONMENT,
            **settings,
            "REDIS_URL": self.redis_url,
            "QUEUE_WORKER_PORT": str(self.queue_port),
            "QUEUE_VISION_ADDRESS": f"127.0.0.1:{self.vision_port}",
        }
        python = [sys.executable, "-m", *(["benchmarks.chaos_without", without] if without else [])]
        vision = [sys.executable, "-m", "benchmarks.chaos_vision", "--port", str(self.vision_port)]
        vision_env = dict(ENVIRONMENT)
        if real_vision:
            vision = [sys.executable, "-m", "vision_server"]
            vision_env |= {
                "VISION_SERVICE_PORT": str(self.vision_port),
                "VISION_DESCRIBER": "",
                "AI4THAI_DATA_DIR": str(folder / "vision"),
                "SERVING_LOG_FORMAT": "json",
            }

        def supervised(
            name: str, command: Sequence[str], env: Mapping[str, str], before: Callable[[], None] = lambda: None
        ) -> Supervised:
            return Supervised(name, command, env, folder, before)

        self.redis = supervised("redis", self._redis_command(appendfsync), ENVIRONMENT, self.power.cut_if_due)
        self.vision = supervised("vision", vision, vision_env)
        self.queue = supervised("queue", [*python, "queue_server"], env)
        self.workers = [
            supervised(f"worker-{number}", [*python, "queue_server.worker"], env) for number in range(WORKERS)
        ]

    @property
    def redis_url(self) -> str:
        """Where Redis is."""
        return f"redis://127.0.0.1:{self.redis_port}/0"

    @property
    def address(self) -> str:
        """Where the queue server is."""
        return f"127.0.0.1:{self.queue_port}"

    @property
    def _all(self) -> list[Supervised]:
        return [self.redis, self.vision, self.queue, *self.workers]

    def __enter__(self) -> Stack:
        for process in self._all:
            process.start()
        try:
            for port in (self.redis_port, self.vision_port, self.queue_port):
                _wait_for(port)
        except BaseException:
            self.__exit__()
            raise
        self.power.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.power.stop()
        for process in reversed(self._all):
            process.stop()

    def open_redis(self) -> redis.Redis:
        """A client of its Redis."""
        return redis.Redis.from_url(self.redis_url, socket_timeout=10, socket_connect_timeout=2)

    def workers_at_work(self) -> list[Supervised]:
        """Those that have a job in hand, as Redis has it; empty also when Redis cannot be asked."""
        with suppress(redis.RedisError), self.open_redis() as client:
            leases: Any = client.zrange(LEASES, 0, -1)
            names = [client.hget(job(job_id.decode()), "worker") for job_id in leases]
            # A worker's name has its process's number in it.
            return [one for one in self.workers if any(f"-{one.pid}-".encode() in (name or b"") for name in names)]
        return []

    def _redis_command(self, appendfsync: str) -> list[str]:
        options = {
            "port": self.redis_port,
            "bind": "127.0.0.1",
            "dir": self.data_dir,
            "appendonly": "yes",
            "appendfsync": appendfsync,
            "save": "",
            "maxmemory": "1gb",
            "maxmemory-policy": "noeviction",
        }
        return [str(find_program()), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def _wait_for(port: int) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"Nothing answers at port {port} after {START_S:g} s; pid {os.getpid()} gives up.")
