"""One TCP port: a connection's first bytes decide whether it speaks gRPC or HTTP/1.1.

accepted socket ─ peek 16 bytes ─┬─ "PRI * HTTP/2.0" → relay to grpcio's UNIX socket
                                 └─ else             → HTTP/1.1 in this process
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Coroutine
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from serving import telemetry
from serving.http1 import Http
from serving.logs import get_logger
from serving.relay import CHUNK_BYTES, LINGER_SECONDS, Relay
from serving.settings import ServingSettings

_log = get_logger("listener")

# RFC 9113, 3.4: every HTTP/2 connection begins with these octets (the preface goes on after them).
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n"
TLS_HANDSHAKE = 0x16
SEND_BUFFER_BYTES = 4 << 20


class Listener:
    """Owns the listening socket, the connections that have not spoken yet, and the relays."""

    def __init__(self, serving: ServingSettings, port: int, grpc_socket: Path, http: Http) -> None:
        self._serving, self._wanted_port, self._grpc_socket, self._http = serving, port, grpc_socket, http
        self._undecided: dict[socket.socket, asyncio.TimerHandle] = {}
        self._relays: set[Relay] = set()
        self._relay_gone = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = count(1)
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._accepting: asyncio.Task[None] | None = None
        self._refusing = False
        self.port = port

    def bind(self) -> None:
        """Takes the port. Raises OSError when it is taken."""
        family = socket.AF_INET6 if ":" in self._serving.host else socket.AF_INET
        self._socket = socket.create_server(
            (self._serving.host, self._wanted_port), family=family, backlog=1024, reuse_port=False
        )
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]

    def start(self) -> None:
        """Begins to accept."""
        self._loop = asyncio.get_running_loop()
        self._accepting = asyncio.create_task(self._accept(), name="accept")

    async def close(self) -> None:
        """Accepts no more; connections that have not said what they speak are closed, the others live on."""
        if self._accepting is not None:
            self._accepting.cancel()
            with suppress(asyncio.CancelledError):
                await self._accepting
        self._socket.close()
        for sock in list(self._undecided):
            self._drop(sock, "draining")

    async def finish(self) -> None:
        """Once gRPC has stopped: lets its last words reach the callers, for at most LINGER_SECONDS, then closes all relays."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._relays:
                    self._relay_gone.clear()
                    await self._relay_gone.wait()
        for relay in list(self._relays):
            relay.close()

    @property
    def connection_count(self) -> int:
        """Open connections of every kind."""
        return len(self._undecided) + len(self._relays) + self._http.connection_count

    async def _accept(self) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(self._socket)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    _log.warning("no file descriptor is left for a new connection; waiting for one to close")
                    await asyncio.sleep(0.1)
                continue
            if self.connection_count >= self._serving.max_connections:
                telemetry.CONNECTIONS_REFUSED.labels("too many connections").inc()
                sock.close()
                if not self._refusing:
                    self._refusing = True
                    _log.warning(
                        "closing new connections: SERVING_MAX_CONNECTIONS is reached",
                        limit=self._serving.max_connections,
                    )
                continue
            self._refusing = False
            self._await_first_bytes(sock)

    def _await_first_bytes(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The loop is woken only when the preface is there as a whole, so a lone "P" needs no second look.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(HTTP2_PREFACE))
        timer = self._loop.call_later(self._serving.first_bytes_seconds, self._drop, sock, "said nothing")
        self._undecided[sock] = timer
        self._loop.add_reader(sock, self._decide, sock)

    def _decide(self, sock: socket.socket) -> None:
        try:
            head = sock.recv(len(HTTP2_PREFACE), socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            head = b""
        # Fewer bytes than asked for: the other side has closed its half, and no whole request can fit in so few.
        if len(head) < len(HTTP2_PREFACE):
            self._drop(sock, "closed before it said what it speaks")
            return
        self._undecided.pop(sock).cancel()
        self._loop.remove_reader(sock)
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        if head == HTTP2_PREFACE:
            self._keep(self._relay(sock))
        elif head[0] == TLS_HANDSHAKE:
            telemetry.CONNECTIONS_REFUSED.labels("TLS").inc()
            _log.warning("closed a connection that speaks TLS: this port is plaintext; put a TLS proxy before it")
            sock.close()
        else:
            self._keep(self._http.serve(sock))

    def _drop(self, sock: socket.socket, reason: str) -> None:
        self._undecided.pop(sock).cancel()
        self._loop.remove_reader(sock)
        telemetry.CONNECTIONS_REFUSED.labels(reason).inc()
        sock.close()

    async def _relay(self, front: socket.socket) -> None:
        back = socket.socket(socket.AF_UNIX)
        back.setblocking(False)
        try:
            host, port = front.getpeername()[:2]
            name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            # grpcio sees this name as the peer: the caller's address, and a number that makes it unique.
            back.bind(f"\0peer/{name}/{next(self._numbers)}")
            await self._connect(back)
            for sock in (front, back):
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        except OSError as error:
            _log.warning("could not hand a connection to gRPC", error=str(error))
            front.close()
            back.close()
            return
        relay = Relay(self._loop, front, back, self._buffer, self._relay_closed)
        self._relays.add(relay)
        telemetry.CONNECTIONS.labels("grpc").inc()
        relay.start()

    async def _connect(self, back: socket.socket) -> None:
        for attempt in range(50):
            try:
                back.connect(str(self._grpc_socket))
                return
            except BlockingIOError:
                # A UNIX socket whose backlog is full does not queue: come again.
                await asyncio.sleep(0.01 * (attempt + 1))
        raise OSError(errno.EAGAIN, "gRPC does not accept")

    def _relay_closed(self, relay: Relay) -> None:
        if relay in self._relays:
            self._relays.remove(relay)
            self._relay_gone.set()
            telemetry.CONNECTIONS.labels("grpc").dec()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
