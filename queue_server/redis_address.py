"""Where Redis is: reads REDIS_URL, makes the clients that it describes.

    redis://[user:password@]host[:port][/db]            plain
    rediss://…?ssl_ca_certs=/path&ssl_certfile=…        over TLS
    unix:///path/to/socket[?db=0]                       on this machine
    redis+sentinel://[user:password@]host[:port],host[:port],…/service[/db][?sentinel_username=…&sentinel_password=…&ssl=true]
                                                        whichever server the sentinels call the master of `service`

Options after `?` are named as redis-py names them. With Sentinel the master is asked for anew at each connect, and a server that
has been demoted is left as soon as it refuses to write.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import redis
from redis import asyncio as async_redis
from redis.asyncio import connection as async_connection
from redis.asyncio import sentinel as async_sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection, SentinelManagedSSLConnection

PORT = 6379
SENTINEL_PORT = 26379
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
# A sentinel answers at once or is passed over for the next; three that are away take less than the server's two seconds.
SENTINEL_TIMEOUT_S = 0.5
# A command is tried again once, over a fresh connection: Redis may have been restarted, or demoted (READONLY), between two
# commands. Every script may be run twice. A command that timed out is not repeated: the caller has waited long enough.
RETRIED = (redis.ConnectionError, redis.ReadOnlyError)
# A machine that vanished sends no goodbye. These find out within about 10 s, idle or in the middle of a command; a Redis that
# merely stalls is not cut off by them, because its machine still acknowledges.
_TCP_OPTIONS = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}

_TLS_OPTIONS = (
    "ca_certs",
    "ca_path",
    "ca_data",
    "certfile",
    "keyfile",
    "password",
    "cert_reqs",
    "check_hostname",
    "ciphers",
)
_TLS_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_UNREADABLE = (
    "no host and port can be read from it; in a password write %40 for @, %3A for :, %2F for /, %3F for ? and %23 for #"
)
_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class RedisAddress:
    """An address that has been read. `place` is what may be shown; the rest holds passwords and is never shown."""

    place: str
    tls: bool
    options: Mapping[str, Any] = field(repr=False)
    """What redis-py's connections take: host and port, or path; db, username, password, ssl_…."""
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def async_client(self, *, timeout_s: float, max_connections: int) -> Any:
        """A client for the event loop. Connecting is bounded by `timeout_s`, answers are not: the caller bounds them.

        redis-py would bound answers with asyncio.wait_for, which before Python 3.12 loses a cancellation that comes together with
        the answer: a task could not be stopped. (Typed Any: redis-py's own types join sync and async.)
        """
        options: dict[str, Any] = {
            **self.options,
            **self._tcp_options(),
            "max_connections": max_connections,
            "timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "socket_timeout": None,
            "retry": AsyncRetry(NoBackoff(), 1, supported_errors=RETRIED),
        }
        if not self.sentinels:
            kind = async_connection.UnixDomainSocketConnection if "path" in options else async_connection.Connection
            if self.tls:
                kind = async_connection.SSLConnection
            return async_redis.Redis(connection_pool=_AsyncPool(connection_class=kind, **options))
        sentinel = async_sentinel.Sentinel(  # type: ignore[no-untyped-call]
            self.sentinels, sentinel_kwargs={**self._sentinel_options(), "retry": AsyncRetry(NoBackoff(), 0)}
        )
        pool = _AsyncSentinelPool(self.service, sentinel, ssl=self.tls, **options)  # type: ignore[no-untyped-call]
        return async_redis.Redis(connection_pool=pool)

    def client(self, *, timeout_s: float, connect_timeout_s: float, health_check_s: int) -> redis.Redis:
        """A client for threads. Answers take at most `timeout_s`; an idle connection is tried after `health_check_s`."""
        options: dict[str, Any] = {
            **self.options,
            **self._tcp_options(),
            "socket_timeout": timeout_s,
            "socket_connect_timeout": connect_timeout_s,
            "health_check_interval": health_check_s,
            "retry": Retry(NoBackoff(), 1, supported_errors=RETRIED),
        }
        if not self.sentinels:
            kind: Any = redis.UnixDomainSocketConnection if "path" in options else redis.Connection
            if self.tls:
                kind = redis.SSLConnection
            return redis.Redis(connection_pool=_Pool(connection_class=kind, **options))
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            self.sentinels, sentinel_kwargs={**self._sentinel_options(), "retry": Retry(NoBackoff(), 0)}
        )
        kind = _SentinelTlsConnection if self.tls else _SentinelConnection
        pool = _SentinelPool(self.service, sentinel, connection_class=kind, **options)  # type: ignore[no-untyped-call]
        return redis.Redis(connection_pool=pool)

    def _tcp_options(self) -> dict[str, Any]:
        if "path" in self.options:
            return {}
        # Each system has its own set of them.
        known = {getattr(socket, name): value for name, value in _TCP_OPTIONS.items() if hasattr(socket, name)}
        return {"socket_keepalive": True, "socket_keepalive_options": known}

    def _sentinel_options(self) -> dict[str, Any]:
        timeouts = {"socket_timeout": SENTINEL_TIMEOUT_S, "socket_connect_timeout": SENTINEL_TIMEOUT_S}
        return {**self.sentinel_options, **timeouts, "ssl": self.tls}


# When one connection breaks or gets no answer, the others that lead to the same server are no better: whoever takes one of them
# next would wait for his answer in vain as well. So all idle ones are given up, and the next command connects anew.


class _Pool(redis.ConnectionPool):
    def release(self, connection: Any) -> None:
        super().release(connection)
        if not connection.is_connected:
            self.disconnect(inuse_connections=False)


class _SentinelPool(SentinelConnectionPool, _Pool):
    pass


class _AsyncPool(async_redis.BlockingConnectionPool):
    async def release(self, connection: Any) -> None:
        await super().release(connection)
        if not connection.is_connected:
            for idle in list(self._available_connections):
                # Without waiting for the close, so that nobody can take it up meanwhile.
                await idle.disconnect(nowait=True)


class _AsyncSentinelPool(async_sentinel.SentinelConnectionPool, _AsyncPool):
    pass


class _SentinelConnection(SentinelManagedConnection):
    def read_response(self, *arguments: Any, **options: Any) -> Any:
        # redis-py leaves this connection open after a timeout, and its late answer would be taken for the next command's.
        options.setdefault("disconnect_on_error", True)
        return super().read_response(*arguments, **options)


class _SentinelTlsConnection(_SentinelConnection, SentinelManagedSSLConnection):
    pass


async def close(client: Any) -> None:
    """Closes a client of async_client() and its connections, those to the sentinels too."""
    await client.aclose()
    await client.connection_pool.disconnect()
    if (sentinel := getattr(client.connection_pool, "sentinel_manager", None)) is not None:
        await sentinel.aclose()


def with_password(url: str, password: str) -> str:
    """The URL with the password that it lacks; one that it has stays. Sentinels have one of their own (sentinel_password)."""
    if not password or "password" in read_address(url).options:
        return url
    scheme, _, rest = url.partition("://")
    end = min((rest.find(mark) for mark in "/?" if mark in rest), default=len(rest))
    user, _, hosts = rest[:end].rpartition("@")
    return f"{scheme}://{user.rstrip(':')}:{quote(password, safe='')}@{hosts}{rest[end:]}"


def read_address(url: str) -> RedisAddress:
    """The address that a URL describes.

    Raises:
        ValueError: it describes none; the message says why, and never shows a password.
    """
    scheme = url.partition("://")[0].lower()
    if "://" not in url or scheme not in SCHEMES:
        raise ValueError(f"it begins with none of {', '.join(f'{name}://' for name in SCHEMES)}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(_UNREADABLE) from None
    options_given = parse_qsl(parts.query, keep_blank_values=True)
    # A password with an unquoted /, ? or # ends up here in pieces, which must not be shown.
    if parts.fragment or "@" in parts.path or any("@" in name for name, _ in options_given):
        raise ValueError(_UNREADABLE)
    tls = scheme.startswith("rediss")
    options: dict[str, Any] = {}
    sentinel_options: dict[str, Any] = {}
    for name, value in options_given:
        if name in ("sentinel_username", "sentinel_password") and scheme.endswith("+sentinel"):
            sentinel_options[name.removeprefix("sentinel_")] = value
        elif name == "ssl" and scheme.endswith("+sentinel"):
            tls = _yes_or_no(name, value)
        else:
            options[name] = _read_option(name, value)
    tls_options = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if tls_options and not tls:
        raise ValueError(f"{min(tls_options)} is for TLS: begin with rediss:// (or set ssl=true with Sentinel)")
    userinfo, _, hosts = parts.netloc.rpartition("@")
    username, _, password = userinfo.partition(":")
    # What stands alone before the @ is a user to redis-py; `:password@` is a password alone.
    options |= {name: unquote(text) for name, text in (("username", username), ("password", password)) if text}
    if scheme == "unix":
        if not parts.path.strip("/") or hosts:
            raise ValueError("it names no socket: unix:///path/to/redis.sock")
        path = unquote(parts.path)
        return RedisAddress(path, False, {**options, "path": path})
    if scheme.endswith("+sentinel"):
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise ValueError("it names no service: redis+sentinel://host:26379,host:26379/mymaster")
        sentinels = tuple(_read_host(one, SENTINEL_PORT) for one in hosts.split(","))
        place = f"{unquote(service)}, which the sentinels at {', '.join(_show(*one) for one in sentinels)} know"
        sentinel_options |= tls_options
        return RedisAddress(place, tls, {**options, **_read_db(db)}, sentinels, unquote(service), sentinel_options)
    host, port = _read_host(hosts or "localhost", PORT)
    return RedisAddress(
        _show(host, port), tls, {**options, **_read_db(parts.path.strip("/")), "host": host, "port": port}
    )


def _show(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _read_option(name: str, value: str) -> Any:
    if name in ("username", "password", "client_name"):
        return value
    if name == "db":
        return _read_db(value or "?")["db"]
    if name.removeprefix("ssl_") not in _TLS_OPTIONS or not name.startswith("ssl_"):
        known = ("db", "username", "password", "client_name", *(f"ssl_{option}" for option in _TLS_OPTIONS))
        raise ValueError(f"{name!r} is no option; there are {', '.join(known)}, and sentinel_… with Sentinel")
    if name == "ssl_check_hostname":
        return _yes_or_no(name, value)
    if name == "ssl_cert_reqs" and value not in ("required", "optional", "none"):
        raise ValueError(f"ssl_cert_reqs is {value!r}; it may be required, optional or none")
    if name in _TLS_FILES and not Path(value).exists():
        raise ValueError(f"{name} is {value!r}, and there is no such file")
    return value


def _yes_or_no(name: str, value: str) -> bool:
    if value.lower() not in _YES_NO:
        raise ValueError(f"{name} is {value!r}; it may be true or false")
    return _YES_NO[value.lower()]


def _read_db(text: str) -> dict[str, int]:
    if text and not text.isdecimal():
        raise ValueError(f"the database is {text!r}; it is a number, such as /0")
    return {"db": int(text)} if text else {}


def _read_host(text: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise ValueError(_UNREADABLE)
    return host, default_port if port is None else port
