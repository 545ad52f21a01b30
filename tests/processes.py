"""Starts the platform's own processes for tests, and reads what they log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ServerProcess:
    """`python -m MODULE ARGUMENTS…` with its log lines collected; a context manager that ends it."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.command = [sys.executable, "-m", module, *arguments]
        paths = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
        self._env = {**os.environ, "PYTHONPATH": paths, "SERVING_LOG_FORMAT": "json", **(env or {})}
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        """The port of the line that says `listening`; waits for it."""
        return int(self.wait_for("listening")["port"])

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def wait_for(self, event: str, timeout_s: float = 60, **fields: object) -> dict[str, Any]:
        """The first log line with this event and these fields."""

        def found() -> dict[str, Any] | None:
            for line in self.events:
                if line.get("event") == event and all(line.get(key) == value for key, value in fields.items()):
                    return line
            return None

        deadline = time.monotonic() + timeout_s
        with self._news:
            while (line := found()) is None:
                ended = self.process.poll() is not None and not self._reader.is_alive()
                if ended or not self._news.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
                    if (line := found()) is not None:
                        break
                    if ended or time.monotonic() > deadline:
                        raise AssertionError(
                            f"no log line {event!r} {fields}; the log was:\n" + "".join(self.lines[-60:])
                        )
        return line

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    pass
                else:
                    if isinstance(event, dict):
                        self.events.append(event)
                self._news.notify_all()
