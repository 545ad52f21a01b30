"""Runs the whole platform on this machine: broker, vision server, queue server and worker as child processes.

The order is the order of need: what comes later needs what comes earlier, so it is stopped before it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import httpx

from ai4thai.part import Part, PartEnded

STOP_S: Final = 45.0
"""How long a process may drain (the servers allow themselves 30 s) before it is killed."""
STEADY_S: Final = 60.0
"""A process that has run this long is well: if it ends, it is as if for the first time."""
MAX_RESTARTS: Final = 5
"""A process that ends so often without having been well is given up."""


@dataclass(frozen=True)
class Ports:
    """The TCP ports of one stack."""

    vision: int = 2001
    queue: int = 2003
    redis: int = 6379
    are_any: bool = False
    """Whether others would do as well."""

    @classmethod
    def free(cls) -> Self:
        """Three ports that nobody uses at this moment; until the servers listen there, somebody else may."""
        with ExitStack() as held:  # all three held at once, so that they differ
            sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            vision, queue, redis = (int(held_socket.getsockname()[1]) for held_socket in sockets)
            return cls(vision, queue, redis, are_any=True)


class PortTaken(Exception):
    """Somebody else listens where a server of the stack would."""

    def __init__(self, name: str, port: int) -> None:
        super().__init__(
            f"Port {port}, which {name} would listen on, is in use. Stop what runs there, or use --free-ports or "
            f"--{name}-port."
        )


@dataclass
class Stack:
    """The four processes; `redis_url` empty means an embedded broker, otherwise that Redis is used."""

    ports: Ports
    data_dir: Path
    host: str = "127.0.0.1"
    redis_url: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    restart_s: float = 1.0
    """How long a process that has ended waits to be started again; doubled each time until it is well."""

    @property
    def vision_address(self) -> str:
        """Where the vision server is."""
        return f"{self._reached_at}:{self.ports.vision}"

    @property
    def queue_address(self) -> str:
        """Where the queue server is."""
        return f"{self._reached_at}:{self.ports.queue}"

    @property
    def _reached_at(self) -> str:
        if self.host in ("", "127.0.0.1", "::", "::1", "0.0.0.0", "localhost"):
            return "localhost"
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def log_dir(self) -> Path:
        """Where each process writes what it has to say."""
        return self.data_dir / "logs"

    def start(self) -> None:
        """Starts the processes; returns before they are ready.

        Raises:
            PortTaken: somebody else listens on one of the ports.
            PartEnded: the broker could not start.
        """
        self._check_ports()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        if not self.redis_url:
            broker = self._spawn("broker", "queue_server.broker")
            while "redis://" not in broker.log_tail():  # it prints its URL once it answers
                if broker.exit_code is not None:
                    raise PartEnded(broker)
                time.sleep(0.05)
        # Everything else starts at once: the queue takes jobs, and the worker holds them, while the models load.
        self._spawn("vision", "vision_server")
        self._spawn("queue", "queue_server")
        self._spawn("worker", "queue_server.worker")

    def waiting_for(self) -> Iterator[dict[str, str]]:
        """Looks again and again until all are ready; yields what is still missing, by name with a word about it.

        Raises:
            PartEnded: a process has ended instead.
        """
        probes: dict[str, Callable[[httpx.Client], str]] = {
            "vision": self._vision_missing,
            "queue": self._queue_missing,
            "worker": self._worker_missing,
        }
        with httpx.Client(timeout=2.0, trust_env=False) as http:
            while True:
                self.check()
                missing = {name: word for name, probe in probes.items() if (word := _safely(probe, http))}
                yield missing
                if not missing:
                    return
                time.sleep(0.2)

    def lost_a_port(self) -> bool:
        """Whether somebody else listens on one of the ports since it was found free, where a process that has ended would."""
        if not self.ports.are_any:
            return False
        running = {part.name for part in self.parts if part.exit_code is None}
        wanted = {"vision": self.ports.vision, "queue": self.ports.queue}
        if not self.redis_url:
            wanted["broker"] = self.ports.redis
        return any(name not in running and self._is_taken(port) for name, port in wanted.items())

    def move(self) -> None:
        """Stops what runs and takes other free ports, to be started again there."""
        self.stop()
        self.parts.clear()
        self.ports = Ports.free()

    def check(self) -> None:
        """Raises PartEnded when a process has ended."""
        for part in self.parts:
            if part.exit_code is not None:
                raise PartEnded(part)

    def mend(self) -> Iterator[tuple[Part, str]]:
        """Starts processes again that have ended, after 1 s, 2 s, 4 s …; yields what is to be told. To be called now and then.

        Whichever it was, the others go on meanwhile: jobs are kept, workers wait for the vision server, callers try again.

        Raises:
            PartEnded: a process ends again and again.
        """
        now_s = time.monotonic()
        for part in self.parts:
            if part.exit_code is None:
                continue
            if part.restart_at_s is None:
                if now_s - part.started_s > STEADY_S:
                    part.restarts = 0
                if part.restarts == MAX_RESTARTS:
                    raise PartEnded(part)
                delay_s = self.restart_s * 2.0**part.restarts
                part.restarts, part.restart_at_s = part.restarts + 1, now_s + delay_s
                yield part, f"{part.end}; it is started again in {delay_s:g} s"
            elif now_s >= part.restart_at_s:
                part.spawn()
                yield part, "was started again"

    def stop(self, told: Callable[[str], None] = lambda name: None) -> list[Part]:
        """Stops the processes one after the other, the last started first; each may drain for STOP_S.

        Returns those that did not stop cleanly: killed because they took too long, or ended with another code than 0.
        """
        stopped = [part for part in reversed(self.parts) if part.process is not None and part.exit_code is None]
        for part in stopped:
            assert part.process is not None
            told(part.name)
            part.process.terminate()
            try:
                part.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                part.process.kill()
                part.process.wait()
        # One that had not yet set up its own handler when it was told to stop ends by the signal itself, with nothing to lose.
        return [part for part in stopped if part.exit_code not in (0, -signal.SIGTERM)]

    def kill(self) -> None:
        """Ends all processes at once, without draining."""
        for part in reversed(self.parts):
            if part.process is not None and part.exit_code is None:
                # The broker's launcher must live to take its server along; that is quick.
                (part.process.terminate if part.name == "broker" else part.process.kill)()

    def failed_models(self) -> dict[str, str]:
        """The models that could not be loaded, with the reason."""
        with httpx.Client(timeout=2.0, trust_env=False) as http:
            info = http.get(f"http://{self.vision_address}/info").json()
        return {
            model["name"]: model.get("state_reason", "")
            for model in info["models"]
            if model["state"] == "MODEL_STATE_FAILED"
        }

    def _spawn(self, name: str, module: str) -> Part:
        log = self.log_dir / f"{name}.log"
        part = Part(name, [sys.executable, "-m", module], {**os.environ, **self._settings(), **self.env}, log)
        part.keep_earlier_logs()
        part.spawn()
        self.parts.append(part)
        return part

    def _settings(self) -> dict[str, str]:
        return {
            "AI4THAI_DATA_DIR": str(self.data_dir),
            "VISION_SERVICE_PORT": str(self.ports.vision),
            "QUEUE_WORKER_PORT": str(self.ports.queue),
            "QUEUE_VISION_ADDRESS": self.vision_address,
            "REDIS_PORT": str(self.ports.redis),
            "REDIS_URL": self.redis_url or f"redis://127.0.0.1:{self.ports.redis}/0",
            # A folder is better than the broker's memory. Not with a Redis that may be shared with other machines: they lack it.
            "QUEUE_MEDIA_URL": os.environ.get("QUEUE_MEDIA_URL")
            or ("" if self.redis_url else (self.data_dir.resolve() / "media").as_uri()),
            "SERVING_HOST": self.host,
            "PYTHONUNBUFFERED": "1",
        }

    def _check_ports(self) -> None:
        wanted = {"vision": self.ports.vision, "queue": self.ports.queue}
        # Not the broker's: it may find a server there that outlived an earlier run, and adopt it.
        for name, port in wanted.items():
            if self._is_taken(port):
                raise PortTaken(name, port)

    def _is_taken(self, port: int) -> bool:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            socket.create_server((self.host, port), family=family).close()
        except OSError:
            return True
        return False

    def _vision_missing(self, http: httpx.Client) -> str:
        if http.get(f"http://{self.vision_address}/health").status_code == 200:
            return ""
        models = http.get(f"http://{self.vision_address}/info").json()["models"]
        states = {model["name"]: model["state"].removeprefix("MODEL_STATE_") for model in models}
        if states and set(states.values()) <= {"READY", "FAILED"} and "FAILED" in states.values():
            return ""  # it will not get any readier: what failed is told, the others serve
        progress = {model["name"]: float(model.get("load_progress", 0)) for model in models}
        return ", ".join(
            f"{name} {state.lower().replace('_', ' ')}" + (f" {progress[name]:.0%}" if state == "LOADING" else "")
            for name, state in states.items()
            if state != "READY"
        )

    def _queue_missing(self, http: httpx.Client) -> str:
        answer = http.get(f"http://{self.queue_address}/health")
        return "" if answer.status_code == 200 else "; ".join(answer.json().get("why", ())) or "not serving yet"

    def _worker_missing(self, http: httpx.Client) -> str:
        answer: dict[str, Any] = http.get(f"http://{self.queue_address}/v1/workers").json()
        return "" if answer.get("workers") else "not registered yet"


def default_data_dir() -> Path:
    """AI4THAI_DATA_DIR, or `ai4thai` in the user's data directory."""
    if given := os.environ.get("AI4THAI_DATA_DIR"):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "ai4thai"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ai4thai"


def _safely(probe: Callable[[httpx.Client], str], http: httpx.Client) -> str:
    try:
        return probe(http)
    except (httpx.HTTPError, ValueError, KeyError):
        return "starting"
