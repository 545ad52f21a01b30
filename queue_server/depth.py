"""GET /queue/depth: how much there is to do in one queue, as plain numbers that a scaler reads.

KEDA's metrics-api scaler asks it with `valueLocation: backlog`; docs/queue.md has the whole ScaledObject.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from queue_server.statistics import Depth

DEFAULT_QUEUE = "default"


def depth_route(depth: Callable[[str], Awaitable[Depth]], read_queue: Callable[[str, str], str]) -> Route:
    """The route. `?queue=` names the queue; one that has had no job yet is empty. Errors are the contract's: 400, 503."""

    async def answer(request: Request) -> Response:
        one = await depth(read_queue(request.query_params.get("queue", ""), "queue") or DEFAULT_QUEUE)
        return JSONResponse(
            {
                "queue": one.queue,
                "depth": one.depth,
                "running": one.running,
                "backlog": one.depth + one.running,
                "oldest_age_seconds": round(one.oldest_age_s, 3),
            }
        )

    return Route("/queue/depth", answer)
