"""HTTP responses from answers, whole or streamed. A client that disconnects frees its batch slot."""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import AsyncIterator, Mapping
from typing import cast

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from omni_jax.audio.encoding import streaming_wav_header
from omni_jax.audio.io import pcm_bytes
from omni_jax.audio.tempo import TempoStream
from omni_jax.errors import ConfigError
from omni_jax.inference.answer import Reply
from omni_jax.serve.errors import RequestRefusedError
from omni_jax.serve.sessions import AnswerStream, Service

STREAMABLE_FORMATS = ("wav", "pcm", "pcm16")
"""Audio formats whose beginning can be sent before the end is known."""


def service_of(request: Request) -> Service:
    """The service behind an application."""
    return cast(Service, request.app.state.service)


def client_of(request: Request) -> str | None:
    """Whom a request is counted for; see `Service.client_of`."""
    return cast(str | None, request.state.client)


def check_model(name: str, request: Request) -> None:
    """Refuse a request for another model.

    Raises:
        RequestRefusedError: `name` is not one of the served model's.
    """
    names = service_of(request).names
    if name not in names:
        message = f"model: expected {' or '.join(map(repr, names))}, found {reprlib.repr(name)}"
        raise RequestRefusedError(404, message, field="model", code="model_not_found")


def check_language(language: str, service: Service, field: str) -> None:
    """Refuse to transcribe another language than the model knows.

    Raises:
        ConfigError: the model knows only English.
    """
    if service.omni.config.text.spoken_english and language.lower().split("-")[0] not in ("en", "english"):
        raise ConfigError(f"{field}: expected en, which this model knows, found {language!r}", field=field)


class StreamedAnswer(StreamingResponse):
    """Sends an answer as it is decoded. However the response ends, the answer is closed."""

    def __init__(
        self,
        answer: AnswerStream,
        content: AsyncIterator[str] | AsyncIterator[bytes],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ):
        # A proxy that buffers responses would undo the streaming.
        more = {"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}
        super().__init__(content, media_type=media_type, headers=more)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def whole_answer(request: Request, answer: AnswerStream) -> Reply:
    """The complete answer, unless the client disconnects first.

    Raises:
        RequestRefusedError: there is none.
    """
    answered = asyncio.ensure_future(answer.wait())
    disconnected = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({answered, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            # nginx's status for it; the client does not read the message.
            raise RequestRefusedError(499, "the client has disconnected", code="client_disconnected", counted=True)
        return answered.result()
    finally:
        answer.close()
        for task in (answered, disconnected):
            task.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def streamed_beginning(format: str, sample_rate: int) -> bytes:
    """What precedes the samples in one of `STREAMABLE_FORMATS`."""
    return streaming_wav_header(sample_rate) if format == "wav" else b""


async def stream_audio(
    answer: AnswerStream, sample_rate: int, format: str, *, min_bytes: int = 1, speed: float = 1.0
) -> AsyncIterator[bytes]:
    """The audio of an answer as it is decoded.

    Args:
        answer: to read.
        sample_rate: its samples per second.
        format: one of `STREAMABLE_FORMATS`.
        min_bytes: audio is held back until there are so many bytes; the joined bytes do not depend on it.
        speed: see `omni_jax.audio.tempo.TempoStream`.
    """
    tempo = TempoStream(sample_rate, speed)
    if beginning := streamed_beginning(format, sample_rate):
        yield beginning
    pending = b""
    async for chunk in answer:
        pending += pcm_bytes(tempo.push(chunk.audio, last=chunk.reply is not None))
        if len(pending) >= min_bytes:
            yield pending
            pending = b""
    if pending:
        yield pending
