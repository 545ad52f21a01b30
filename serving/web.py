"""The HTTP face: /health, /metrics and the routes that a service hands over."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import telemetry
from serving.errors import Code, ServiceError
from serving.health import LIVENESS, Health
from serving.http_calls import OwnCalls
from serving.logs import get_logger
from serving.transcoding import failure

_log = get_logger("http")


def build_app(
    health: Health,
    ready_name: str,
    domain: str,
    routes: Sequence[BaseRoute],
    cors_origins: Sequence[str],
    own_calls: OwnCalls,
) -> ASGIApp:
    """An ASGI application; `ready_name` is the health name that GET /health answers for.

    Routes that call the server's own methods find `own_calls` in `request.app.state.own_calls`.
    """

    async def ready(_request: Request) -> Response:
        why = health.why_not(ready_name)
        return JSONResponse(
            {"status": "NOT_SERVING" if why else "SERVING", **({"why": why} if why else {})}, 503 if why else 200
        )

    async def live(_request: Request) -> Response:
        why = health.why_not(LIVENESS)
        return JSONResponse(
            {"status": "NOT_SERVING" if why else "SERVING", **({"why": why} if why else {})}, 503 if why else 200
        )

    async def detailed(_request: Request) -> Response:
        why = health.why_not(ready_name)
        body = {
            "status": "NOT_SERVING" if why else "SERVING",
            "why": why,
            "draining": health.draining,
            "services": {name: "SERVING" if health.serving(name) else "NOT_SERVING" for name in health.services},
            "checks": {
                check.name: {
                    "status": check.status,
                    "detail": check.detail,
                    "latency_ms": round(check.latency_ms, 2),
                    "for_seconds": round(max(0.0, time.time() - check.since_unix_s), 1),
                }
                for check in health.checks
            },
        }
        return JSONResponse(body, 503 if why else 200)

    async def metrics(_request: Request) -> Response:
        return Response(telemetry.exposition(), media_type=telemetry.CONTENT_TYPE)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            code, text = Code.UNIMPLEMENTED, f"{request.method} is not served on {request.url.path}."
        else:
            code, text = Code.NOT_FOUND, f"Nothing is served on {request.url.path}."
        response = failure(
            ServiceError(
                code, "INVALID_FIELD", text, cure="GET /health tells how the server is; the README lists the paths."
            ),
            domain,
        )
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        return response

    async def on_fault(request: Request, error: Exception) -> Response:
        if not isinstance(error, ServiceError):
            _log.error("a fault of our own", path=request.url.path, exc_info=error)
        return failure(error, domain)

    middleware = [Middleware(_Counted)]
    if cors_origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
        )
    app = Starlette(
        routes=[
            Route("/health", ready),
            Route("/health/live", live),
            Route("/health/detailed", detailed),
            Route("/metrics", metrics),
            *routes,
        ],
        middleware=middleware,
        exception_handlers={HTTPException: on_http_error, ServiceError: on_fault, Exception: on_fault},
    )
    app.state.own_calls = own_calls
    return app


class _Counted:
    """Counts each answered request; the gRPC side of a transcoded one is logged there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                telemetry.HTTP_REQUESTS.labels(scope["method"], str(message["status"])).inc()
                _log.debug("request answered", method=scope["method"], path=scope["path"], status=message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
