"""Bodies of requests: JSON is small apart from recordings, forms have few fields, and neither is parsed for long.

What JSON costs depends on the number of its values, not on its length: a recording of 30 MB is one string, and as many
bytes of `0,0,0` are gigabytes of objects. So values are counted before they are parsed.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MAX_VALUES = 20_000
"""Values in the JSON of a body or message: what is validated within 20 ms."""
MAX_FIELDS = 64
"""Fields of a form."""
MAX_FIELD_BYTES = 1 << 16
"""Of a field of a form that is not a file."""


def check_number_of_values(data: bytes | str) -> None:
    """Refuse JSON of too many values before it is parsed; counts commas, colons and opening brackets.

    Raises:
        ValueError: there are too many.
    """
    if isinstance(data, bytes):
        found = sum(data.count(sign) for sign in (b",", b":", b"[", b"{"))
    else:
        found = sum(data.count(sign) for sign in ",:[{")
    if found > MAX_VALUES:
        raise ValueError(f"{found}")


def parse_json(data: bytes) -> Any:
    """The value of a body. Halves of surrogate pairs are no text that an answer could repeat.

    Raises:
        HTTPException: it is not JSON, has too many values, is nested too deeply, or has too long a number.
    """
    try:
        check_number_of_values(data)
    except ValueError as error:
        message = f"body: expected JSON of at most {MAX_VALUES} commas, colons and brackets, found {error}"
        raise HTTPException(413, message) from None
    try:
        return pydantic_core.from_json(data.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"body: expected JSON, found {error}") from None


class BoundedRequest(Request):
    """A request whose body is parsed within limits."""

    async def json(self) -> Any:
        """The body, parsed in a thread."""
        if not hasattr(self, "_json"):
            self._json = await asyncio.to_thread(parse_json, await self.body())
        return self._json

    def form(self, **_: Any) -> Any:
        """The fields of a form; files are on the disk if they are not small."""
        return super().form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)


class JsonRoute(APIRoute):
    """A route whose endpoint gets a `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return handler
