"""Middleware before the application: whose pages and which names, API keys, size and time of bodies, slow readers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from omni_jax.serve.budget import Share
from omni_jax.serve.errors import RETRY_SECONDS, error_body
from omni_jax.serve.sessions import Service, Settings

PUBLIC_PATHS = ("/", "/healthz", "/readyz")
"""Need no key, like everything below `/page/`: the page asks for the key, probes have none."""

CLOSE_CONNECTION = {"connection": "close"}
"""Otherwise the server would read all that the client still sends before the client sees the answer."""


POLICY_VIOLATION = 1008
"""Close code, RFC 6455 section 7.4.1."""


class SlowClientError(Exception):
    """A client read nothing for longer than `Settings.idle_timeout`."""


def is_known_key(key: str, keys: Sequence[str]) -> bool:
    """Whether a key is one of `keys`, in a time that depends neither on which nor on how much of it is right."""

    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode(errors="replace")).digest()

    given = digest(key)
    # A sum compares all of them, where `any` would stop at the first match.
    return sum(hmac.compare_digest(given, digest(known)) for known in keys) > 0


def bearer_key(headers: Headers) -> str:
    """The key in a request's Authorization header; empty if it has none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def is_known_host(host: str, settings: Settings) -> bool:
    """Whether a request's Host header names this server.

    Any address does: a page of another site reaches this server by a name of its own (DNS rebinding), never by an
    address.
    """
    if "*" in settings.allowed_hosts:
        return True
    try:
        parts = urlsplit(f"//{host}")
        name = "" if "@" in parts.netloc else (parts.hostname or "").rstrip(".")
    except ValueError:
        return False
    if name == "localhost" or name in settings.allowed_hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_known_origin(headers: Headers, settings: Settings) -> bool:
    """Whether a request is not from a page of another site, which a browser lets send some requests to any server."""
    if "*" in settings.allowed_origins:
        return True
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    if origin.lower() in settings.allowed_origins:
        return True
    try:
        parts = urlsplit(origin.lower())
        # Only for the check that the port is a number.
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc == headers.get("host", "").lower()


class LimitsMiddleware:
    """An ASGI middleware; of a WebSocket only names and origins are checked here, its endpoint does the rest."""

    def __init__(self, app: ASGIApp, service: Service, count: Callable[[str, str], None]):
        """Wrap an application.

        Args:
            app: the application.
            service: has its limits.
            count: called with path and outcome of each request that ends here.
        """
        self.app, self.service, self.settings, self.count = app, service, service.settings, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._foreign(scope, headers)
        if scope["type"] == "websocket":
            if refusal is None:
                await self.app(scope, receive, send)
            else:
                self.count(scope["path"], "refused")
                await WebSocket(scope, receive, send).close(POLICY_VIOLATION)
            return
        if refusal is None:
            refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            self.count(scope["path"], "refused")
            await refusal(scope, receive, send)
            return
        key = "" if self._is_public(scope["path"]) else bearer_key(headers)
        client = self.service.client_of(scope.get("client"), key)
        scope.setdefault("state", {})["client"] = client
        with Share(self.service.bodies, client) as share:
            try:
                bounded = self._bounded_receive(receive, share)
                await self.app(scope, bounded, self._bounded_send(scope["path"], send))
            except SlowClientError:
                # The server closes the connection, as the response is not complete.
                self.count(scope["path"], "slow")

    def _foreign(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        """Why a request is not for this server, or not from one of its pages."""
        host = headers.get("host", "localhost")
        if not is_known_host(host, self.settings):
            message = f"Host: expected an address, localhost or a name of --allow-host, found {host!r}"
            return JSONResponse(error_body(message, status=421, code="unknown_host"), 421)
        # A page of any site may follow a link, but neither post nor open a WebSocket.
        safe = scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS")
        if not safe and not is_known_origin(headers, self.settings):
            message = "expected a page of this server, or of an origin of --allow-origin"
            return JSONResponse(error_body(message, status=403, code="unknown_origin"), 403)
        return None

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        """What is wrong with a request by its headers alone."""
        settings = self.settings
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy may have understood it differently (RFC 9112, section 6.1).
            message = "expected Content-Length or Transfer-Encoding, found both"
            return JSONResponse(error_body(message, status=400), 400, headers=CLOSE_CONNECTION)
        keys = () if self._is_public(path) else settings.api_keys
        if keys and not is_known_key(bearer_key(headers), keys):
            message = "expected the header 'Authorization: Bearer KEY' with a valid key"
            body = error_body(message, status=401, code="invalid_api_key")
            return JSONResponse(body, 401, headers={"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            body = error_body(self._too_large(length), status=413, code="too_large")
            return JSONResponse(body, 413, headers=CLOSE_CONNECTION)
        return None

    def _is_public(self, path: str) -> bool:
        return path in PUBLIC_PATHS or path.startswith("/page/")

    def _bounded_receive(self, receive: Receive, share: Share) -> Receive:
        """Limit the size of the body, the time between its pieces, and the time that all of it takes."""
        received, complete = 0, False
        until = time.monotonic() + self.settings.request_timeout

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(0, min(self.settings.idle_timeout, until - time.monotonic()))):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time", CLOSE_CONNECTION) from None
            size = len(message.get("body", b""))
            received += size
            if received > self.settings.max_body_bytes:
                raise HTTPException(413, self._too_large(f"{received} or more"), CLOSE_CONNECTION)
            if not share.take(size):
                headers = {**CLOSE_CONNECTION, "retry-after": str(RETRY_SECONDS)}
                raise HTTPException(429, "too many large bodies at once; try again later", headers)
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded

    def _bounded_send(self, path: str, send: Send) -> Send:
        """Limit the time in which the client reads nothing."""

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self.settings.idle_timeout):
                    await send(message)
            except TimeoutError:
                raise SlowClientError(f"{path}: the client read nothing for {self.settings.idle_timeout:g} s") from None

        return bounded

    def _too_large(self, found: str) -> str:
        return f"expected a body of at most {self.settings.max_body_bytes} bytes, found {found}"
