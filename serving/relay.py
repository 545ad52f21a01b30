"""Carries bytes between two sockets, both ways, holding at most one chunk each way."""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable

CHUNK_BYTES = 1 << 20
_READS_A_TURN = 4
# How long a caller may go on sending, or read nothing, once gRPC has ended the connection; and how often a relay that is held up
# looks whether somebody is gone.
LINGER_SECONDS = 5.0


class Relay:
    """Joins `front`, the caller, and `back`, gRPC, until both have ended; half-close is passed on.

    When gRPC ends first, its last words still reach a caller who goes on sending: what he sends is read and thrown away, since
    closing a TCP socket with unread bytes resets it, and a reset destroys what was on its way to him. It is over when he closes,
    or has taken nothing for LINGER_SECONDS.

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
        self._inward, self._outward = _Pump(self, loop, front, back, buffer), _Pump(self, loop, back, front, buffer)
        self._watch: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to carry."""
        self._inward.start()
        self._outward.start()

    def ended(self) -> None:
        """One direction has ended; closes once both have, or the caller has lingered."""
        if not self._outward.done:
            return
        if self._inward.done:
            self.close()
        else:
            self._linger()

    def held_up(self) -> None:
        """A sink is full, so its source is not read, and does not tell when it is gone."""
        if self._watch is None and self._open:
            self._watch = self._loop.call_later(LINGER_SECONDS, self._look, self._taken_bytes())

    def sink_lost(self, pump: _Pump) -> None:
        """The socket that `pump` writes to is gone: gRPC may have left last words there, a caller who is gone wants none."""
        if pump is self._inward:
            self._linger()
        else:
            self.close()

    def source_lost(self, pump: _Pump) -> None:
        """The socket that `pump` reads is gone, and all that was in it has been read."""
        if pump is self._outward:
            pump.finish()
        else:
            self.close()

    def _linger(self) -> None:
        if self._open:
            self._inward.discard()
            self.held_up()

    def _taken_bytes(self) -> int:
        """What the caller's machine has acknowledged; the rest lies in the socket's buffer here (SIOCOUTQ of tcp(7))."""
        unsent = fcntl.ioctl(self._sockets[0], termios.TIOCOUTQ, bytes(4))
        return self._outward.carried_bytes - int(struct.unpack("i", unsent)[0])

    def _look(self, taken_bytes: int) -> None:
        self._watch = None
        front, back = self._sockets
        grpc_is_gone = self._inward.discarding or _hung_up(back)
        if _hung_up(front) or (grpc_is_gone and self._taken_bytes() <= taken_bytes):
            self.close()
        elif grpc_is_gone or self._inward.is_held_up or self._outward.is_held_up:
            self.held_up()

    def close(self) -> None:
        """Closes both sockets at once."""
        if not self._open:
            return
        self._open = False
        if self._watch is not None:
            self._watch.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
            sock.close()
        self._on_closed(self)


def _hung_up(sock: socket.socket) -> bool:
    """Whether the peer has closed or reset the connection, not merely its half."""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


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
        self.discarding = self.done = False
        self.carried_bytes = 0

    @property
    def is_held_up(self) -> bool:
        """Whether the sink does not take what has been read."""
        return bool(self._rest)

    def start(self) -> None:
        self._loop.add_reader(self._source, self._readable)

    def discard(self) -> None:
        """Reads on, and throws away what it reads."""
        self.discarding = True
        if self._rest:
            self._rest = memoryview(b"")
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._readable)

    def finish(self) -> None:
        """Passes on that the source has ended."""
        self.done = True
        self._loop.remove_reader(self._source)
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._relay.sink_lost(self)
        self._relay.ended()

    def _readable(self) -> None:
        # Until there is nothing more: when a peer's last bytes and its reset come together, libuv reports the socket once and
        # never again; only another read finds out that nobody is there any more.
        for _ in range(_READS_A_TURN):
            try:
                count = self._source.recv_into(self._buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._relay.source_lost(self)
                return
            if count == 0:
                self.finish()
                return
            sent = self._send(self._buffer[:count])
            if sent < 0:
                return
            if sent < count:
                # The sink is full: keep what is left and read no more until it is gone.
                self._rest = memoryview(bytes(self._buffer[sent:count]))
                self._loop.remove_reader(self._source)
                self._loop.add_writer(self._sink, self._writable)
                self._relay.held_up()
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
        """Bytes sent or thrown away, 0 when the sink is full, -1 when the relay is closed, the sink being gone."""
        if not self.discarding:
            try:
                sent = self._sink.send(data)
                self.carried_bytes += sent
                return sent
            except (BlockingIOError, InterruptedError):
                return 0
            except OSError:
                self._relay.sink_lost(self)
        return len(data) if self.discarding else -1
