"""Opens the channel to a server: its transport, its limits, its retries.

Retries are gRPC's own (a service config), not ours: the library keeps the budget, the backoff and the deadline right.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import grpc.aio

__all__ = [
    "MAX_MESSAGE_BYTES",
    "RETRY_CONFIG",
    "SERVICE_CONFIG",
    "channel_target",
    "open_async_channel",
    "open_channel",
]

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""The largest message either way. gRPC's own 4 MiB is less than one photograph in raw RGB."""

# Attempt by attempt: after 0.2 s, 0.4 s, 0.8 s and 1.6 s (each times a random 0.8 to 1.2), five attempts at most, never
# past the deadline. A server that sends `grpc-retry-pushback-ms` in its trailers is obeyed: so long, or not at all.
RETRY_CONFIG: Final[dict[str, Any]] = {
    "maxAttempts": 5,  # the first one included; gRPC allows no more
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    # UNAVAILABLE: starting, draining or away. RESOURCE_EXHAUSTED: full at this moment.
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}
"""gRPC's retryPolicy for the calls that are safe to repeat."""

# Named one by one, because a repeated call must be harmless: each reads, or has an id that makes the second call the
# same as the first (SubmitJob's request_id, a job's id). Streams that the client writes are out: what was sent is gone.
# Nothing is hedged: two images on a GPU to get one answer is the opposite of a cure for a full server.
_SAFE_TO_REPEAT: Final = {
    "ai4thai.vision.v1.VisionService": ("Detect", "Generate", "Analyze", "GetServerInfo"),
    "ai4thai.vision.v1.ModelService": ("ListModels", "GetModel"),
    "ai4thai.vision.v1.DeviceService": ("ListDevices",),
    "ai4thai.queue.v1.QueueService": (
        *(
            "SubmitJob",
            "BatchSubmitJobs",
            "GetJob",
            "ListJobs",
            "WatchJob",
            "CancelJob",
            "GetQueueStats",
            "ListWorkers",
        ),
        *("PauseQueue", "ResumeQueue"),
    ),
}

SERVICE_CONFIG: Final[dict[str, Any]] = {
    # Every address that the name has, in turn: more servers behind one name share the calls.
    "loadBalancingConfig": [{"round_robin": {}}],
    # An address whose process says NOT_SERVING for "" is left out; one without grpc.health.v1 counts as healthy.
    "healthCheckConfig": {"serviceName": ""},
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method}
                for service, methods in _SAFE_TO_REPEAT.items()
                for method in methods
            ],
            "retryPolicy": RETRY_CONFIG,
        }
    ],
    # A client whose calls mostly fail stops retrying, so that an outage isn't multiplied by five.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
}
"""The whole service config of our channels, in gRPC's JSON form."""

_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    # What may be repeated is kept until the answer begins: gRPC's own 256 KiB would leave most images' calls without retries.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    ("grpc.service_config_disable_resolution", 1),  # ours holds, whatever a DNS TXT record says
    # A peer that vanished silently is noticed within 80 s; no pings without a call, which servers don't forgive.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A server that comes back is found within seconds, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    # One attempt to connect may take so long (this is not a pause): TLS at 80 ms round trip, or on a busy machine.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def open_channel(
    address: str, *, credentials: grpc.ChannelCredentials | None = None, retries: bool = True
) -> grpc.Channel:
    """Opens a channel; the connection itself is made by the first call.

    Args:
        address: `host:port`, `grpc://host:port`, `grpcs://host:port` (TLS), a target (`unix:…`).
        credentials: TLS with these (an own authority, a client certificate). Absent: plaintext, or TLS with the
            system's authorities when the address begins with `grpcs://`.
        retries: whether failed calls are repeated as RETRY_CONFIG says; False for callers with retries of their own.

    Raises:
        ValueError: the address names no port or another scheme.
    """
    target, is_tls = channel_target(address)
    options = (*_OPTIONS, ("grpc.enable_retries", int(retries)))
    if credentials is None and is_tls:
        credentials = grpc.ssl_channel_credentials()
    if credentials is not None:
        return grpc.secure_channel(target, credentials, options=options)
    return grpc.insecure_channel(target, options=options)


def open_async_channel(
    address: str, *, credentials: grpc.ChannelCredentials | None = None, retries: bool = True
) -> grpc.aio.Channel:
    """Opens a channel for asyncio, like `open_channel`; to be called while the loop runs that will use it."""
    target, is_tls = channel_target(address)
    options = (*_OPTIONS, ("grpc.enable_retries", int(retries)))
    if credentials is None and is_tls:
        credentials = grpc.ssl_channel_credentials()
    if credentials is not None:
        return grpc.aio.secure_channel(target, credentials, options=options)
    return grpc.aio.insecure_channel(target, options=options)


def channel_target(address: str) -> tuple[str, bool]:
    """Gives gRPC's target for an address, and whether it asks for TLS.

    Host names become `dns:///name:port`, so that every address behind the name is used; numbers are taken as they are.

    Raises:
        ValueError: the address names no port or another scheme.
    """
    if address.startswith(("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:")):
        return address, False
    parts = urlsplit(address if "://" in address else f"grpc://{address}")
    if parts.scheme not in ("grpc", "grpcs"):
        raise ValueError(
            f"The address {address!r} begins with {parts.scheme}://. Write host:port, or grpcs://host:port for TLS."
        )
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(
            f"The address {address!r} has no valid port. Write host:port, such as localhost:2001."
        ) from error
    if not host or not port:
        raise ValueError(f"The address {address!r} names no port. Write host:port, such as localhost:2001.")
    return _target(host, port), parts.scheme == "grpcs"


def _target(host: str, port: int) -> str:
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return f"dns:///{host}:{port}"
    return f"ipv6:[{number}]:{port}" if number.version == 6 else f"ipv4:{number}:{port}"
