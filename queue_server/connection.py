"""The queue server's connection to Redis: bounded in time, its scripts loaded, its errors translated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import redis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript

from queue_server import scripts
from queue_server.errors import QueueFull, StoreUnavailable
from queue_server.keys import TAG

# Connections that one server process opens at most; a command holds one for well under a millisecond.
MAX_CONNECTIONS = 64


class Connection:
    """Asks Redis, and gives up in time: UNAVAILABLE when it does not answer, RESOURCE_EXHAUSTED when it is full."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._client: Redis | None = None
        self._scripts: dict[str, AsyncScript] = {}

    async def start(self) -> None:
        """Makes the client; the first command connects, so that Redis may be away now."""
        pool = BlockingConnectionPool.from_url(
            self._url,
            max_connections=MAX_CONNECTIONS,
            timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            # `ask` bounds the time. redis-py would use asyncio.wait_for, which before Python 3.12 loses a cancellation that comes
            # together with the answer: a task could not be stopped.
            socket_timeout=None,
            # Redis may be restarted between two commands: the pooled connection is broken then, and a fresh one is tried once.
            # Every script may be run twice. A command that timed out is not repeated: the caller has waited long enough.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        self._client = Redis(connection_pool=pool)
        self._scripts = {name: self._client.register_script(text) for name, text in scripts.load_all().items()}

    async def stop(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await self._client.aclose()
            await self._client.connection_pool.disconnect()

    @property
    def client(self) -> Any:
        """The client itself, for commands; run them through `ask`. (Typed Any: redis-py's own types join sync and async.)"""
        if self._client is None:
            raise RuntimeError("The connection has not been started.")
        return self._client

    def open_blocking_client(self) -> Any:
        """A client of its own for one reader that blocks in Redis; bounded by `ask` too; the caller closes it."""
        return Redis.from_url(
            self._url,
            socket_connect_timeout=self._timeout_s,
            socket_timeout=None,
            max_connections=1,
        )

    async def ask(self, command: Awaitable[Any], *, timeout_s: float | None = None) -> Any:
        """Awaits a command within the time allowed.

        Raises:
            StoreUnavailable: Redis is away, hangs, is starting, or cannot write.
            QueueFull: Redis' memory is full.
        """
        allowed_s = self._timeout_s if timeout_s is None else timeout_s
        with translated(self._url):
            async with asyncio.timeout(allowed_s):
                return await command

    async def run(self, script: str, parameters: Mapping[str, object], payload: bytes = b"") -> Any:
        """Runs one of scripts.NAMES; raises as `ask` does."""
        arguments: list[str | bytes] = [json.dumps(parameters, ensure_ascii=False, separators=(",", ":")), payload]
        return await self.ask(cast("Awaitable[Any]", self._scripts[script](keys=[TAG], args=arguments)))


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Around commands: what redis-py raises comes out as an error of ours."""
    try:
        yield
    except (TimeoutError, redis.TimeoutError) as error:
        raise StoreUnavailable(why=f"no answer from {place(url)} in time") from error
    except redis.OutOfMemoryError as error:
        raise memory_full() from error
    except (redis.ConnectionError, redis.ReadOnlyError, OSError) as error:
        # Errors of connecting spell out the address; a password is never part of it.
        raise StoreUnavailable(why=f"{place(url)}: {error}") from error
    except redis.ResponseError as error:
        message = str(error)
        if message.startswith("OOM") or "OOM command not allowed" in message:
            raise memory_full() from error
        if message.startswith(("MISCONF", "LOADING", "MASTERDOWN", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "NOREPLICAS")):
            raise StoreUnavailable(why=f"{place(url)}: {message}") from error
        raise


def memory_full() -> QueueFull:
    """RESOURCE_EXHAUSTED because of Redis' memory."""
    return QueueFull(
        "The job store's memory is full.",
        cure="Try again when jobs have ended, or raise Redis' maxmemory.",
        retry_after_s=10.0,
    )


def place(url: str) -> str:
    """Where a URL points, without user and password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
