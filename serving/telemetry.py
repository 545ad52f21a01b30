"""The process's Prometheus metrics; those of every call stand here, a server adds its own to REGISTRY."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

REGISTRY = CollectorRegistry(auto_describe=True)
"""Every metric of the process; its memory, CPU time, open files included."""

ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

# 1 ms to 2 min: a health check and a long generation both find their bucket.
CALL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# The names are those of the gRPC ecosystem's Prometheus interceptors, so that ready-made dashboards work.
CALLS_STARTED = Counter("grpc_server_started", "Calls begun.", ["grpc_service", "grpc_method"], registry=REGISTRY)
CALLS_HANDLED = Counter(
    "grpc_server_handled", "Calls ended.", ["grpc_service", "grpc_method", "grpc_code"], registry=REGISTRY
)
CALL_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time from a call's begin to its end.",
    ["grpc_service", "grpc_method"],
    buckets=CALL_BUCKETS_S,
    registry=REGISTRY,
)
CALLS_IN_FLIGHT = Gauge(
    "ai4thai_calls_in_flight", "Calls being answered, health and reflection left out.", registry=REGISTRY
)
CONNECTIONS = Gauge("ai4thai_connections", "Open connections by protocol.", ["protocol"], registry=REGISTRY)
CONNECTIONS_REFUSED = Counter(
    "ai4thai_connections_refused", "Connections closed unanswered, by reason.", ["reason"], registry=REGISTRY
)
HTTP_REQUESTS = Counter("ai4thai_http_requests", "HTTP requests answered.", ["method", "status"], registry=REGISTRY)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def exposition() -> bytes:
    """Every metric in Prometheus' text format."""
    return generate_latest(REGISTRY)
