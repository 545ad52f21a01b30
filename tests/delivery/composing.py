"""Runs compose.yaml without Docker: the same commands, variables, secrets, health checks and order, each container a process.

docker-compose itself resolves the file (variables, profiles, `extends`); what Docker's engine does is done here. A container's
paths (/data, /tmp, /run/secrets, /redis.sh) are folders of the run, its neighbours' names are this machine. Users, rights, limits
and read-only roots are not simulated.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from queue_server.broker import find_program
from tests.processes import ROOT

BIN = Path(sys.executable).parent
# Docker looks once in an interval; what is not healthy yet is looked at so often here, so that tests need not wait.
PACE_S = 0.5
# A machine that runs all tests at once answers later than one that serves.
PATIENCE = 4
RESTART_S = 0.1
# What every image of ours says (Dockerfile, base).
IMAGE_ENVIRONMENT = {"AI4THAI_DATA_DIR": "/data", "HOME": "/tmp", "PYTHONUNBUFFERED": "1"}
# Valkey understands inline commands with the quotes that its client understands: this passes them on, for machines without one.
CLIENT = """\
import socket, sys
assert sys.argv[1] == "-p" and len(sys.argv) == 3, "the password is not to be on the command line"
with socket.create_connection(("127.0.0.1", int(sys.argv[2])), 5) as server, server.makefile("rwb") as lines:
    for line in sys.stdin.buffer:
        lines.write(line)
        lines.flush()
        print(lines.readline()[1:].decode().rstrip())
"""


def resolve(
    *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`docker-compose ARGUMENTS… config --format json`, with no .env, and nothing in the environment but what is given."""
    return subprocess.run(
        [BIN / "docker-compose", "--env-file", "/dev/null", *arguments, "config", "--format", "json"],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Refused(Exception):
    """What `docker compose up` would end with."""


@dataclass
class Container:
    """One service's process: started, looked at and started again as its service in compose.yaml says."""

    name: str
    service: Mapping[str, Any]
    command: list[str]
    probe: list[str]
    environment: dict[str, str]
    log: Path
    temporary: Path
    """Its tmpfs."""
    health: str = ""
    """`starting`, `healthy` or `unhealthy`, as in `docker ps`; empty: it has no health check."""
    starts: list[float] = field(default_factory=list)
    healthy_s: float = 0.0
    """When it was healthy for the first time."""
    process: subprocess.Popen[bytes] | None = None
    _ending: threading.Event = field(default_factory=threading.Event)
    _keeper: threading.Thread | None = None

    def start(self) -> None:
        """As `docker start`."""
        self._spawn()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    @property
    def exit_code(self) -> int | None:
        """None: it runs, or is about to run again."""
        assert self.process is not None
        if self.service["restart"] != "no" and not self._ending.is_set():
            return None
        return self.process.poll()

    def stop(self) -> float:
        """As `docker stop`; how long it took. Raises AssertionError when it would have been killed, or did not end well."""
        assert self.process is not None and self._keeper is not None
        self._ending.set()
        began_s = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds(self.service.get("stop_grace_period", "10s")))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} was killed: it took longer than its stop_grace_period") from None
        finally:
            self._keeper.join(20)
            shutil.rmtree(self.temporary, ignore_errors=True)
        # tini, the images' first process, ends like its child.
        assert code == 0 or self.service["restart"] == "no", f"{self.name} ended with {code}:\n{self.log_tail()}"
        return time.monotonic() - began_s

    def log_tail(self) -> str:
        """As `docker logs --tail 30`."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-30:])

    def _spawn(self) -> None:
        self.temporary.mkdir(mode=0o700, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.starts.append(time.monotonic())
        self.health = "starting" if self.probe else ""
        self._failures = 0

    def _keep(self) -> None:
        interval_s = seconds(self.service["healthcheck"]["interval"]) if self.probe else PACE_S
        restart_s, look_s = RESTART_S, 0.0
        while not self._ending.wait(0.1):
            assert self.process is not None
            if self.process.poll() is None:
                if self.probe and time.monotonic() > look_s:
                    self._look()
                    look_s = time.monotonic() + (interval_s if self.health == "healthy" else PACE_S)
            elif self.service["restart"] != "no" and not self._ending.wait(restart_s):
                restart_s *= 2
                self._spawn()
                look_s = 0.0

    def _look(self) -> None:
        check = self.service["healthcheck"]
        try:
            done = subprocess.run(
                self.probe,
                env=self.environment,
                cwd=ROOT,
                capture_output=True,
                timeout=seconds(check["timeout"]) * PATIENCE,
                check=False,
            )
            well, said = done.returncode == 0, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            well, said = False, b"timeout"
        if well:
            self.health, self._failures = "healthy", 0
            self.healthy_s = self.healthy_s or time.monotonic()
        elif self.health != "starting" or time.monotonic() - self.starts[-1] > seconds(check["start_period"]):
            self._failures += 1
            if self._failures >= check["retries"]:
                self.health = "unhealthy"
        if not well:
            with self.log.open("ab") as log:
                log.write(b"[health] " + said.strip() + b"\n")


class Composition:
    """`docker compose up` and `down`, with a folder for the machine's volumes; a context manager that leaves no process."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Resolves the file. Raises Refused when docker-compose does not take it."""
        done = resolve(environment=environment)
        if done.returncode != 0:
            raise Refused(done.stderr.strip())
        self.model: dict[str, Any] = json.loads(done.stdout)
        self._folder = folder
        _tools(folder / "bin")
        self.containers = {name: self._container(name) for name in self.model["services"]}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for container in self.containers.values():
            container._ending.set()
            if container.process is not None and container.process.poll() is None:
                container.process.kill()
                container.process.wait()
            if error is not None and container.log.exists():
                print(f"--- {container.name}\n{container.log_tail()}")
            shutil.rmtree(container.temporary, ignore_errors=True)

    def up(self, *names: str, timeout_s: float = 100) -> None:
        """Starts all, each as soon as what it depends on is as it must be; or those named alone, as `--no-deps` does.

        Raises:
            Refused: a container that another depends on has ended, or is unhealthy.
        """
        until_s = time.monotonic() + timeout_s
        waiting = {name: self.containers[name] for name in names or self.containers}
        while waiting:
            for name, container in list(waiting.items()):
                needed = container.service.get("depends_on", {}).items()
                if names or all(self._holds(*one) for one in needed):
                    container.start()
                    del waiting[name]
            if time.monotonic() > until_s:
                states = {name: container.health for name, container in self.containers.items()}
                raise AssertionError(f"{', '.join(waiting)} did not start in time; {states}")
            time.sleep(0.05)

    def down(self) -> dict[str, float]:
        """Stops all, what depends on others before them; how long each took, in that order."""
        order = sorted(self.containers.values(), key=lambda one: one.starts[0] if one.starts else 0, reverse=True)
        return {one.name: one.stop() for one in order if one.starts}

    def wait_healthy(self, names: Iterable[str], *, timeout_s: float = 100) -> None:
        """As `docker compose up --wait`."""
        until_s = time.monotonic() + timeout_s
        while missing := [name for name in names if self.containers[name].health != "healthy"]:
            if time.monotonic() > until_s:
                raise AssertionError(f"{missing} not healthy in time:\n{self.containers[missing[0]].log_tail()}")
            time.sleep(0.05)

    def _holds(self, needed: str, dependency: Mapping[str, Any]) -> bool:
        container = self.containers.get(needed)
        if container is None:
            assert not dependency["required"], f"{needed} is not there"
            return True
        if not container.starts:
            return False
        match dependency["condition"]:
            case "service_started":
                return True
            case "service_healthy":
                if container.health == "unhealthy":
                    raise Refused(f"container {container.name} is unhealthy:\n{container.log_tail()}")
                return container.health == "healthy"
            case "service_completed_successfully":
                if code := container.exit_code:
                    raise Refused(
                        f"service {needed!r} didn't complete successfully: exit {code}\n{container.log_tail()}"
                    )
                return code == 0
        raise AssertionError(dependency)

    def _container(self, name: str) -> Container:
        service = self.model["services"][name]
        place = self._folder / name
        (place / "run/secrets").mkdir(parents=True, exist_ok=True)
        # What the container has where. /tmp is short, for a socket's path may have 107 characters, and goes with the container.
        temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir="/tmp"))
        places = {"/tmp": temporary, "/run/secrets": place / "run/secrets"}
        for mount in service.get("volumes", ()):
            places[mount["target"]] = self._folder / "volumes" / mount["source"]
            places[mount["target"]].mkdir(parents=True, exist_ok=True)
        for config in service.get("configs", ()):
            places[config["target"]] = Path(self.model["configs"][config["source"]]["file"])
        for secret in service.get("secrets", ()):
            # A copy, not a link: a bind mount is the file itself.
            shutil.copy(self.model["secrets"][secret["source"]]["file"], place / secret["target"].lstrip("/"))
        networks = set(service.get("networks", ()))
        neighbours = [
            other for other, one in self.model["services"].items() if networks & set(one.get("networks") or ())
        ]

        inside = re.compile(rf"(?<![\w.])(?:{'|'.join(re.escape(target) for target in places)})(?![\w.-])")
        named = re.compile(rf"(?<![\w.-])(?:{'|'.join(neighbours) or '(?!)'})(?=:\d)")

        def here(text: str) -> str:
            return inside.sub(lambda found: str(places[found[0]]), named.sub("127.0.0.1", text))

        given = {key: value for key, value in (service.get("environment") or {}).items() if value is not None}
        environment = {key: here(value) for key, value in {**IMAGE_ENVIRONMENT, "TMPDIR": "/tmp", **given}.items()}
        environment |= {
            "PATH": os.pathsep.join([str(self._folder / "bin"), str(BIN), "/usr/bin", "/bin"]),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "clients"), str(ROOT)]),
            "AI4THAI_SECRETS_DIR": str(place / "run/secrets"),
        }
        test = list(service.get("healthcheck", {}).get("test", ()))
        assert not test or test[0] == "CMD", test
        return Container(
            service["container_name"],
            service,
            [here(word) for word in [*(service.get("entrypoint") or ()), *service["command"]]],
            [here(word) for word in test[1:]],
            environment,
            place / "log",
            temporary,
        )


def seconds(duration: str) -> float:
    """`1m30s` → 90."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|s|m|h)", duration))


def _tools(folder: Path) -> None:
    """What the image of Redis has: the server, and its client (the real one where this machine has it)."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    (folder / "valkey-server").symlink_to(find_program())
    if real := shutil.which("valkey-cli") or shutil.which("redis-cli"):
        (folder / "valkey-cli").symlink_to(real)
        return
    (folder / "client.py").write_text(CLIENT)
    (folder / "valkey-cli").write_text(f'#!/bin/sh\nexec {sys.executable} -ES {folder / "client.py"} "$@"\n')
    (folder / "valkey-cli").chmod(0o755)
