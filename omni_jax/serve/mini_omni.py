"""`/chat`, compatible with the server of the published Mini-Omni.

The body is a JSON object: `audio`, a recording in base64; `stream_stride`, how many codec frames are collected before
audio is sent (default 4; the audio does not depend on it); `max_tokens` (default 2048); `truncate`, to
answer the beginning of a recording that is too long. The response streams audio as
it is decoded: a wav file, or with `"format": "pcm"` bare 16-bit samples, which the original server sends as audio/wav.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from omni_jax.audio.encoding import MEDIA_TYPES
from omni_jax.inference.generation import GenerationConfig
from omni_jax.serve.bodies import JsonRoute
from omni_jax.serve.errors import client_fields
from omni_jax.serve.openai_schema import Body
from omni_jax.serve.sessions import Base64
from omni_jax.serve.streaming import StreamedAnswer, client_of, service_of, stream_audio
from omni_jax.tasks import Task

router = APIRouter(route_class=JsonRoute)


class ChatBody(Body):
    """Body of `/chat`."""

    audio: str
    stream_stride: Annotated[int, Field(ge=1, le=10_000)] = 4
    max_tokens: int = 2048
    truncate: bool = False
    format: Literal["wav", "pcm"] = "wav"


@router.post("/chat", response_model=None)
async def chat(request: Request, body: ChatBody) -> Response:
    """Answer a recording in speech (A1A2)."""
    service = service_of(request)
    with client_fields(max_steps="max_tokens"):
        config = GenerationConfig(max_steps=body.max_tokens)
    prepared = await service.prepare(
        client=client_of(request),
        audio=Base64(body.audio, "audio"),
        task=Task.A1A2,
        truncate=body.truncate,
        config=config,
    )
    answer = service.submit(prepared, "/chat")
    min_bytes = body.stream_stride * service.omni.config.codec.frame_size * 2
    content = stream_audio(answer, service.omni.sample_rate, body.format, min_bytes=min_bytes)
    return StreamedAnswer(answer, content, media_type=MEDIA_TYPES[body.format])
