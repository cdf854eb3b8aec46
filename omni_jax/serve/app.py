"""The application: every endpoint, what becomes of errors, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
from collections.abc import AsyncIterator
from importlib import metadata, resources

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from omni_jax.errors import AudioError, BusyError, ClosedError, ConfigError
from omni_jax.serve import mini_omni, openai, websocket
from omni_jax.serve.limits import Guard, error_body
from omni_jax.serve.sessions import RETRY_SECONDS, Refusal, Service, sentence

PAGE = {"index.html": "text/html", "page.js": "text/javascript", "sound.js": "text/javascript", "page.css": "text/css"}
"""Files of the page and their types."""
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def make_app(service: Service) -> ASGIApp:
    """The application around a service, which it closes when it is shut down."""

    async def settle() -> None:
        """Once everything is compiled, let the search for cycles pass over what stays.

        It is as long as all there is; with half a million objects of a model and a compiler Python would put it off
        until hundreds of requests that broke off have left their recordings behind.
        """
        while not service.ready:
            await asyncio.sleep(0.5)
        gc.collect()
        gc.freeze()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        settling = asyncio.create_task(settle())
        try:
            yield
        finally:
            settling.cancel()
            service.close()

    app = FastAPI(
        title="omni_jax", version=metadata.version("omni-jax"), docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.service = service
    app.include_router(openai.router)
    app.include_router(mini_omni.router)
    app.include_router(websocket.router)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in PAGE:
            raise HTTPException(404)
        return _file(name)

    @app.get("/healthz")
    async def healthz(response: Response) -> dict[str, str]:
        """Whether the process is there and its model works; 503 if only a restart will help."""
        broken = service.state == "broken"
        response.status_code = 503 if broken else 200
        return {"status": "broken" if broken else "ok"}

    @app.get("/readyz")
    async def readyz(response: Response) -> dict[str, str]:
        """Whether everything is compiled; 503 until then."""
        state = service.state
        response.status_code = 200 if state == "ready" else 503
        return {"status": state}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(service.figures.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    def error(
        request: Request, status: int, message: str, field: str | None = None, code: str | None = None, **headers: str
    ) -> JSONResponse:
        # Those that a conversation came of are counted there, under how it ended.
        if status < 499 or code in ("not_ready", "closed"):
            service.count(_route(request), "busy" if status == 429 else "refused")
        body = error_body(message, status=status, field=field, code=code)
        return JSONResponse(body, status, headers=headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, problem: Refusal) -> Response:
        retry = {"retry-after": str(RETRY_SECONDS)} if problem.status == 503 else {}
        return error(request, problem.status, problem.message, problem.field, problem.code, **retry)

    @app.exception_handler(BusyError)
    async def busy(request: Request, problem: BusyError) -> Response:
        return error(request, 429, str(problem), code="busy", **{"retry-after": str(RETRY_SECONDS)})

    @app.exception_handler(ClosedError)
    async def closed(request: Request, problem: ClosedError) -> Response:
        return error(request, 503, str(problem), code="closed")

    @app.exception_handler(AudioError)
    async def bad_sound(request: Request, problem: AudioError) -> Response:
        return error(request, 400, str(problem), code="bad_audio")

    @app.exception_handler(ConfigError)
    async def bad_setting(request: Request, problem: ConfigError) -> Response:
        field, colon, _ = str(problem).partition(":")
        return error(request, 400, str(problem), field if colon else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> Response:
        field, message = sentence(problem.errors())
        return error(request, 400, message, field)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, problem: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {problem.detail!s}"
        return error(request, problem.status_code, message, **(problem.headers or {}))

    # Figures must not grow with whatever paths clients think of.
    paths = {getattr(route, "path", "") for route in app.routes}

    def turned_away(path: str, outcome: str) -> None:
        service.count(path if path in paths else "other", outcome)

    return Guard(app, service.settings, turned_away)


def make_server(service: Service, host: str, port: int) -> uvicorn.Server:
    """A server to be run; told to stop, it first finishes what it answers, for as long as a request may take."""
    limits = service.settings
    return uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            host=host,
            port=port,
            ws="websockets-sansio",
            ws_max_size=limits.max_body_bytes,
            # Sound doesn't get smaller by it.
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=math.ceil(limits.max_seconds),
            server_header=False,
        )
    )


def _route(request: Request) -> str:
    route = request.scope.get("route")
    return str(getattr(route, "path", "")) or "other"


def _file(name: str) -> Response:
    content = (resources.files("omni_jax") / "serve" / "page" / name).read_bytes()
    return Response(content, media_type=PAGE[name], headers={**PAGE_HEADERS, "cache-control": "no-cache"})
