"""Builds the grpc.aio server: services, interceptors, limits, health, reflection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from serving.health import Health
from serving.health_rpc import HealthServicer
from serving.interceptors import CallInterceptor, caller
from serving.reflection import add_reflection
from serving.settings import ServingSettings

__all__ = ["build_server", "caller", "channel_options"]


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Options that both ends of a gRPC connection want; gRPC's own limit of 4 MiB is too small for images."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]


def _connection_age(seconds: float) -> list[tuple[str, int]]:
    """The option that ends connections in order at an age; gRPC varies it by a tenth: clients do not come back all at once."""
    return [("grpc.max_connection_age_ms", max(1, round(seconds * 1000)))] if seconds else []


class _CallersWhoLeft(logging.Filter):
    """Drops what grpc logs, with a traceback, when a caller has gone before its answer could be sent: that is no fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep the line."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, grpc.aio.InternalError) and "execute_batch" in str(error))


def build_server(
    add_services: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    domain: str,
    checks: Health,
    serving: ServingSettings,
) -> grpc.aio.Server:
    """A server that is not started yet and has no port yet."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_CallersWhoLeft())
    server = grpc.aio.server(
        interceptors=[
            CallInterceptor(domain, access_log=serving.access_log, max_concurrent_calls=serving.max_concurrent_calls)
        ],
        options=[
            *channel_options(serving.max_message_bytes),
            # Clients that ping every 10 s or slower are not sent away (gRPC's default strikes after two pings in 5 min).
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # Streams of one connection; the process's own limit is SERVING_MAX_CONCURRENT_CALLS.
            ("grpc.max_concurrent_streams", serving.max_concurrent_calls),
            *_connection_age(serving.max_connection_age_seconds),
        ],
    )
    add_services(server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(checks), server)
    add_reflection(server, [*service_names, health.SERVICE_NAME])
    return server
