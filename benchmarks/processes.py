"""Starts a server process for a benchmark and reads its CPU time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


class Measured:
    """`python -m MODULE ARGUMENTS…` on a port of its own choice; a context manager that ends it."""

    def __init__(
        self, module: str, *arguments: str, env: Mapping[str, str] | None = None, ready: str = "listening"
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        paths = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
        self._env = {**os.environ, "PYTHONPATH": paths, "SERVING_LOG_FORMAT": "json", **(env or {})}
        self._ready = ready
        self.port = 0
        self.url = ""

    def __enter__(self) -> Measured:
        self.started_s = time.perf_counter()
        self._log = (ROOT / "benchmarks" / f"server-{os.getpid()}-{id(self)}.log").open("w+")
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=self._env, stdout=self._log, stderr=self._log)
        self._measured = psutil.Process(self._process.pid)
        said = self.wait_for(self._ready)
        self.live_s = time.perf_counter() - self.started_s
        self.port, self.url = int(str(said.get("port", 0))), str(said.get("url", ""))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(40)
        self._log.close()
        Path(self._log.name).unlink()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def wait_for(self, event: str, timeout_s: float = 180, **fields: object) -> dict[str, object]:
        """The first log line with this event and these fields."""
        deadline_s = time.perf_counter() + timeout_s
        while time.perf_counter() < deadline_s:
            for line in Path(self._log.name).read_text().splitlines():
                found: dict[str, object] = {}
                if line.startswith("{"):
                    found = json.loads(line)
                elif line.startswith("redis://"):  # the broker's one word
                    found = {"event": "ready", "url": line}
                if found.get("event") == event and all(found.get(key) == value for key, value in fields.items()):
                    return found
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(
            f"{' '.join(self._command)} did not say {event!r}:\n{Path(self._log.name).read_text()[-3000:]}"
        )

    def cpu_s(self) -> float:
        """CPU seconds that the process has used so far."""
        times = self._measured.cpu_times()
        return float(times.user + times.system)

    def rss_mb(self) -> float:
        """Resident memory in MB (10⁶ bytes), that of its children included."""
        family = [self._measured, *self._measured.children(recursive=True)]
        return float(sum(process.memory_info().rss for process in family)) / 1e6
