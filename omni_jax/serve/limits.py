"""What stands before the application: the API key, the size of bodies, and how long a client may take."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_jax.serve.sessions import Settings

OPEN = ("/", "/healthz", "/readyz", "/page/")
"""Needs no key: the page, which asks for it, and what watches over the process."""


CLOSE = {"connection": "close"}
"""What a client still sends would otherwise be read to its end before it saw the answer."""


class SlowError(Exception):
    """A client took longer than it may to read."""


def is_known(key: str, keys: Sequence[str]) -> bool:
    """Whether a key is one of `keys`; takes as long whichever it is, and whatever it has in common with them."""
    # A list, so that all are compared.
    return any(hmac.compare_digest(key.encode(errors="replace"), known.encode()) for known in keys)


class Guard:
    """An ASGI middleware for HTTP; sockets look after themselves."""

    def __init__(self, app: ASGIApp, settings: Settings, refused: Callable[[str, str], None]):
        """Wrap.

        Args:
            app: the application.
            settings: its limits.
            refused: called with path and outcome of what is turned away here.
        """
        self.app, self.settings, self.refused = app, settings, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        settings, path = self.settings, scope["path"]

        async def refuse(status: int, message: str, code: str, more: dict[str, str]) -> None:
            self.refused(path, "refused")
            response = JSONResponse(error_body(message, status=status, code=code), status, headers=more)
            await response(scope, receive, send)

        if settings.api_keys and path not in OPEN and not path.startswith("/page/"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not is_known(key.strip(), settings.api_keys):
                await refuse(
                    401, "expected the header 'Authorization: Bearer KEY' with a key of this server's",
                    "invalid_api_key", {"www-authenticate": "Bearer"},
                )  # fmt: skip
                return
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            await refuse(413, self._too_large(length), "too_large", CLOSE)
            return

        received, whole = 0, False

        async def bounded_receive() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), settings.idle_seconds)
            except TimeoutError:
                raise HTTPException(408, "the body did not come to its end in time", CLOSE) from None
            received += len(message.get("body", b""))
            if received > settings.max_body_bytes:
                raise HTTPException(413, self._too_large(f"{received} or more"), CLOSE)
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def bounded_send(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), settings.idle_seconds)
            except TimeoutError:
                raise SlowError(f"{path}: a client read nothing for {settings.idle_seconds:g} s") from None

        try:
            await self.app(scope, bounded_receive, bounded_send)
        except SlowError:
            # Nobody is there to be told; the server closes the connection, as the answer is not whole.
            self.refused(path, "slow")

    def _too_large(self, found: str) -> str:
        return f"expected a body of at most {self.settings.max_body_bytes} bytes, found {found}"


def error_body(message: str, *, status: int, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}
