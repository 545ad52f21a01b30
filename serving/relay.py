"""Carries bytes between two sockets, both ways, holding at most one chunk each way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

CHUNK_BYTES = 1 << 20
_READS_A_TURN = 4


class Relay:
    """Joins `front` and `back` until both have ended; half-close is passed on.

    A slow reader stops the reading on the other side (backpressure), so memory stays below two chunks. `buffer` may be
    shared by all relays of a loop: nothing stays in it between two callbacks.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        front: socket.socket,
        back: socket.socket,
        buffer: memoryview,
        on_closed: Callable[[Relay], None],
    ) -> None:
        self._loop = loop
        self._sockets = (front, back)
        self._on_closed = on_closed
        self._open = True
        self._pumps = (_Pump(self, loop, front, back, buffer), _Pump(self, loop, back, front, buffer))

    def start(self) -> None:
        """Begins to carry."""
        for pump in self._pumps:
            pump.start()

    def ended(self) -> None:
        """One direction has ended; closes once both have."""
        if all(pump.done for pump in self._pumps):
            self.close()

    def close(self) -> None:
        """Closes both sockets at once."""
        if not self._open:
            return
        self._open = False
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
            sock.close()
        self._on_closed(self)


class _Pump:
    """One direction of a relay."""

    def __init__(
        self,
        relay: Relay,
        loop: asyncio.AbstractEventLoop,
        source: socket.socket,
        sink: socket.socket,
        buffer: memoryview,
    ) -> None:
        self._relay, self._loop, self._source, self._sink, self._buffer = relay, loop, source, sink, buffer
        self._rest = memoryview(b"")
        self.done = False

    def start(self) -> None:
        self._loop.add_reader(self._source, self._readable)

    def _readable(self) -> None:
        # Until there is nothing more: when a peer's last bytes and its reset come together, libuv reports the socket once and
        # never again; only another read finds out that nobody is there any more.
        for _ in range(_READS_A_TURN):
            try:
                count = self._source.recv_into(self._buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._relay.close()
                return
            if count == 0:
                self._finish()
                return
            sent = self._send(self._buffer[:count])
            if sent < 0:
                return
            if sent < count:
                # The sink is full: keep what is left and read no more until it is gone.
                self._rest = memoryview(bytes(self._buffer[sent:count]))
                self._loop.remove_reader(self._source)
                self._loop.add_writer(self._sink, self._writable)
                return
        # The others' turn; a reader that is added anew is told of what has come meanwhile, a reset too.
        self._loop.remove_reader(self._source)
        self._loop.add_reader(self._source, self._readable)

    def _writable(self) -> None:
        sent = self._send(self._rest)
        if sent < 0:
            return
        self._rest = self._rest[sent:]
        if not self._rest:
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._readable)

    def _send(self, data: memoryview) -> int:
        """Bytes sent, 0 when the sink is full, -1 when it is gone (and the relay closed)."""
        try:
            return self._sink.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._relay.close()
            return -1

    def _finish(self) -> None:
        self.done = True
        self._loop.remove_reader(self._source)
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._relay.close()
            return
        self._relay.ended()
