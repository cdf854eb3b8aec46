"""Errors as HTTP answers: the status of each, and the JSON body that OpenAI's clients expect."""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from omni_jax.errors import (
    AudioError,
    AudioTooLongError,
    BusyError,
    ClosedError,
    ConfigError,
    NoSpeechError,
    OmniError,
)

RETRY_SECONDS = 2
"""Value of `Retry-After` where trying again later helps."""

MAX_MESSAGE = 1000
"""Characters of a message."""


class RequestRefusedError(OmniError):
    """A request that the server does not answer.

    Attributes:
        status: HTTP status.
        field: of the request, where the error is about a single one.
        code: what clients can decide by.
        counted: whether the metrics include the request already, under the outcome of its answer.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, code: str | None = None, counted: bool = False
    ):
        super().__init__(message)
        self.status, self.field, self.code, self.counted = status, field, code, counted


class ErrorKind(NamedTuple):
    """How an error is answered."""

    status: int
    """HTTP status."""
    code: str | None
    """What clients can decide by."""
    outcome: str
    """Label of the request in the metrics."""


ERROR_KINDS: Mapping[type[OmniError], ErrorKind] = {
    NoSpeechError: ErrorKind(400, "no_speech", "refused"),
    AudioTooLongError: ErrorKind(400, "audio_too_long", "refused"),
    AudioError: ErrorKind(400, "bad_audio", "refused"),
    ConfigError: ErrorKind(400, None, "refused"),
    BusyError: ErrorKind(429, "busy", "busy"),
    ClosedError: ErrorKind(503, "closed", "refused"),
    OmniError: ErrorKind(500, "failed", "failed"),
}
"""By class; an error that is not listed is answered as its base class is."""


def kind_of(error: OmniError) -> ErrorKind:
    """How an error is answered."""
    if isinstance(error, RequestRefusedError):
        return ErrorKind(error.status, error.code, "failed" if error.counted else "refused")
    return next(ERROR_KINDS[base] for base in type(error).__mro__ if base in ERROR_KINDS)


def error_body(message: str, *, status: int, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if len(message) > MAX_MESSAGE:
        # It quotes what was found, which may be megabytes.
        message = f"{message[:MAX_MESSAGE]}..."
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


_TYPE = re.compile(r"(?:str|int|float|bool|list|dict|constrained-int)$|.*\[[^\]]")
"""What pydantic adds to a field's path where the field may be of several types."""


def describe_validation_error(errors: Sequence[Any]) -> tuple[str | None, str]:
    """One of pydantic's errors: the field, and a sentence that says what is wrong with it.

    The first one; where a field may be one of several things, the error of that which was nearest.
    """
    first = max(errors, key=lambda error: len(error["loc"]) if error["loc"][:2] == errors[0]["loc"][:2] else 0)
    if first["type"] == "json_invalid":
        return None, f"body: expected JSON, found {first.get('ctx', {}).get('error', 'something else')}"
    path = [str(name) for name in first["loc"] if name not in ("body", "query", "path") and not _TYPE.match(str(name))]
    field = ".".join(path) or None
    found = "" if first["type"] == "missing" else f", found {reprlib.repr(first.get('input'))}"
    return field, f"{field or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{found}"


@contextlib.contextmanager
def client_fields(**names: str) -> Iterator[None]:
    """Report errors about options of ours under the names that a client's API has for them.

    Args:
        **names: the client's name of an option, by our name.
    """
    try:
        yield
    except ConfigError as error:
        name = names.get(error.field or "")
        if name is None:
            raise
        raise ConfigError(f"{name}: {error}", field=name) from None
