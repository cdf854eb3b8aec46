"""Middleware before the application: API keys, size of bodies, and how long a client may send or read nothing."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_jax.serve.errors import error_body
from omni_jax.serve.sessions import Settings

PUBLIC_PATHS = ("/", "/healthz", "/readyz")
"""Need no key, like everything below `/page/`: the page asks for the key, probes have none."""

CLOSE_CONNECTION = {"connection": "close"}
"""Otherwise the server would read all that the client still sends before the client sees the answer."""


class SlowClientError(Exception):
    """A client read nothing for longer than `Settings.idle_timeout`."""


def is_known_key(key: str, keys: Sequence[str]) -> bool:
    """Whether a key is one of `keys`, in constant time."""
    # A sum compares all of them, where `any` would stop at the first match.
    return sum(hmac.compare_digest(key.encode(errors="replace"), known.encode()) for known in keys) > 0


class LimitsMiddleware:
    """An ASGI middleware for HTTP; the WebSocket endpoint enforces its limits itself."""

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[str, str], None]):
        """Wrap an application.

        Args:
            app: the application.
            settings: its limits.
            count: called with path and outcome of each request that ends here.
        """
        self.app, self.settings, self.count = app, settings, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            self.count(scope["path"], "refused")
            await refusal(scope, receive, send)
            return
        try:
            await self.app(scope, self._bounded_receive(receive), self._bounded_send(scope["path"], send))
        except SlowClientError:
            # The server closes the connection, as the response is not complete.
            self.count(scope["path"], "slow")

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        """What is wrong with a request by its headers alone."""
        settings = self.settings
        if settings.api_keys and path not in PUBLIC_PATHS and not path.startswith("/page/"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not is_known_key(key.strip(), settings.api_keys):
                message = "expected the header 'Authorization: Bearer KEY' with a valid key"
                body = error_body(message, status=401, code="invalid_api_key")
                return JSONResponse(body, 401, headers={"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            body = error_body(self._too_large(length), status=413, code="too_large")
            return JSONResponse(body, 413, headers=CLOSE_CONNECTION)
        return None

    def _bounded_receive(self, receive: Receive) -> Receive:
        """Limit the size of the body and the time between its pieces."""
        received, complete = 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.settings.idle_timeout)
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time", CLOSE_CONNECTION) from None
            received += len(message.get("body", b""))
            if received > self.settings.max_body_bytes:
                raise HTTPException(413, self._too_large(f"{received} or more"), CLOSE_CONNECTION)
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded

    def _bounded_send(self, path: str, send: Send) -> Send:
        """Limit the time in which the client reads nothing."""

        async def bounded(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), self.settings.idle_timeout)
            except TimeoutError:
                raise SlowClientError(f"{path}: the client read nothing for {self.settings.idle_timeout:g} s") from None

        return bounded

    def _too_large(self, found: str) -> str:
        return f"expected a body of at most {self.settings.max_body_bytes} bytes, found {found}"
