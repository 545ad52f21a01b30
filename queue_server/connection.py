"""The queue server's connection to Redis: bounded in time, its scripts loaded, its errors translated."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.commands.core import AsyncScript
from redis.exceptions import NoPermissionError
from redis.sentinel import MasterNotFoundError

from queue_server import scripts
from queue_server.errors import QueueFull, StoreUnavailable
from queue_server.keys import TAG
from queue_server.redis_address import close, read_address

# Connections that one server process opens at most; a command holds one for well under a millisecond.
MAX_CONNECTIONS = 64
# How often Redis' settings are read; someone may change them while it runs.
CONFIG_S = 10.0
# Errors of a Redis that cannot write just now. Redis 6.2 puts those of a command inside a script behind other words.
_UNAVAILABLE = re.compile(
    r"(?:^|-)(?:MISCONF|LOADING|MASTERDOWN|BUSY|TRYAGAIN|CLUSTERDOWN|NOREPLICAS|READONLY|UNBLOCKED)\b"
)
_FORBIDDEN = re.compile(r"\bNOPERM\b|ACL failure|can't run this command|can't access at least one of the keys")


class Connection:
    """Asks Redis, and gives up in time: UNAVAILABLE when it does not answer, RESOURCE_EXHAUSTED when it is full."""

    def __init__(self, url: str, timeout_s: float, terms: Mapping[str, object]) -> None:
        """Remembers; `terms` are the parameters that every script gets: QueueSettings.terms."""
        self._url = url
        self._timeout_s = timeout_s
        self._terms = terms
        self._client: Any = None
        self._config: dict[str, str] | None = None
        self._config_until_s = 0.0
        self._scripts: dict[str, AsyncScript] = {}

    async def start(self) -> None:
        """Makes the client; the first command connects, so that Redis may be away now."""
        address = read_address(self._url)
        self._client = address.async_client(timeout_s=self._timeout_s, max_connections=MAX_CONNECTIONS)
        self._scripts = {name: self._client.register_script(text) for name, text in scripts.load_all().items()}

    async def stop(self) -> None:
        """Closes the connections."""
        if self._client is not None:
            await close(self._client)

    @property
    def client(self) -> Any:
        """The client itself, for commands; run them through `ask`. (Typed Any: redis-py's own types join sync and async.)"""
        if self._client is None:
            raise RuntimeError("The connection has not been started.")
        return self._client

    def open_blocking_client(self) -> Any:
        """A client of its own for one reader that blocks in Redis; bounded by `ask` too; the caller ends it with close()."""
        return read_address(self._url).async_client(timeout_s=self._timeout_s, max_connections=1)

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

    async def config(self, names: Sequence[str]) -> dict[str, str] | None:
        """CONFIG GET, asked now and then; None: it is forbidden. Raises StoreUnavailable."""
        if time.monotonic() >= self._config_until_s:
            self._config = {}
            for name in names:
                # One at a time: Redis 6.2 takes no more.
                try:
                    self._config |= await self.ask(self.client.config_get(name))
                except StoreUnavailable as error:
                    if not isinstance(error.__cause__, redis.ResponseError):
                        raise
                    self._config = None
                    break
                except redis.ResponseError:
                    # Managed services do without the command: it is unknown there.
                    self._config = None
                    break
            self._config_until_s = time.monotonic() + CONFIG_S
        return self._config

    async def run(self, script: str, parameters: Mapping[str, object], payload: bytes = b"") -> Any:
        """Runs one of scripts.NAMES; raises as `ask` does."""
        return await self.ask(self._call(script, parameters, payload))

    async def run_many(self, script: str, calls: Sequence[tuple[Mapping[str, object], bytes]]) -> list[Any]:
        """Runs a script with each of the parameters and payloads, in one round trip; a failure stands in its answer's place.

        Raises:
            StoreUnavailable: as `ask` does, for all of them; some may have run.
        """
        pipeline = self.client.pipeline(transaction=False)
        for parameters, payload in calls:
            await self._call(script, parameters, payload, pipeline)
        return list(await self.ask(pipeline.execute(raise_on_error=False)))

    def _call(
        self, script: str, parameters: Mapping[str, object], payload: bytes, client: Any = None
    ) -> Awaitable[Any]:
        text = json.dumps({**parameters, **self._terms}, ensure_ascii=False, separators=(",", ":"))
        return self._scripts[script](keys=[TAG], args=[text, payload], client=client)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Around commands: what redis-py raises comes out as an error of ours."""
    try:
        yield
    except (TimeoutError, redis.TimeoutError) as error:
        raise StoreUnavailable(why=f"no answer from {place(url)} in time") from error
    except (MasterNotFoundError, AsyncMasterNotFoundError) as error:
        # Its own message goes on with every sentinel's options.
        raise StoreUnavailable(why=f"there is no master now of {place(url)}") from error
    except redis.OutOfMemoryError as error:
        raise memory_full() from error
    except redis.AuthenticationError as error:
        # Redis' own words for a password that is missing speak of HELLO.
        raise StoreUnavailable(
            why=f"{place(url)} refuses the password, or the lack of one: it comes from REDIS_URL, REDIS_PASSWORD, or the file "
            "redis_password among the secrets"
        ) from error
    except (redis.ConnectionError, redis.ReadOnlyError, OSError) as error:
        # Errors of connecting spell out the address; a password is never part of it.
        raise StoreUnavailable(why=f"{place(url)}: {error}") from error
    except redis.ResponseError as error:
        message = str(error)
        if "OOM command not allowed" in message:
            raise memory_full() from error
        if isinstance(error, NoPermissionError) or _FORBIDDEN.search(message):
            raise StoreUnavailable(why=f"{place(url)} forbids it: {message}. docs/queue.md has the ACL line") from error
        if _UNAVAILABLE.search(message):
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
    return read_address(url).place
