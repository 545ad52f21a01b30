"""Sends one webhook: signed, to an address that has been checked, bounded in time."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any

import httpcore
import httpx
from standardwebhooks import Webhook

from queue_server.addresses import Address, AddressRefused, Guard, Target

CONNECT_S = 5.0
# Addresses of one host that are tried, in the order in which the resolver gave them.
MAX_ADDRESSES = 3
# Secrets as Standard Webhooks wants them, in bytes.
SECRET_BYTES = range(24, 65)
# What a receiver that is full, or a proxy whose receiver is not there, answers to all.
AWAY = (429, 502, 503, 504)
# An answer says nothing beyond its status; a short one is read all the same, so that the connection can be used again.
ANSWER_BYTES = 16 << 10
ANSWER_S = 1.0
# Look-ups block a thread each. They have their own: a name server that hangs must not hold up what else is done on threads.
LOOKUP_THREADS = 8

Resolve = Callable[[str], Awaitable[list[Address]]]
"""The addresses of a host; raises OSError."""


class SendFailed(Exception):
    """The receiver did not take it; the text says why, in words for the sender of the job.

    `final`: it never will (410 Gone). `away`: it would not have taken any other either. `retry_after_s`: it asked not to be tried
    sooner. `detail`: for the operator's log alone.
    """

    def __init__(
        self, why: str, *, final: bool = False, away: bool = False, retry_after_s: float = 0.0, detail: str = ""
    ) -> None:
        super().__init__(why)
        self.final = final
        self.away = away
        self.retry_after_s = retry_after_s
        self.detail = detail


def read_secrets(text: str) -> list[Webhook]:
    """The signers of `whsec_…,whsec_…`; raises ValueError, without the secret in its text."""
    signers = []
    for number, secret in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
        try:
            prefix, _, coded = secret.partition("_")
            content = base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)
        except ValueError:
            prefix, content = "", b""
        if prefix != "whsec" or len(content) not in SECRET_BYTES:
            raise ValueError(f"secret number {number} is not `whsec_` and the base64 of 24 to 64 bytes")
        signers.append(Webhook(content))
    return signers


class Sender:
    """POSTs webhooks; start() opens what stop() closes."""

    def __init__(
        self,
        guard: Guard,
        secrets: str,
        timeout_s: float,
        *,
        resolve: Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._guard = guard
        self._signers = read_secrets(secrets)
        self._timeout_s = timeout_s
        self._resolve = resolve or self._look_up
        self._ssl_context = ssl_context
        self._lookups: ThreadPoolExecutor | None = None
        self._pools: Mapping[bool, httpcore.AsyncConnectionPool] = {}

    async def start(self) -> None:
        """Loads the certificates that receivers are verified by: Mozilla's, or those that SSL_CERT_FILE names."""
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="webhook look-up")
        context = self._ssl_context or await asyncio.to_thread(httpx.create_ssl_context)
        # httpcore by itself: it follows no redirects and knows no proxies, and its connections can be made through the guard.
        self._pools = {
            secure: httpcore.AsyncConnectionPool(
                ssl_context=context,
                max_connections=None,  # webhooks.py bounds what is sent at once
                max_keepalive_connections=16,
                keepalive_expiry=5.0,
                network_backend=_CheckedNetwork(self._guard, self._resolve, secure),
            )
            for secure in (True, False)
        }

    async def stop(self) -> None:
        """Closes the connections."""
        for pool in self._pools.values():
            await pool.aclose()
        if self._lookups is not None:
            self._lookups.shutdown(wait=False, cancel_futures=True)

    async def send(self, url: str, message_id: str, body: str) -> None:
        """Returns once the receiver has answered 2xx; raises SendFailed."""
        try:
            target = self._guard.read_url(url)
            await self._post(target, self._headers(target, message_id, body), body.encode())
        except AddressRefused as error:
            raise SendFailed(str(error)) from None
        except (TimeoutError, httpcore.TimeoutException):
            raise SendFailed(f"no answer within {self._timeout_s:g} s", away=True) from None
        except (httpcore.ConnectError, OSError) as error:
            if "certificate" in str(error).lower():
                raise SendFailed("its certificate cannot be verified", away=True, detail=str(error)) from None
            # What exactly went wrong would tell the sender about the network behind this server.
            raise SendFailed("no connection could be made", away=True, detail=str(error)) from None
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise SendFailed("the connection broke off", away=True, detail=str(error)) from None

    async def _post(self, target: Target, headers: list[tuple[str, str]], content: bytes) -> None:
        url = httpcore.URL(
            scheme=b"https" if target.secure else b"http",
            host=target.host.encode(),
            port=target.port,
            target=target.path.encode(),
        )
        timeouts = {"connect": CONNECT_S, "read": self._timeout_s, "write": self._timeout_s, "pool": self._timeout_s}
        pool = self._pools[target.secure]
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(self._timeout_s):
                answer = await stack.enter_async_context(
                    pool.stream("POST", url, headers=headers, content=content, extensions={"timeout": timeouts})
                )
            # What counts has been said.
            with suppress(TimeoutError, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
                await _read_a_little(answer)
            if 200 <= answer.status < 300:
                return
            fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in answer.headers}
            raise SendFailed(
                f"the receiver answered {answer.status}",
                final=answer.status == 410,
                away=answer.status in AWAY,
                retry_after_s=_read_retry_after(fields.get("retry-after", "")) if answer.status in (429, 503) else 0.0,
            )

    def _headers(self, target: Target, message_id: str, body: str) -> list[tuple[str, str]]:
        now = datetime.now(UTC)
        default = 443 if target.secure else 80
        host = f"[{target.host}]" if ":" in target.host else target.host
        return [
            ("host", host if target.port == default else f"{host}:{target.port}"),
            ("content-type", "application/json"),
            ("user-agent", "ai4thai-queue"),
            ("webhook-id", message_id),
            ("webhook-timestamp", str(int(now.timestamp()))),
            ("webhook-signature", " ".join(signer.sign(message_id, now, body) for signer in self._signers)),
        ]

    async def _look_up(self, host: str) -> list[Address]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._lookups, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(ip_address(place[0]) for *_, place in found))


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Makes every connection: looks the host up once, checks all its addresses, connects to one of those and to nothing else.

    TLS comes on top and still verifies the host's name.
    """

    def __init__(self, guard: Guard, resolve: Resolve, secure: bool) -> None:
        self._guard = guard
        self._resolve = resolve
        self._secure = secure
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises AddressRefused, OSError, httpcore.ConnectError, httpcore.ConnectTimeout."""
        addresses = await self._resolve(host)
        self._guard.check(Target(self._secure, host, port, ""), addresses)
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses[:MAX_ADDRESSES]:
            try:
                # One that swallows packets leaves time for the next.
                share_s = None if timeout is None else timeout / min(len(addresses), MAX_ADDRESSES)
                return await self._network.connect_tcp(str(address), port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """No webhook goes there."""
        raise AddressRefused("it is a Unix socket")

    async def sleep(self, seconds: float) -> None:
        """Between tries to connect, of which there are none."""
        await asyncio.sleep(seconds)


async def _read_a_little(answer: httpcore.Response) -> None:
    size_bytes = 0
    async with asyncio.timeout(ANSWER_S):
        async for chunk in answer.aiter_stream():
            size_bytes += len(chunk)
            if size_bytes > ANSWER_BYTES:
                return


def _read_retry_after(value: str) -> float:
    """Seconds, from a number of them or from a date; 0 when there is neither."""
    if value.strip().isascii() and value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
