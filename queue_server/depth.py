"""GET /queue/depth: how much there is to do in one queue or in all of them, as plain numbers that a scaler reads.

KEDA's metrics-api scaler asks it with `valueLocation: workable`; docs/queue.md has the whole ScaledObject.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from queue_server.statistics import EVERY_QUEUE, Depth

DEFAULT_QUEUE = "default"


def depth_route(depth: Callable[[str], Awaitable[Depth]], read_queue: Callable[[str, str], str]) -> Route:
    """The route. `?queue=` names a queue (one without any job yet is empty), `*` all of them. Errors are the contract's."""

    async def answer(request: Request) -> Response:
        name = request.query_params.get("queue", "")
        one = await depth(name if name == EVERY_QUEUE else read_queue(name, "queue") or DEFAULT_QUEUE)
        return JSONResponse(
            {
                "queue": one.queue,
                "depth": one.depth,
                "held": one.held,
                "running": one.running,
                "backlog": one.depth + one.running,
                # Without held jobs, which a worker more would not begin: they get into line as others of their client run.
                "workable": max(0, one.depth - one.held) + one.running,
                "oldest_age_seconds": round(one.oldest_age_s, 3),
            }
        )

    return Route("/queue/depth", answer)
