"""Redis-protocol servers as a test needs them: a master with a replica and sentinels, and TLS in front of one."""

from __future__ import annotations

import asyncio
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from queue_server.broker import find_program
from tests.ports import free_port

SERVICE = "jobs"


class Server:
    """One process of the broker's program."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(find_program()),
                    *arguments,
                    "--port",
                    str(self.port),
                    "--bind",
                    "127.0.0.1",
                    "--dir",
                    str(folder),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        with self.client() as client:
            until_s = time.monotonic() + 10
            while True:
                try:
                    client.ping()
                    return
                except redis.AuthenticationError:
                    return
                except redis.ConnectionError:
                    assert self.process.poll() is None and time.monotonic() < until_s, (folder / "log").read_text()
                    time.sleep(0.02)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()


@dataclass(frozen=True)
class Cluster:
    """A master, its replica, three sentinels; the sentinels take half a second to find the master gone."""

    master: Server
    replica: Server
    sentinels: tuple[Server, ...]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://worker:secret@{hosts}/{SERVICE}/0?sentinel_password=watchman"


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    started: list[Server] = []
    data = (
        *("--appendonly", "yes", "--save", "", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"),
        *("--user", "worker", "on", ">secret", "~*", "&*", "+@all", "--masteruser", "worker", "--masterauth", "secret"),
    )
    try:
        master = Server(folder / "master", *data)
        started.append(master)
        replica = Server(folder / "replica", *data, "--replicaof", "127.0.0.1", str(master.port))
        started.append(replica)
        # A sentinel asks its master for replicas when it starts, then only every ten seconds.
        _wait_until_online(master)
        for number in range(3):
            config = folder / f"sentinel{number}.conf"
            config.write_text(
                f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 2\n"
                f"sentinel auth-user {SERVICE} worker\nsentinel auth-pass {SERVICE} secret\n"
                f"sentinel down-after-milliseconds {SERVICE} 500\nsentinel failover-timeout {SERVICE} 3000\n"
                "requirepass watchman\nsentinel sentinel-pass watchman\n"
            )
            started.append(Server(folder / f"sentinel{number}", str(config), "--sentinel"))
        sentinels = tuple(started[2:])
        _wait_until_met(sentinels)
        yield Cluster(master, replica, sentinels)
    finally:
        for server in started:
            server.stop()


def _wait_until_online(master: Server) -> None:
    until_s = time.monotonic() + 10
    with master.client() as client:
        while client.info("replication").get("slave0", {}).get("state") != "online":
            assert time.monotonic() < until_s, "the replica does not come"
            time.sleep(0.05)


def _wait_until_met(sentinels: tuple[Server, ...]) -> None:
    """Until each sentinel knows the replica and the others."""
    until_s = time.monotonic() + 15
    for sentinel in sentinels:
        with redis.Redis(port=sentinel.port, password="watchman", socket_timeout=5) as client:
            while True:
                seen = client.sentinel_masters()[SERVICE]
                if seen["num-slaves"] == 1 and seen["num-other-sentinels"] == 2:
                    break
                assert time.monotonic() < until_s, f"the sentinels do not come together: {seen}"
                time.sleep(0.05)


def make_certificates(folder: Path) -> None:
    """An authority, a server's certificate for 127.0.0.1, a client's: ca.pem, server.pem, client.pem, with .key each."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(*new, "-x509", "-days", "2", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")


class TlsFront:
    """Takes TLS from callers that have a client's certificate, and passes the bytes on to a plain port."""

    def __init__(self, folder: Path, to_port: int) -> None:
        self.port = 0
        self._server: asyncio.Server | None = None
        self._to_port = to_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._context.load_verify_locations(folder / "ca.pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=self._context), self._loop
        )
        self._server = listening.result(5)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        async def end() -> None:
            assert self._server is not None
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to_port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(1 << 16):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))
