"""Starts an image as in production (own user, read-only root, no capabilities), by Docker or else by buildah and a chroot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol


@dataclass(frozen=True)
class Config:
    """What an image says of itself."""

    user: str
    env: dict[str, str]
    entrypoint: list[str]
    command: list[str]
    health_check: list[str]
    """As a command line; empty: it has none."""
    labels: dict[str, str]
    stop_signal: str


class Container(Protocol):
    """One that has been started."""

    def address(self, port: int) -> str:
        """`host:port` at which this machine reaches the port."""

    def inside(self, command: list[str], stdin: str = "", timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command in it, as its user, with its environment."""

    def begin_inside(self, command: list[str]) -> subprocess.Popen[str]:
        """The same without waiting; its stdin and stdout are pipes."""

    def running(self) -> bool:
        """Whether its main process still runs."""

    def terminate(self) -> None:
        """Sends its main process SIGTERM, as every engine does at the end."""

    def wait(self, timeout_s: float) -> int:
        """The exit code of its main process. Raises subprocess.TimeoutExpired."""

    def log(self) -> str:
        """What it has written so far."""

    def remove(self) -> None:
        """Ends it, however it is."""


class Engine(Protocol):
    """What starts containers."""

    def config(self, image: str) -> Config:
        """What the image says of itself."""

    def start(
        self,
        image: str,
        port: int,
        env: dict[str, str],
        command: list[str] | None = None,
        beside: Container | None = None,
    ) -> Container:
        """Starts it; `port` is the one to be reached from here, `beside` another one whose network it shares."""


def _read_config(found: dict[str, Any]) -> Config:
    test = (found.get("Healthcheck") or {}).get("Test") or ["NONE"]
    check = {"CMD": test[1:], "CMD-SHELL": ["sh", "-c", *test[1:]], "NONE": []}[test[0]]
    return Config(
        found.get("User") or "",
        dict(pair.split("=", 1) for pair in found.get("Env") or []),
        found.get("Entrypoint") or [],
        found.get("Cmd") or [],
        check,
        found.get("Labels") or {},
        found.get("StopSignal") or "",
    )


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


class Docker:
    """The docker command; `gpus` as in `docker run --gpus`, empty: none."""

    def __init__(self, gpus: str = "") -> None:
        self._gpus = ["--gpus", gpus] if gpus else []

    def config(self, image: str) -> Config:
        """See Engine."""
        return _read_config(json.loads(_output("docker", "image", "inspect", image))[0]["Config"])

    def start(
        self,
        image: str,
        port: int,
        env: dict[str, str],
        command: list[str] | None = None,
        beside: Container | None = None,
    ) -> Container:
        """See Engine."""
        network = (
            ["--network", f"container:{beside.name}"]
            if isinstance(beside, DockerContainer)
            else ["--publish", f"127.0.0.1::{port}"]
        )
        variables = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
        safe = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        whole = [*safe, *self._gpus, *network, *variables, image, *(command or [])]
        container = DockerContainer(_output("docker", "create", *whole))
        try:
            _output("docker", "start", container.name)
        except RuntimeError:
            container.remove()
            raise
        return container


class DockerContainer:
    """A container of Docker's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def address(self, port: int) -> str:
        """See Container."""
        return _output("docker", "port", self.name, f"{port}/tcp").splitlines()[0]

    def inside(self, command: list[str], stdin: str = "", timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """See Container."""
        whole = ["docker", "exec", "--interactive", self.name, *command]
        return subprocess.run(whole, input=stdin, capture_output=True, text=True, timeout=timeout_s)

    def begin_inside(self, command: list[str]) -> subprocess.Popen[str]:
        """See Container."""
        whole = ["docker", "exec", "--interactive", self.name, *command]
        return subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def running(self) -> bool:
        """See Container."""
        return _output("docker", "inspect", "--format", "{{.State.Running}}", self.name) == "true"

    def terminate(self) -> None:
        """See Container."""
        _output("docker", "kill", "--signal", "TERM", self.name)

    def wait(self, timeout_s: float) -> int:
        """See Container."""
        whole = ["docker", "wait", self.name]
        return int(subprocess.run(whole, check=True, capture_output=True, text=True, timeout=timeout_s).stdout)

    def log(self) -> str:
        """See Container."""
        said = subprocess.run(
            ["docker", "logs", self.name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return said.stdout

    def remove(self) -> None:
        """See Container."""
        subprocess.run(["docker", "rm", "--force", "--volumes", self.name], capture_output=True)


# What a container engine does before it starts a process, for want of one. $1 is the image's files.
_MOUNTS = r"""
mount --bind "$1" "$1"
for folder in proc sys dev tmp data; do mkdir -p "$1/$folder"; done
for file in hosts resolv.conf; do touch "$1/etc/$file"; mount --bind "/etc/$file" "$1/etc/$file"; done
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --rbind /sys "$1/sys"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$1/tmp"
mount -t tmpfs -o mode=755,uid=10001,gid=10001,nosuid,nodev tmpfs "$1/data"
mount -o remount,bind,ro "$1"
"""
_AS_USER = (
    "chroot {root} /usr/bin/setpriv --reuid={user} --regid={group} --clear-groups --no-new-privs --bounding-set=-all"
)


class Buildah:
    """buildah's images, each started in a chroot with mounts and processes of its own; the network is this machine's."""

    def __init__(self) -> None:
        if os.geteuid():
            raise PermissionError("ENGINE=buildah needs root: it mounts and changes the root folder.")

    def config(self, image: str) -> Config:
        """See Engine."""
        return _read_config(json.loads(_output("buildah", "inspect", "--type", "image", image))["Docker"]["config"])

    def start(
        self,
        image: str,
        port: int,
        env: dict[str, str],
        command: list[str] | None = None,
        beside: Container | None = None,
    ) -> Container:
        """See Engine."""
        return BuildahContainer(image, self.config(image), env, command)


class BuildahContainer:
    """A chroot into an image's files."""

    def __init__(self, image: str, config: Config, env: dict[str, str], command: list[str] | None) -> None:
        self._name = _output("buildah", "from", "--pull-never", image)
        root = _output("buildah", "mount", self._name)
        user, _, group = config.user.partition(":")
        variables = [f"{name}={value}" for name, value in {**config.env, **env}.items()]
        self._enter = [*_AS_USER.format(root=root, user=user, group=group or user).split(), "env", "-i", *variables]
        self._folder = Path(tempfile.mkdtemp(prefix="image-check-"))
        self._log: IO[bytes] = (self._folder / "log").open("wb")
        main = [*self._enter, *config.entrypoint, *(command or config.command)]
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", f'{_MOUNTS}\nshift; exec "$@"', "sh", root, *main],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._main_pid = str(self._process.pid)
        try:
            self._main_pid = self._wait_for_main()
        except RuntimeError:
            self.remove()
            raise

    def _wait_for_main(self) -> str:
        """The process id, as this machine counts, of what is number 1 inside."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        until_s = time.monotonic() + 30
        while time.monotonic() < until_s and self._process.poll() is None:
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/exe").resolve().name not in ("sh", "dash", "bash"):
                    return pid
            time.sleep(0.05)
        raise RuntimeError(f"it did not start: {self.log()[-2000:]}")

    def _entering(self, command: list[str]) -> list[str]:
        return ["nsenter", "--target", self._main_pid, "--mount", "--pid", *self._enter, *command]

    def address(self, port: int) -> str:
        """See Container."""
        return f"127.0.0.1:{port}"

    def inside(self, command: list[str], stdin: str = "", timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """See Container."""
        whole = self._entering(command)
        return subprocess.run(whole, input=stdin, capture_output=True, text=True, timeout=timeout_s)

    def begin_inside(self, command: list[str]) -> subprocess.Popen[str]:
        """See Container."""
        return subprocess.Popen(self._entering(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def running(self) -> bool:
        """See Container."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """See Container."""
        os.kill(int(self._main_pid), signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """See Container."""
        return self._process.wait(timeout_s)

    def log(self) -> str:
        """See Container."""
        return (self._folder / "log").read_text(errors="replace")

    def remove(self) -> None:
        """See Container."""
        if self._process.poll() is None:
            os.kill(int(self._main_pid), signal.SIGKILL)  # with number 1 goes all that is in its namespace
            self._process.wait(20)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        subprocess.run(["buildah", "rm", self._name], capture_output=True)


def choose(gpus: str = "") -> Engine:
    """The engine that ENGINE names, else Docker where it answers, else buildah; only Docker brings GPUs into a container."""
    name = os.environ.get("ENGINE") or ("docker" if _docker_answers() else "buildah")
    if name not in ("docker", "buildah"):
        raise ValueError(f"ENGINE={name}: docker or buildah")
    if shutil.which(name) is None:
        raise FileNotFoundError(f"{name} is not installed.")
    if name == "docker":
        return Docker(gpus)
    if gpus:
        raise ValueError("GPUs need ENGINE=docker with the NVIDIA Container Toolkit: a chroot has no driver in it.")
    return Buildah()


def _docker_answers() -> bool:
    return (
        shutil.which("docker") is not None and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
