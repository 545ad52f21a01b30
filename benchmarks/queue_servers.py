"""The processes that the queue's benchmarks measure: Redis, queue server, vision stand-in, workers; and what each has taken."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import redis

from benchmarks.processes import ENVIRONMENT, ROOT, Measured, Usage
from queue_server.broker import Broker
from queue_server.keys import queue_counts

# The depth is part of what is measured.
LIMITS: Mapping[str, str] = {
    "QUEUE_MAX_DEPTH": "1000000",
    "QUEUE_MAX_QUEUE_DEPTH": "1000000",
    "QUEUE_MAX_CLIENT_DEPTH": "1000000",
}


class Servers:
    """A context manager; workers are started and stopped inside it."""

    def __init__(self, *, max_memory: str = "4gb", settings: Mapping[str, str] | None = None) -> None:
        self._max_memory = max_memory
        self._settings = settings or {}
        self._stack = ExitStack()
        self._workers: list[Measured] = []

    def __enter__(self) -> Servers:
        with self._stack as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._folder = folder / "redis"
            self._broker = Broker(self._folder, 0, self._max_memory)
            running = self._broker.start()
            stack.callback(lambda: self._broker.stop())  # the one that runs then
            self.url, self._port, self._redis_pid = running.url, running.port, running.pid
            self.redis = stack.enter_context(redis.Redis.from_url(self.url))
            self.env = {**LIMITS, **self._settings, "REDIS_URL": self.url, "QUEUE_WORKER_PORT": "0"}
            self.vision = stack.enter_context(Measured("benchmarks.chaos_vision", "--port", "0"))
            self.env["QUEUE_VISION_ADDRESS"] = self.vision.address
            self.queue = stack.enter_context(Measured("queue_server", env=self.env))
            stack.callback(self.stop_workers)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """The queue server's."""
        return self.queue.address

    def start_workers(
        self, module: str = "benchmarks.queue_worker", *arguments: str, count: int = 1, **env: str
    ) -> list[Measured]:
        """So many processes of 8 threads; returns when they work."""
        started = [Measured(module, *arguments, env={**self.env, **env}, ready="working") for _ in range(count)]
        for worker in started:
            self._workers.append(worker.__enter__())
        return started

    def signal_workers(self, number: signal.Signals) -> None:
        """SIGSTOP, SIGCONT: all of them."""
        for worker in self._workers:
            os.kill(worker.pid, number)

    def stop_workers(self) -> None:
        """All of them."""
        while self._workers:
            self._workers.pop().__exit__()

    def kill_worker(self, name: str) -> None:
        """kill -9 of the one with this name, which has its process's number in it."""
        pid = int(name.split("-")[-2])
        if pid not in {worker.pid for worker in self._workers}:
            raise RuntimeError(f"there is no worker {name}")
        os.kill(pid, signal.SIGKILL)

    def kill_broker(self) -> None:
        """kill -9 of Redis."""
        os.kill(self._redis_pid, signal.SIGKILL)
        self._broker.stop()

    def start_broker(self) -> None:
        """Redis again, with what it had; returns when it answers."""
        self._broker = Broker(self._folder, self._port, self._max_memory)
        self._redis_pid = self._broker.start().pid

    def usages(self) -> Mapping[str, list[Usage]]:
        """By what they are."""
        return {
            "queue server": [self.queue.usage],
            "worker": [worker.usage for worker in self._workers],
            "Redis": [Usage(self._redis_pid)],
        }

    @property
    def redis_name(self) -> str:
        """`Valkey 9.1.0`."""
        info: Any = self.redis.info("server")
        return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"

    def clear(self) -> None:
        """Forgets all jobs."""
        self.redis.flushall(asynchronous=False)

    def not_ended_count(self, queue: str = "default") -> int:
        """Jobs of the queue that are SCHEDULED, QUEUED or RUNNING."""
        counts: Any = self.redis.hmget(queue_counts(queue), ["SCHEDULED", "QUEUED", "RUNNING"])
        return sum(int(count or 0) for count in counts)

    def used_memory_bytes(self) -> int:
        """What Redis has allocated."""
        info: Any = self.redis.info("memory")
        return int(info["used_memory"])


class CpuTaken:
    """CPU seconds that each of the processes takes inside a `with`."""

    def __init__(self, servers: Servers) -> None:
        self._usages = servers.usages()
        self.seconds: Mapping[str, float] = {}

    def __enter__(self) -> CpuTaken:
        self._before = self._sums()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = {name: now_s - self._before[name] for name, now_s in self._sums().items()}

    def _sums(self) -> dict[str, float]:
        return {name: sum(usage.cpu_s() for usage in usages) for name, usages in self._usages.items()}


def call(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts `python -m MODULE`, whose one line `answer_of` reads."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The line that it wrote at its end."""
    text, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    answer: dict[str, Any] = json.loads(text.splitlines()[-1])
    return answer


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all lie at or below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * share) - 1)]
