"""The relay notices every way in which a peer can leave, and what the server said last arrives all the same."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator

import pytest
import uvloop

from serving import relay
from serving.relay import CHUNK_BYTES, Relay


async def leave(last_words: bytes) -> tuple[bytes, bool]:
    """A peer sends, then resets the connection, all while the loop is busy: what came through, and whether the relay ended."""
    loop = asyncio.get_running_loop()
    listening = socket.create_server(("127.0.0.1", 0))
    peer = socket.create_connection(listening.getsockname())
    front, _ = listening.accept()
    back, server = socket.socketpair()
    for sock in (front, back, server):
        sock.setblocking(False)
    closed = asyncio.Event()
    Relay(loop, front, back, memoryview(bytearray(CHUNK_BYTES)), lambda _: closed.set()).start()
    await asyncio.sleep(0.05)  # until the relay listens
    # Nothing is awaited here: the loop sees the bytes and the reset at once.
    peer.sendall(last_words)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    try:
        async with asyncio.timeout(20):
            await closed.wait()
    except TimeoutError:
        return b"", False
    received = b""
    while chunk := server.recv(CHUNK_BYTES):
        received += chunk
    server.close()
    listening.close()
    return received, True


def test_last_words_and_a_reset_that_come_at_once_end_the_relay() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        _, ended = runner.run(leave(b"goodbye"))
    assert ended


class Joined:
    """A relay with a caller at its front and a server at its back."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.caller = socket.socket()
        back, self.server = socket.socketpair()
        # Small, whatever the machine's are, so that a few chunks fill what lies before either peer.
        for sock in (self._listening, self.caller, back):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.caller.connect(self._listening.getsockname())
        front, _ = self._listening.accept()
        for sock in (self.caller, front, back, self.server):
            sock.setblocking(False)
        self.closed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._relay = Relay(loop, front, back, memoryview(bytearray(CHUNK_BYTES)), lambda _: self.closed.set())
        self._relay.start()

    async def held_up(self) -> None:
        """Until a sink is full, so that the relay holds a rest."""
        async with asyncio.timeout(20):
            while not (self._relay._inward.is_held_up or self._relay._outward.is_held_up):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.01)

    def close(self) -> None:
        for sock in (self.caller, self.server, self._listening):
            sock.close()


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


def test_the_last_words_of_a_server_reach_a_caller_who_goes_on_sending(runner: asyncio.Runner) -> None:
    """As a camera does whose stream the draining server ends: a reset would destroy the reason on its way."""
    last_words = b"draining" * 20_000

    async def read_all(joined: Joined) -> bytes:
        loop = asyncio.get_running_loop()
        received = b""
        while chunk := await loop.sock_recv(joined.caller, CHUNK_BYTES):
            received += chunk
            await loop.sock_sendall(joined.caller, b"frame" * 100)
            await asyncio.sleep(0.005)  # a slow reader: the server has been gone for long when it comes to the end
        return received

    async def scene() -> bytes:
        joined = Joined()
        await asyncio.sleep(0.05)
        # Nothing is awaited here: the loop sees at once that the server is gone and that there is more for it.
        joined.caller.send(b"frame" * 1_000)
        joined.server.send(last_words)
        joined.server.close()
        joined.caller.send(b"frame" * 1_000)
        async with asyncio.timeout(20):
            received = await read_all(joined)
            joined.caller.close()
            await joined.closed.wait()
        joined.close()
        return received

    assert runner.run(scene()) == last_words


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "LINGER_SECONDS", 0.2)


@pytest.mark.parametrize("last_words_bytes", [0, 16 * CHUNK_BYTES])
@pytest.mark.usefixtures("short_linger")
def test_a_caller_who_neither_reads_nor_leaves_is_left(runner: asyncio.Runner, last_words_bytes: int) -> None:
    async def scene() -> None:
        joined = Joined()
        talking = asyncio.create_task(asyncio.get_running_loop().sock_sendall(joined.server, bytes(last_words_bytes)))
        if last_words_bytes:
            await joined.held_up()
        talking.cancel()
        joined.server.close()
        async with asyncio.timeout(20):
            await joined.closed.wait()
        joined.close()

    runner.run(scene())


def test_a_caller_who_reads_slowly_may_take_longer_than_the_linger(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LINGER_SECONDS", 0.5)

    async def scene() -> int:
        joined = Joined()
        loop = asyncio.get_running_loop()

        async def say_last_words() -> None:
            await loop.sock_sendall(joined.server, bytes(8 * CHUNK_BYTES))
            joined.server.close()

        saying = asyncio.create_task(say_last_words())
        received = 0
        async with asyncio.timeout(20):
            while chunk := await loop.sock_recv(joined.caller, CHUNK_BYTES // 4):
                received += len(chunk)
                if saying.done() and received < 7 * CHUNK_BYTES:
                    joined.caller.send(b"more")
                await asyncio.sleep(0.03)
        joined.close()
        return received

    assert runner.run(scene()) == 8 * CHUNK_BYTES


@pytest.mark.usefixtures("short_linger")
def test_a_caller_who_is_gone_is_noticed_although_the_server_reads_nothing(runner: asyncio.Runner) -> None:
    async def scene() -> None:
        joined = Joined()
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(joined.caller, bytes(64 * CHUNK_BYTES)))
        await joined.held_up()
        sending.cancel()
        joined.caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        joined.caller.close()
        async with asyncio.timeout(20):
            await joined.closed.wait()
        joined.close()

    runner.run(scene())


def test_a_server_that_is_gone_while_much_waits_for_it_ends_the_relay(runner: asyncio.Runner) -> None:
    async def scene() -> None:
        joined = Joined()
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(loop.sock_sendall(joined.caller, bytes(16 * CHUNK_BYTES)))
        await joined.held_up()
        assert not sending.done()
        joined.server.close()
        async with asyncio.timeout(20):
            await sending
            assert await loop.sock_recv(joined.caller, 1) == b"", "the end, no reset"
            joined.caller.close()
            await joined.closed.wait()
        joined.close()

    runner.run(scene())
