"""How an answer goes out over HTTP, whole or as it is made; a client that leaves gives its slot back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import cast

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from omni_jax.inference.answer import Reply
from omni_jax.serve.sessions import Conversation, Refusal, Service


def service_of(request: Request) -> Service:
    """The service behind an application."""
    return cast(Service, request.app.state.service)


class Streamed(StreamingResponse):
    """Sends an answer as it is made. However it ends, the conversation is closed."""

    def __init__(
        self,
        conversation: Conversation,
        content: AsyncIterator[str] | AsyncIterator[bytes],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ):
        # Proxies that gather what they pass on would take away what streaming is for.
        more = {"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}
        super().__init__(content, media_type=media_type, headers=more)
        self._conversation = conversation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._conversation.close()


async def whole(request: Request, conversation: Conversation) -> Reply:
    """The whole answer, unless the client leaves before.

    Raises:
        Refusal: there is none.
    """
    answered = asyncio.ensure_future(conversation.reply())
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answered, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            # 499 is what servers note for it; nobody reads the sentence.
            raise Refusal(499, "the client has left", code="client_left")
        return answered.result()
    finally:
        conversation.close()
        for task in (answered, left):
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
