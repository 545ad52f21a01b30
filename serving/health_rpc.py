"""grpc.health.v1 over the named checks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.errors import Code, ServiceError
from serving.health import Health


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Check, Watch and List."""

    def __init__(self, health: Health) -> None:
        self._health = health

    async def Check(self, request: Any, context: Any) -> Any:
        """Tells whether a service is ready. Errors: NOT_FOUND."""
        serving = self._health.serving(request.service)
        if serving is None:
            raise ServiceError(
                Code.NOT_FOUND,
                "INVALID_FIELD",
                f"No service is named {request.service!r}.",
                cure=f"There are: {', '.join(repr(name) for name in self._health.services)}.",
            )
        return _response(serving)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Tells now and after each change; ends when the server takes no more calls, so that it does not hold up its end."""
        # Not when it begins to drain: a watcher comes again at once, and would be sent away each time.
        async for serving in self._health.watch(request.service):
            yield _response(serving)

    async def List(self, request: Any, context: Any) -> Any:
        """Tells of every service."""
        return health_pb2.HealthListResponse(  # type: ignore[attr-defined]  # newer than its stubs
            statuses={name: _response(self._health.serving(name)) for name in self._health.services}
        )


def _response(serving: bool | None) -> Any:
    statuses = health_pb2.HealthCheckResponse
    status = {True: statuses.SERVING, False: statuses.NOT_SERVING, None: statuses.SERVICE_UNKNOWN}[serving]
    return statuses(status=status)
