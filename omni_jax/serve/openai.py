"""OpenAI's endpoints for chat, transcription and speech; OpenAI's client libraries work unchanged.

Of a chat the last message of the user is answered. Earlier messages and those of the system are ignored; the header
`x-omni-jax-ignored-messages` has their number. There is one voice, whatever voice is asked for. A field that would
change the answer in a way this model cannot is refused, and so is a field of the wrong type.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from starlette.responses import JSONResponse, PlainTextResponse

from omni_jax.audio.encoding import MEDIA_TYPES, encode, streaming_wav_header
from omni_jax.audio.io import SAMPLE_RATE, pcm_bytes
from omni_jax.errors import ConfigError
from omni_jax.serve.errors import RequestRefusedError, client_fields, error_body
from omni_jax.serve.openai_schema import (
    UNSUPPORTED,
    AudioPart,
    ChatRequest,
    Message,
    SpeechRequest,
    Temperature,
    TextPart,
    audio_head,
    finish_reason,
    generation_config,
    response_head,
    server_sent_event,
    usage,
)
from omni_jax.serve.sessions import AnswerStream, decode_base64
from omni_jax.serve.streaming import STREAMABLE_FORMATS, StreamedAnswer, service_of, stream_audio, whole_answer
from omni_jax.tasks import Task

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(request: Request) -> Any:
    """List the models: there is one."""
    return {"object": "list", "data": [_model(service_of(request).name)]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Any:
    """One of `models`."""
    _check_model(name, request)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "omni_jax"}


def _check_model(name: str, request: Request) -> None:
    expected = service_of(request).name
    if name != expected:
        message = f"model: expected {expected!r}, found {name!r}"
        raise RequestRefusedError(404, message, field="model", code="model_not_found")


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer the last message, in text or in text and speech."""
    _check_model(body.model, request)
    _check_supported(body)
    outputs_audio = "audio" in (body.modalities or ["text"])
    format = _audio_format(body, outputs_audio=outputs_audio)
    config = generation_config(
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        max_tokens=body.max_tokens,
        max_completion_tokens=body.max_completion_tokens,
    )
    recording, text = _last_message(body.messages)
    if recording is None:
        task = Task.T1A2 if outputs_audio else Task.T1T2
    else:
        task = Task.A1A2 if outputs_audio else Task.A1T2
    service = service_of(request)
    with client_fields(text="messages"):
        prepared = await service.prepare(audio=recording, text=text, task=task, config=config)
    answer = service.submit(prepared, "/v1/chat/completions")
    ignored = len(body.messages) - 1
    headers = {"x-omni-jax-ignored-messages": str(ignored)} if ignored else {}
    prompt_length = len(prepared.prompt)
    if body.stream:
        head = response_head("chat.completion.chunk", body.model)
        if outputs_audio:
            events = _chat_audio_events(answer, head, format, service.omni.sample_rate)
        else:
            events = _chat_text_events(answer, head)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        lines = _chat_event_lines(events, answer, head, prompt_length if with_usage else None)
        return StreamedAnswer(answer, lines, media_type="text/event-stream", headers=headers)
    reply = await whole_answer(request, answer)
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.audio is not None:
        data = base64.b64encode(await asyncio.to_thread(encode, reply.audio, reply.sample_rate, format)).decode()
        message |= {"content": None, "audio": {**audio_head(), "data": data, "transcript": reply.text}}
    choice = {"index": 0, "finish_reason": finish_reason(reply), "message": message, "logprobs": None}
    content = {
        **response_head("chat.completion", body.model),
        "choices": [choice],
        "usage": usage(prompt_length, reply),
    }
    return JSONResponse(content, headers=headers)


def _check_supported(body: ChatRequest) -> None:
    for name, neutral in UNSUPPORTED.items():
        value = (body.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            message = f"{name}: not supported by this model; leave it out"
            raise RequestRefusedError(400, message, field=name, code="unsupported")


def _audio_format(body: ChatRequest, *, outputs_audio: bool) -> str:
    if body.audio is None:
        if outputs_audio:
            raise ConfigError("audio: expected the format and voice of the answer, found none", field="audio")
        return "wav"
    format = body.audio.format
    if body.stream and outputs_audio and format not in STREAMABLE_FORMATS:
        message = f"audio.format: expected wav or pcm16 in a stream, found {format}"
        raise ConfigError(message, field="audio.format")
    return format


def _last_message(messages: list[Message]) -> tuple[bytes | None, str | None]:
    """The recording or the text of the last message, which must be the user's."""
    if messages[-1].role != "user":
        raise ConfigError("messages: expected the last one to be the user's", field="messages")
    content = messages[-1].content
    if isinstance(content, str) and content:
        return None, content
    parts = content if isinstance(content, list) else []
    for part in parts:
        if isinstance(part, dict):
            kind = part.get("type")
            raise ConfigError(f"messages: expected parts of type text or input_audio, found {kind!r}", field="messages")
    recordings = [part.input_audio.data for part in parts if isinstance(part, AudioPart)]
    text = " ".join(part.text for part in parts if isinstance(part, TextPart) and part.text)
    if len(recordings) + bool(text) != 1:
        raise ConfigError(
            "messages: expected the last one to hold either text or one recording, "
            f"found {'text and ' if text else ''}{len(recordings)} recordings",
            field="messages",
        )
    return (decode_base64(recordings[0], "input_audio.data") if recordings else None), text or None


async def _chat_text_events(answer: AnswerStream, head: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a text answer."""
    yield _chat_event(head, {"role": "assistant", "content": ""})
    async for chunk in answer:
        if chunk.text:
            yield _chat_event(head, {"content": chunk.text})
    if answer.reply is not None:
        yield _chat_event(head, {}, finish_reason(answer.reply))


async def _chat_audio_events(
    answer: AnswerStream, head: dict[str, Any], format: str, rate: int
) -> AsyncIterator[dict[str, Any]]:
    """The events of an answer in text and audio."""
    audio = audio_head()

    def event(**delta: Any) -> dict[str, Any]:
        return _chat_event(head, {"audio": {"id": audio["id"], **delta}})

    yield _chat_event(head, {"role": "assistant", "audio": {"id": audio["id"], "transcript": ""}})
    wav_header = streaming_wav_header(rate) if format == "wav" else b""
    async for chunk in answer:
        if chunk.text:
            yield event(transcript=chunk.text)
        if len(chunk.audio):
            yield event(data=base64.b64encode(wav_header + pcm_bytes(chunk.audio)).decode())
            wav_header = b""
    if answer.reply is not None:
        yield event(expires_at=audio["expires_at"])
        yield _chat_event(head, {}, finish_reason(answer.reply))


def _chat_event(head: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}


async def _chat_event_lines(
    events: AsyncIterator[dict[str, Any]], answer: AnswerStream, head: dict[str, Any], prompt_length: int | None
) -> AsyncIterator[str]:
    """Events as lines. A complete answer ends with [DONE], any other with an error.

    Args:
        events: of the answer.
        answer: being sent.
        head: of every event.
        prompt_length: in positions, if the usage is to be sent; else None.
    """
    async for event in events:
        if prompt_length is not None:
            event["usage"] = None
        yield server_sent_event(event)
    if answer.reply is None:
        yield _failure_line(answer)
        return
    if prompt_length is not None:
        yield server_sent_event({**head, "choices": [], "usage": usage(prompt_length, answer.reply)})
    yield "data: [DONE]\n\n"


def _failure_line(answer: AnswerStream) -> str:
    """The error that ends an incomplete stream, whose status has been sent already."""
    error = answer.failure()
    return server_sent_event(error_body(str(error), status=error.status, code=error.code))


@router.post("/audio/transcriptions", response_model=None)
async def transcriptions(
    request: Request,
    file: Annotated[UploadFile, File()],
    model: Annotated[str, Form()],
    response_format: Annotated[Literal["json", "text", "verbose_json"], Form()] = "json",
    language: Annotated[str | None, Form()] = None,
    temperature: Annotated[Temperature | None, Form()] = None,
    stream: Annotated[bool, Form()] = False,
) -> Response:
    """Transcribe a recording (A1T1). The model recognizes the language itself."""
    _check_model(model, request)
    service = service_of(request)
    config = generation_config(temperature=temperature)
    prepared = await service.prepare(audio=await file.read(), task=Task.A1T1, config=config)
    answer = service.submit(prepared, "/v1/audio/transcriptions")
    if stream:
        return StreamedAnswer(answer, _transcript_lines(answer), media_type="text/event-stream")
    reply = await whole_answer(request, answer)
    if response_format == "text":
        return PlainTextResponse(reply.text + "\n")
    content: dict[str, Any] = {"text": reply.text}
    if response_format == "verbose_json":
        assert prepared.speech is not None
        content |= {"task": "transcribe", "language": language or "", "duration": len(prepared.speech) / SAMPLE_RATE}
    return JSONResponse(content)


async def _transcript_lines(answer: AnswerStream) -> AsyncIterator[str]:
    async for chunk in answer:
        if chunk.text:
            yield server_sent_event({"type": "transcript.text.delta", "delta": chunk.text})
    if answer.reply is None:
        yield _failure_line(answer)
        return
    yield server_sent_event({"type": "transcript.text.done", "text": answer.reply.text})


@router.post("/audio/speech", response_model=None)
async def speech(request: Request, body: SpeechRequest) -> Response:
    """Speak a text (T1A1); wav and pcm are streamed."""
    _check_model(body.model, request)
    if body.speed not in (None, 1):
        raise ConfigError(f"speed: expected 1, the only speed of this voice, found {body.speed:g}", field="speed")
    service = service_of(request)
    config = generation_config(temperature=body.temperature, seed=body.seed)
    with client_fields(text="input"):
        prepared = await service.prepare(text=body.input, task=Task.T1A1, config=config)
    answer = service.submit(prepared, "/v1/audio/speech")
    rate, format = service.omni.sample_rate, body.response_format
    if format in STREAMABLE_FORMATS:
        return StreamedAnswer(answer, stream_audio(answer, rate, format), media_type=MEDIA_TYPES[format])
    reply = await whole_answer(request, answer)
    assert reply.audio is not None
    return Response(await asyncio.to_thread(encode, reply.audio, rate, format), media_type=MEDIA_TYPES[format])
