"""HTTP/1.1 by uvicorn's protocol on sockets that the listener accepted, with a time limit on slow senders."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serving import telemetry
from serving.settings import ServingSettings

_PROTOCOL = "serving.http1"


class Http:
    """Serves an ASGI application on sockets handed to it one by one."""

    def __init__(self, app: ASGIApp, serving: ServingSettings) -> None:
        self._config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Else uvicorn would believe any X-Forwarded-For that comes from this machine.
            proxy_headers=False,
            timeout_keep_alive=round(serving.http_keep_alive_seconds),
        )
        self._state = ServerState()
        self._request_seconds = serving.http_request_seconds

    def start(self) -> None:
        """Loads uvicorn's configuration."""
        self._config.load()

    async def serve(self, sock: socket.socket) -> None:
        """Takes over an accepted socket with its first bytes unread; the protocol closes it."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._protocol, sock)

    @property
    def connection_count(self) -> int:
        """Open HTTP connections."""
        return len(self._state.connections)

    async def stop(self, seconds: float) -> None:
        """Tells every connection to finish its answer and close; after `seconds` they are cut."""
        for connection in list(self._state.connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(seconds):
                while self._state.connections or self._state.tasks:  # noqa: ASYNC110  # uvicorn's sets tell nobody
                    await asyncio.sleep(0.02)
        except TimeoutError:
            for connection in list(self._state.connections):
                transport = getattr(connection, "transport", None)
                if transport is not None:
                    transport.abort()

    def _protocol(self) -> asyncio.Protocol:
        return _Protocol(self._request_seconds, config=self._config, server_state=self._state, app_state={})


@contextmanager
def unhurried(scope: Scope) -> Iterator[None]:
    """While the block runs, the request's body may take its time: the application bounds it by itself.

    What has not arrived by the end of the block must do so within the usual time, which begins anew.
    """
    protocol: _Protocol = scope["extensions"][_PROTOCOL]["protocol"]
    protocol.lift_limit()
    try:
        yield
    finally:
        protocol.restore_limit()


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself would wait for the rest of a half-sent request for ever."""

    def __init__(self, request_seconds: float, **rest: Any) -> None:
        super().__init__(**rest)
        self._request_seconds = request_seconds
        self._limit: asyncio.TimerHandle | None = None
        self._arrived = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        telemetry.CONNECTIONS.labels("http").inc()
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        telemetry.CONNECTIONS.labels("http").dec()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_PROTOCOL: {"protocol": self}}
        self._arrived = False
        self._arm()

    def on_message_complete(self) -> None:
        self._arrived = True
        self._disarm()
        super().on_message_complete()

    def lift_limit(self) -> None:
        """For `unhurried`."""
        self._disarm()

    def restore_limit(self) -> None:
        """For `unhurried`."""
        if not self._arrived:
            self._arm()

    def _arm(self) -> None:
        self._disarm()
        self._limit = self.loop.call_later(self._request_seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _too_slow(self) -> None:
        telemetry.CONNECTIONS_REFUSED.labels("http request too slow").inc()
        if self.transport is not None and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
