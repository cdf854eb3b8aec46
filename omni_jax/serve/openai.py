"""OpenAI's endpoints, as far as a model that hears and talks can serve them; their own clients work unchanged.

One question is answered at a time: of a chat the last message of the user is heard, earlier ones and those of the
system are not, and the header `x-omni-jax-unheard` says how many. There is one voice, whatever is asked for. Without
a temperature decoding is greedy. What would change an answer in a way the model can't follow is refused, and so is
a field of the wrong type; other fields that it does not know are let pass.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, PlainTextResponse

from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.inference.answer import Reply
from omni_jax.serve import sound
from omni_jax.serve.limits import error_body
from omni_jax.serve.replies import Streamed, service_of, whole
from omni_jax.serve.sessions import Conversation, Refusal, from_base64
from omni_jax.tasks import Task

router = APIRouter(prefix="/v1")

AUDIO_LIFE = 3600
"""Seconds until an answer's sound would expire, as the clients' types want it; nothing is kept here at all."""

Format = Literal["wav", "mp3", "flac", "opus", "pcm", "pcm16"]
Unit = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class TextPart(_Body):
    """Part of a message."""

    type: Literal["text"]
    text: str


class InputAudio(_Body):
    """A recording; its content says which format it really is."""

    data: str
    format: str = "wav"


class AudioPart(_Body):
    """Part of a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class Message(_Body):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Annotated[TextPart | AudioPart, Field(discriminator="type")]] | list[dict[str, Any]] | None = (
        None
    )


class AudioOut(_Body):
    """How the answer is to sound."""

    format: Format = "wav"
    voice: str | dict[str, Any] | None = None


class StreamOptions(_Body):
    """Of a stream."""

    include_usage: bool = False


class ChatRequest(_Body):
    """Body of `/v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOut | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Unit | None = None
    seed: Seed | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
}
"""Fields that the model can't follow, and the values at which it need not."""


class SpeechRequest(_Body):
    """Body of `/v1/audio/speech`."""

    model: str
    input: str
    voice: str | dict[str, Any] | None = None
    response_format: Format = "mp3"
    speed: float | None = Field(default=1.0, allow_inf_nan=False)
    stream_format: Literal["audio"] | None = None
    temperature: Temperature | None = None
    seed: Seed | None = None


@router.get("/models")
async def models(request: Request) -> Any:
    """What can be asked: one model."""
    return {"object": "list", "data": [_model(service_of(request).name)]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Any:
    """One of `models`."""
    _known(name, request)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "omni_jax"}


def _known(name: str, request: Request) -> None:
    known = service_of(request).name
    if name != known:
        raise Refusal(404, f"model: expected {known!r}, found {name!r}", field="model", code="model_not_found")


def _options(body: Any) -> dict[str, Any]:
    """The sampling options that were given."""
    limits = {"max_steps": getattr(body, "max_completion_tokens", None) or getattr(body, "max_tokens", None)}
    given = limits | {name: getattr(body, name, None) for name in ("temperature", "top_p", "seed")}
    return {name: value for name, value in given.items() if value is not None}


def _question(messages: list[Message]) -> tuple[bytes | None, str | None, int]:
    """The recording or the text of the last user message, and how many messages go unheard."""
    if messages[-1].role != "user":
        raise Refusal(400, "messages: expected the last one to be the user's", field="messages")
    content = messages[-1].content
    if isinstance(content, str) and content:
        return None, content, len(messages) - 1
    parts = content if isinstance(content, list) else []
    for part in parts:
        if isinstance(part, dict):
            kind = part.get("type")
            raise Refusal(
                400, f"messages: expected parts of type text or input_audio, found {kind!r}", field="messages"
            )
    recordings = [part.input_audio.data for part in parts if isinstance(part, AudioPart)]
    text = " ".join(part.text for part in parts if isinstance(part, TextPart) and part.text)
    if len(recordings) + bool(text) != 1:
        raise Refusal(
            400,
            "messages: expected the last one to hold either text or one recording, "
            f"found {'text and ' if text else ''}{len(recordings)} recordings",
            field="messages",
        )
    return (from_base64(recordings[0], "input_audio.data") if recordings else None), text or None, len(messages) - 1


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer the last message, in text or in text and speech."""
    _known(body.model, request)
    for name, neutral in NEUTRAL.items():
        value = (body.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            raise Refusal(400, f"{name}: this model can't follow it; leave it out", field=name, code="unsupported")
    recording, text, unheard = _question(body.messages)
    outputs_audio = "audio" in (body.modalities or ["text"])
    if outputs_audio and body.audio is None:
        raise Refusal(400, "audio: expected the format and voice of the answer, found none", field="audio")
    format = body.audio.format if body.audio is not None else "wav"
    if body.stream and outputs_audio and format not in sound.STREAMED:
        raise Refusal(400, f"audio.format: expected wav or pcm16 in a stream, found {format}", field="audio.format")
    task = (
        (Task.T1A2 if outputs_audio else Task.T1T2) if recording is None else Task.A1A2 if outputs_audio else Task.A1T2
    )
    service = service_of(request)
    prepared = await service.prepare(sound=recording, text=text, task=task, options=_options(body))
    conversation = service.ask(prepared, "/v1/chat/completions")
    headers = {"x-omni-jax-unheard": str(unheard)} if unheard else {}
    prompt = len(prepared.prompt)
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _chat_events(conversation, body.model, outputs_audio, format, service.omni.config.codec.sample_rate)
        lines = _server_sent(events, conversation, (prompt, body.model) if usage else None)
        return Streamed(conversation, lines, media_type="text/event-stream", headers=headers)
    reply = await whole(request, conversation)
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.audio is not None:
        data = base64.b64encode(sound.encode(reply.audio, reply.sample_rate, format)).decode()
        message |= {"content": None, "audio": {**_audio_id(), "data": data, "transcript": reply.text}}
    choice = {"index": 0, "finish_reason": _finish(reply), "message": message, "logprobs": None}
    content = {**_head("chat.completion", body.model), "choices": [choice], "usage": _usage(prompt, reply)}
    return JSONResponse(content, headers=headers)


async def _chat_events(
    conversation: Conversation, name: str, outputs_audio: bool, format: str, rate: int
) -> AsyncIterator[dict[str, Any]]:
    head, ident = _head("chat.completion.chunk", name), _audio_id()

    def event(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}

    def audio(**delta: Any) -> dict[str, Any]:
        return event({"audio": {"id": ident["id"], **delta}})

    first: dict[str, Any] = {"audio": {"id": ident["id"], "transcript": ""}} if outputs_audio else {"content": ""}
    yield event({"role": "assistant", **first})
    header = sound.endless_header(rate) if format == "wav" else b""
    async for part in conversation:
        if part.text:
            yield audio(transcript=part.text) if outputs_audio else event({"content": part.text})
        if len(part.audio):
            yield audio(data=base64.b64encode(header + sound.pcm(part.audio)).decode())
            header = b""
    if conversation.whole is not None:
        if outputs_audio:
            yield audio(expires_at=ident["expires_at"])
        yield event({}, _finish(conversation.whole))


async def _server_sent(
    events: AsyncIterator[dict[str, Any]], conversation: Conversation, usage: tuple[int, str] | None
) -> AsyncIterator[str]:
    """Events as lines; an answer that failed ends with an error, one that was whole with [DONE]."""
    async for event in events:
        if usage is not None:
            event["usage"] = None
        yield _line(event)
    if conversation.whole is None:
        yield _line(_broken_off(conversation))
        return
    if usage is not None:
        prompt, name = usage
        last = {**_head("chat.completion.chunk", name), "choices": [], "usage": _usage(prompt, conversation.whole)}
        yield _line(last)
    yield "data: [DONE]\n\n"


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
    """Write down what a recording says (A1T1). What language it is in the model makes out itself."""
    _known(model, request)
    service = service_of(request)
    options = {} if temperature is None else {"temperature": temperature}
    prepared = await service.prepare(sound=await file.read() or b"\0", task=Task.A1T1, options=options)
    conversation = service.ask(prepared, "/v1/audio/transcriptions")
    if stream:
        return Streamed(conversation, _transcript_events(conversation), media_type="text/event-stream")
    reply = await whole(request, conversation)
    if response_format == "text":
        return PlainTextResponse(reply.text + "\n")
    content: dict[str, Any] = {"text": reply.text}
    if response_format == "verbose_json":
        assert prepared.speech is not None
        content |= {"task": "transcribe", "language": language or "", "duration": len(prepared.speech) / SAMPLE_RATE}
    return JSONResponse(content)


async def _transcript_events(conversation: Conversation) -> AsyncIterator[str]:
    async for part in conversation:
        if part.text:
            yield _line({"type": "transcript.text.delta", "delta": part.text})
    if conversation.whole is None:
        yield _line(_broken_off(conversation))
        return
    yield _line({"type": "transcript.text.done", "text": conversation.whole.text})


def _line(event: dict[str, Any]) -> str:
    """An event as it is sent."""
    return f"data: {json.dumps(event)}\n\n"


def _broken_off(conversation: Conversation) -> dict[str, Any]:
    """What ends a stream whose answer is not whole: its status has gone out already."""
    refusal = conversation.refusal()
    return error_body(refusal.message, status=refusal.status, code=refusal.code)


@router.post("/audio/speech", response_model=None)
async def speech(request: Request, body: SpeechRequest) -> Response:
    """Read a text aloud (T1A1); wav and pcm come as they are made."""
    _known(body.model, request)
    if body.speed not in (None, 1):
        raise Refusal(400, f"speed: expected 1, this voice knows no other, found {body.speed:g}", field="speed")
    service = service_of(request)
    prepared = await service.prepare(text=body.input, task=Task.T1A1, options=_options(body))
    conversation = service.ask(prepared, "/v1/audio/speech")
    rate, format = service.omni.config.codec.sample_rate, body.response_format
    media_type = sound.MEDIA_TYPES[format]
    if format in sound.STREAMED:
        return Streamed(conversation, sound.streamed(conversation, rate, format), media_type=media_type)
    reply = await whole(request, conversation)
    assert reply.audio is not None
    return Response(sound.encode(reply.audio, rate, format), media_type=media_type)


def _head(kind: str, name: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": name}


def _audio_id() -> dict[str, Any]:
    return {"id": f"audio_{secrets.token_hex(12)}", "expires_at": int(time.time()) + AUDIO_LIFE}


def _finish(reply: Reply) -> str:
    return "stop" if reply.finish_reason == "stop" else "length"


def _usage(prompt: int, reply: Reply) -> dict[str, int]:
    """Positions of the trunk: one for each step, in which up to eight tokens are said."""
    steps = reply.tokens.shape[1]
    return {"prompt_tokens": prompt, "completion_tokens": steps, "total_tokens": prompt + steps}
