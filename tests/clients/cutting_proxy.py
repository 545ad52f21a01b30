"""A TCP proxy that cuts connections after so many bytes, as a bad line would."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class CuttingProxy:
    """Forwards to 127.0.0.1:port; runs in a thread of its own."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.cut_after: deque[int] = deque()
        """When so many bytes have passed in all, both ways together, the connection that they passed is cut."""
        self.cuts = 0
        self.bytes = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            await stop.wait()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)

        async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                self.bytes += len(data)
                if self.cut_after and self.bytes > self.cut_after[0]:
                    self.cut_after.popleft()
                    self.cuts += 1
                    return
                sink.write(data)
                await sink.drain()

        ways = [asyncio.create_task(forward(reader, far_writer)), asyncio.create_task(forward(far_reader, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, far_writer):
            end.transport.abort()


@contextmanager
def cutting_proxy(address: str) -> Iterator[CuttingProxy]:
    """A proxy before a server, for as long as the block takes."""
    proxy = CuttingProxy(int(address.rpartition(":")[2]))
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy.serve(ready, stop)), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
