"""OpenAI's endpoints for transcription and speech, and the lists of voices that other servers of its kind have."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from starlette.responses import JSONResponse, PlainTextResponse

from omni_jax.audio.encoding import MEDIA_TYPES, encode
from omni_jax.audio.tempo import TempoStream
from omni_jax.inference.answer import Reply
from omni_jax.serve.bodies import JsonRoute
from omni_jax.serve.errors import client_fields
from omni_jax.serve.openai_schema import (
    FormOptions,
    SpeechRequest,
    failure_line,
    generation_config,
    input_output_usage,
    server_sent_event,
)
from omni_jax.serve.sessions import AnswerStream
from omni_jax.serve.streaming import (
    STREAMABLE_FORMATS,
    StreamedAnswer,
    check_language,
    check_model,
    client_of,
    service_of,
    stream_audio,
    whole_answer,
)
from omni_jax.tasks import Task
from omni_jax.text.subtitles import srt, vtt

router = APIRouter(prefix="/v1/audio", route_class=JsonRoute)


@router.get("/voices")
async def voices() -> Any:
    """List the voices: there is one."""
    return {"voices": [{"id": "default", "name": "default"}]}


@router.get("/models")
async def models(request: Request) -> Any:
    """List the names of the model."""
    return {"models": [{"id": name, "name": name} for name in service_of(request).names]}


@router.post("/transcriptions", response_model=None)
async def transcriptions(
    request: Request,
    file: Annotated[UploadFile, File()],
    model: Annotated[str, Form()],
    options: Annotated[FormOptions, Form()],
    response_format: Annotated[Literal["json", "text", "verbose_json", "srt", "vtt"], Form()] = "json",
    language: Annotated[str | None, Form()] = None,
    timestamp_granularities: Annotated[list[Literal["segment"]] | None, Form(alias="timestamp_granularities[]")] = None,
    stream: Annotated[bool, Form()] = False,
) -> Response:
    """Transcribe a recording of any length (A1T1)."""
    check_model(model, request)
    service = service_of(request)
    spoken = "english" if service.omni.config.text.spoken_english else ""
    if language:
        check_language(language, service, "language")
    config = generation_config(options)
    prepared = await service.prepare(client=client_of(request), audio=await file.read(), task=Task.A1T1, config=config)
    answer = service.submit(prepared, "/v1/audio/transcriptions")
    if stream:
        return StreamedAnswer(answer, _transcript_lines(answer), media_type="text/event-stream")
    reply = await whole_answer(request, answer)
    if response_format == "text":
        return PlainTextResponse(reply.text + "\n")
    if response_format == "srt":
        return PlainTextResponse(srt(reply.segments), media_type="application/x-subrip")
    if response_format == "vtt":
        return PlainTextResponse(vtt(reply.segments), media_type="text/vtt")
    content: dict[str, Any] = {"text": reply.text}
    if response_format == "verbose_json":
        content |= {"task": "transcribe", "language": spoken, "duration": prepared.duration}
        content["segments"] = [
            {"id": index, "start": segment.start, "end": segment.end, "text": segment.text}
            for index, segment in enumerate(reply.segments)
        ]
    return JSONResponse(content)


async def _transcript_lines(answer: AnswerStream) -> AsyncIterator[str]:
    async for chunk in answer:
        if chunk.text:
            yield server_sent_event({"type": "transcript.text.delta", "delta": chunk.text})
    if answer.reply is None:
        yield failure_line(answer)
        return
    yield server_sent_event({"type": "transcript.text.done", "text": answer.reply.text})


@router.post("/speech", response_model=None)
async def speech(request: Request, body: SpeechRequest) -> Response:
    """Speak a text (T1A1); wav and pcm are streamed."""
    check_model(body.model, request)
    service = service_of(request)
    config = generation_config(body)
    with client_fields(text="input"):
        prepared = await service.prepare(client=client_of(request), text=body.input, task=Task.T1A1, config=config)
    answer = service.submit(prepared, "/v1/audio/speech")
    rate, format, speed = service.omni.sample_rate, body.response_format, body.speed or 1.0
    if body.stream_format == "sse":
        lines = _speech_lines(answer, rate, format, speed, len(prepared.prompt))
        return StreamedAnswer(answer, lines, media_type="text/event-stream")
    if format in STREAMABLE_FORMATS:
        content = stream_audio(answer, rate, format, speed=speed)
        return StreamedAnswer(answer, content, media_type=MEDIA_TYPES[format])
    reply = await whole_answer(request, answer)
    return Response(await asyncio.to_thread(_encode, reply, format, speed), media_type=MEDIA_TYPES[format])


def _encode(reply: Reply, format: str, speed: float) -> bytes:
    assert reply.audio is not None
    audio = TempoStream(reply.sample_rate, speed).push(reply.audio, last=True)
    return encode(audio, reply.sample_rate, format)


async def _speech_lines(
    answer: AnswerStream, rate: int, format: str, speed: float, prompt_length: int
) -> AsyncIterator[str]:
    """The events of spoken text; a format that is not streamed comes in one piece."""

    def delta(data: bytes) -> str:
        return server_sent_event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})

    if format in STREAMABLE_FORMATS:
        async for data in stream_audio(answer, rate, format, speed=speed):
            if data:
                yield delta(data)
    else:
        async for _ in answer:
            pass
        if answer.reply is not None:
            yield delta(await asyncio.to_thread(_encode, answer.reply, format, speed))
    if answer.reply is None:
        yield failure_line(answer)
        return
    yield server_sent_event({"type": "speech.audio.done", "usage": input_output_usage(prompt_length, answer.reply)})
