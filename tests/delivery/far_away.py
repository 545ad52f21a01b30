"""A line to a port of this machine that is as long as one to another continent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, one_way_s: float) -> None:
    while data := await source.read(1 << 16):
        await asyncio.sleep(one_way_s)
        sink.write(data)
        await sink.drain()


@contextmanager
def far_away(port: int, one_way_s: float) -> Iterator[int]:
    """A port whose connections go on to `port`; every byte takes `one_way_s`, there and back again."""
    ready = threading.Event()
    stops: list[Callable[[], object]] = []
    ports: list[int] = []

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled when the block ends, of which asyncio's streams would complain.
        with suppress(asyncio.CancelledError):
            await carry_both(reader, writer)

    async def carry_both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        ways = [
            asyncio.create_task(_carry(reader, far_writer, one_way_s)),
            asyncio.create_task(_carry(far_reader, writer, one_way_s)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, far_writer):
            end.transport.abort()

    async def serve() -> None:
        stop = asyncio.Event()
        stops.append(partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()

    # asyncio.run ends what is still on its way.
    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield ports[0]
    finally:
        stops[0]()
        thread.join(30)
