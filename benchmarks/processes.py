"""Starts a server process for a benchmark and reads what it takes: CPU time, memory, threads, open files."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

import psutil

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "clients"), str(ROOT)])}
"""In which a process of ours finds the sources."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, so that who listens there later can be named before it does.

    They lie below those that the system gives to callers: a caller that tries again and again to reach a server that was killed
    must not be given the server's own port.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def end_on_sigterm() -> None:
    """Has SIGTERM unwind this program, so that no server outlives the benchmark that started it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class Measured:
    """`python -m MODULE ARGUMENTS…` on a port of its own choice; a context manager that ends it."""

    def __init__(
        self, module: str, *arguments: str, env: Mapping[str, str] | None = None, ready: str = "listening"
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._env = {**ENVIRONMENT, "SERVING_LOG_FORMAT": "json", **(env or {})}
        self._ready = ready
        self.port = 0
        self.url = ""

    def __enter__(self) -> Measured:
        self.started_s = time.perf_counter()
        self._log = TemporaryFile("w+")  # lives as long as the process
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=self._env, stdout=self._log, stderr=self._log)
        self.usage = Usage(self._process.pid)
        try:
            said = self.wait_for(self._ready)
        except BaseException:
            self.__exit__()
            raise
        self.live_s = time.perf_counter() - self.started_s
        self.port, self.url = int(str(said.get("port", 0))), str(said.get("url", ""))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def log(self) -> list[dict[str, object]]:
        """Its log so far, a line each; what is no JSON is left out."""
        return [json.loads(line) for line in self._lines() if line.startswith("{")]

    def wait_for(self, event: str, timeout_s: float = 180, or_fail: str = "", **fields: object) -> dict[str, object]:
        """The first log line with this event and these fields; gives up when it ends, or says `or_fail`."""
        deadline_s = time.perf_counter() + timeout_s
        while time.perf_counter() < deadline_s:
            hopeless = self._process.poll() is not None
            for line in self._lines():
                found: dict[str, object] = {}
                if line.startswith("{"):
                    found = json.loads(line)
                elif line.startswith("redis://"):  # the broker's one word
                    found = {"event": "ready", "url": line}
                if found.get("event") == event and all(found.get(key) == value for key, value in fields.items()):
                    return found
                hopeless = hopeless or (or_fail != "" and found.get("event") == or_fail)
            if hopeless:
                break
            time.sleep(0.02)
        end = "\n".join(self._lines()[-30:])
        raise RuntimeError(f"{' '.join(self._command)} did not say {event!r} {fields or ''}:\n{end}")

    def wait_until_ready(self) -> None:
        """Until a vision server's models serve. Raises RuntimeError when one cannot be loaded."""
        self.wait_for("health check passes", check="models", or_fail="a model could not be loaded")

    def _lines(self) -> list[str]:
        # Read by its place, so that the process goes on writing where it is.
        size_bytes = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), size_bytes, 0).decode(errors="replace")
        # The last line may be half written; once the process has ended it is what there is.
        return text.splitlines() if self._process.poll() is not None else text.rpartition("\n")[0].splitlines()


class Usage:
    """What a process takes, as the kernel counts it."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def cpu_s(self) -> float:
        """CPU seconds that the process has used so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def thread_cpu_s(self) -> Mapping[str, float]:
        """The same by the kind of thread: `main`, `python` (its other threads), `grpc` (those of grpc's core)."""
        sums = {"main": 0.0, "python": 0.0, "grpc": 0.0}
        for thread in self._process.threads():
            try:
                name = Path(f"/proc/{self._process.pid}/task/{thread.id}/comm").read_text().strip()
            except OSError:  # it has just ended
                continue
            kind = (
                "main"
                if thread.id == self._process.pid
                else "grpc"
                if name.startswith(("event_eng", "grpc", "timer"))
                else "python"
            )
            sums[kind] += thread.user_time + thread.system_time
        return sums

    def rss_mb(self) -> float:
        """Resident memory in MB (10⁶ bytes), that of its children included."""
        family = [self._process, *self._process.children(recursive=True)]
        return float(sum(process.memory_info().rss for process in family)) / 1e6

    def thread_count(self) -> int:
        """Its threads."""
        return int(self._process.num_threads())

    def file_count(self) -> int:
        """Its open file descriptors."""
        return int(self._process.num_fds())


class PeakMemory:
    """The most memory that a process has had inside a `with`, looked at ten times a second."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.rss_mb = 0.0

    def __enter__(self) -> PeakMemory:
        self.rss_mb = self._usage.rss_mb()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.rss_mb = max(self.rss_mb, self._usage.rss_mb())
