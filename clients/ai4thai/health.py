"""Asks any server of ours whether a service is ready (grpc.health.v1)."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ai4thai.errors import NotFound, NotServedYet, translated
from ai4thai.server_info import Health


def check_health(channel: grpc.Channel, address: str, service: str, timeout_s: float) -> Health:
    """Health of `service` (empty: of the process). An answer of any kind is returned; that nothing answers is raised."""
    try:
        with translated(address):
            answer = _stub(channel).Check(_request(service), timeout=timeout_s)
    except (NotFound, NotServedYet):
        return Health.UNKNOWN_SERVICE
    return _read(answer)


async def check_health_async(channel: grpc.aio.Channel, address: str, service: str, timeout_s: float) -> Health:
    """Like check_health, for asyncio."""
    try:
        with translated(address):
            answer = await _stub(channel).Check(_request(service), timeout=timeout_s)
    except (NotFound, NotServedYet):
        return Health.UNKNOWN_SERVICE
    return _read(answer)


def _stub(channel: Any) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # its published types leave the methods out


def _request(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def _read(answer: health_pb2.HealthCheckResponse) -> Health:
    states = {
        health_pb2.HealthCheckResponse.SERVING: Health.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING: Health.NOT_SERVING,
    }
    return states.get(answer.status, Health.UNKNOWN)
