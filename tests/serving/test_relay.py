"""The relay notices every way in which a peer can leave."""

from __future__ import annotations

import asyncio
import socket
import struct

import uvloop

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
        async with asyncio.timeout(2):
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
