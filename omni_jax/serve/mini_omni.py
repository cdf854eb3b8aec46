"""`/chat` as Mini-Omni's own server has it, so that its clients work.

A JSON object goes in: `audio`, a recording in base64, `stream_stride`, how many frames to gather before sound is sent
(default 4; however many, the sound is the same), and `max_tokens` (default 2048). Sound comes out as it is made: a
wav file, or with `"format": "pcm"` the bare 16-bit samples that the original sends under the name of wav.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from omni_jax.serve import sound
from omni_jax.serve.replies import Streamed, service_of
from omni_jax.serve.sessions import from_base64
from omni_jax.tasks import Task

router = APIRouter()


class ChatBody(BaseModel):
    """Body of `/chat`."""

    model_config = ConfigDict(extra="allow", strict=True)

    audio: str
    stream_stride: Annotated[int, Field(ge=1, le=10_000)] = 4
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 2048
    format: Literal["wav", "pcm"] = "wav"


@router.post("/chat", response_model=None)
async def chat(request: Request, body: ChatBody) -> Response:
    """Answer a recording in speech."""
    service = service_of(request)
    recording = from_base64(body.audio, "audio")
    prepared = await service.prepare(sound=recording, task=Task.A1A2, options={"max_steps": body.max_tokens})
    conversation = service.ask(prepared, "/chat")
    codec = service.omni.config.codec
    stride = body.stream_stride * codec.frame_size * 2
    content = sound.streamed(conversation, codec.sample_rate, body.format, stride)
    return Streamed(conversation, content, media_type=sound.MEDIA_TYPES[body.format])
