"""The application: routes, error handlers, start and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import socket
from collections.abc import AsyncIterator
from importlib import metadata, resources

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from omni_jax.errors import OmniError
from omni_jax.serve import mini_omni, openai, openai_audio, openai_responses, realtime
from omni_jax.serve.binding import AdmittingSocket
from omni_jax.serve.chat_history import TextCache
from omni_jax.serve.client_secrets import ClientSecrets
from omni_jax.serve.connections import ServerConfig
from omni_jax.serve.errors import RETRY_SECONDS, describe_validation_error, error_body, kind_of
from omni_jax.serve.limits import LimitsMiddleware
from omni_jax.serve.sessions import READY_INTERVAL, Service
from omni_jax.serve.streaming import service_of

log = logging.getLogger(__name__)

PAGE = {
    "index.html": "text/html",
    "page.js": "text/javascript",
    "realtime.js": "text/javascript",
    "audio.js": "text/javascript",
    "worklets.js": "text/javascript",
    "page.css": "text/css",
}
"""Files of the page and their types."""

PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return _page_file("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """A file of the page."""
    if name not in PAGE:
        raise HTTPException(404)
    return _page_file(name)


def _page_file(name: str) -> Response:
    content = (resources.files("omni_jax") / "serve" / "page" / name).read_bytes()
    return Response(content, media_type=PAGE[name], headers=PAGE_HEADERS)


@router.get("/healthz")
async def healthz(request: Request, response: Response) -> dict[str, str]:
    """Whether the process runs and its model works; 503 if only a restart will help."""
    broken = service_of(request).state == "broken"
    response.status_code = 503 if broken else 200
    return {"status": "broken" if broken else "ok"}


@router.get("/readyz")
async def readyz(request: Request, response: Response) -> dict[str, str]:
    """Whether requests are answered; 503 until then."""
    state = service_of(request).state
    response.status_code = 200 if state == "ready" else 503
    return {"status": state}


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """The schema of the HTTP endpoints. It takes a second to make, so it is made once, in a thread."""
    state = request.app.state
    if state.schema is None:
        state.schema = asyncio.create_task(asyncio.to_thread(lambda: json.dumps(request.app.openapi()).encode()))
    return Response(await asyncio.shield(state.schema), media_type="application/json")


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    content = generate_latest(service_of(request).metrics.registry)
    return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})


def make_app(service: Service) -> ASGIApp:
    """The application around a service, which it closes when it is shut down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        freezing = asyncio.create_task(_freeze_when_warmed_up(service))
        try:
            yield
        finally:
            freezing.cancel()
            service.close()

    app = FastAPI(
        title="omni_jax",
        version=metadata.version("omni-jax"),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.schema = None
    app.state.client_secrets = ClientSecrets()
    app.state.texts = TextCache()
    for routes in (
        router,
        openai.router,
        openai_audio.router,
        openai_responses.router,
        mini_omni.router,
        realtime.router,
    ):
        app.include_router(routes)
    _add_error_handlers(app)
    # Clients choose paths; the metrics must not grow with them.
    paths = {getattr(route, "path", "") for route in app.routes}

    def count(path: str, outcome: str) -> None:
        service.metrics.count(path if path in paths else "other", outcome)

    limited = LimitsMiddleware(app, service, count)
    # Outside of the limits: a browser asks without a key whether it may ask, and reads errors too.
    return CORSMiddleware(
        _head_as_get(limited),
        allow_origins=service.settings.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-omni-jax-ignored-messages", "x-omni-jax-ignored-text", "retry-after"],
    )


def _head_as_get(app: ASGIApp) -> ASGIApp:
    """Answer HEAD as GET; the HTTP server leaves out the body (RFC 9110, section 9.3.2)."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await app(scope, receive, send)

    return answer


async def _freeze_when_warmed_up(service: Service) -> None:
    """Exempt from garbage collection what exists once every program is compiled.

    A full collection visits the half a million objects of a model and a compiler, so Python delays it, until hundreds
    of interrupted requests have left their audio behind.
    """
    while service.state != "broken" and not service.engine.warmed_up.is_set():
        await asyncio.sleep(READY_INTERVAL)
    gc.collect()
    gc.freeze()


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error as JSON; a request that got no answer stream is counted here."""

    @app.exception_handler(OmniError)
    async def omni_error(request: Request, error: OmniError) -> Response:
        status, code, _ = kind_of(error)
        service_of(request).metrics.count_error(_endpoint(request), error)
        headers = {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else {}
        body = error_body(str(error), status=status, field=getattr(error, "field", None), code=code)
        return JSONResponse(body, status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        service_of(request).metrics.count(_endpoint(request), "refused")
        field, message = describe_validation_error(error.errors())
        return JSONResponse(error_body(message, status=400, field=field), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        service_of(request).metrics.count(_endpoint(request), "refused")
        message = f"{request.method} {request.url.path}: {error.detail!s}"
        return JSONResponse(error_body(message, status=error.status_code), error.status_code, headers=error.headers)


def _endpoint(request: Request) -> str:
    """The path of the request's route, as metrics name it."""
    return getattr(request.scope.get("route"), "path", "") or "other"


class Server(uvicorn.Server):
    """Told to stop, it first finishes active requests, for at most `Settings.request_timeout`."""

    config: ServerConfig

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Count connections; say where it listens."""
        for found in sockets or []:
            assert isinstance(found, AdmittingSocket)
            found.admit = self.config.admit
        await super().startup(sockets)
        for found in sockets or []:
            host, port, *_ = found.getsockname()
            log.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish; before the model is ready there is nothing to be finished."""
        if not self.config.service.ready:
            self.config.timeout_graceful_shutdown = 1
        await super().shutdown(sockets)


def make_server(service: Service) -> Server:
    """A server to be run on sockets that have been bound."""
    settings = service.settings
    return Server(
        ServerConfig(
            make_app(service),
            service,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            ws_max_size=settings.max_body_bytes,
            # A client that has vanished without a word answers no ping.
            ws_ping_interval=min(20.0, settings.idle_timeout),
            ws_ping_timeout=settings.idle_timeout,
            # Audio does not compress.
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=math.ceil(settings.request_timeout),
            server_header=False,
        )
    )
