"""OpenAI's endpoints for models and chat; OpenAI's client libraries work unchanged.

Of a chat the last message of the user is answered. A model that was trained on conversations takes the messages before
it as text. Otherwise they are ignored, as are those that have no text, and the header `x-omni-jax-ignored-messages` has
their number. Of a last message with text and a recording the recording is answered, and `x-omni-jax-ignored-text` is 1.
There is one voice, whatever voice is asked for. A field that would change the answer in a way this model cannot is
refused, and so is a field of the wrong type.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from omni_jax.audio.encoding import encode
from omni_jax.audio.io import SAMPLE_RATE, pcm_bytes
from omni_jax.errors import ConfigError
from omni_jax.serve.bodies import JsonRoute
from omni_jax.serve.chat_history import TextCache, read_history
from omni_jax.serve.errors import client_fields
from omni_jax.serve.openai_schema import (
    UNSUPPORTED,
    AudioPart,
    ChatRequest,
    Message,
    TextPart,
    audio_head,
    failure_line,
    finish_reason,
    generation_config,
    response_head,
    server_sent_event,
    usage,
)
from omni_jax.serve.sessions import AnswerStream, Base64, Service
from omni_jax.serve.streaming import (
    StreamedAnswer,
    check_model,
    client_of,
    service_of,
    streamed_beginning,
    whole_answer,
)

router = APIRouter(prefix="/v1", route_class=JsonRoute)


@router.get("/models")
@router.get("/models/", include_in_schema=False)
async def models(request: Request) -> Any:
    """List the names of the model."""
    service = service_of(request)
    return {"object": "list", "data": [_model(name, service) for name in service.names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Any:
    """One of `models`."""
    check_model(name, request)
    return _model(name, service_of(request))


def _model(name: str, service: Service) -> dict[str, Any]:
    """OpenAI's fields, and what our page needs to know."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "omni_jax",
        "state": service.state,
        "trained": service.omni.trained,
        "conversation": service.omni.config.conversation,
        "max_audio_seconds": service.max_samples(None) / SAMPLE_RATE,
    }


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer the last message, in text or in text and speech."""
    check_model(body.model, request)
    body.check_supported(UNSUPPORTED)
    if body.outputs_audio and body.audio is None:
        raise ConfigError("audio: expected the format and voice of the answer, found none", field="audio")
    format = body.audio_format()
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    config = generation_config(body, limit)
    recording, text, ignored_text = _last_message(body.messages)
    task = body.task(takes_audio=recording is not None)
    service = service_of(request)
    texts: TextCache = request.app.state.texts
    client = client_of(request)
    history = await read_history(service, client, texts, body.messages[:-1], "/v1/chat/completions")
    with client_fields(text="messages"):
        prepared = await service.prepare(
            client=client,
            audio=recording,
            text=text,
            task=task,
            truncate=body.truncate,
            system=history.system,
            history=history.turns,
            config=config,
        )
    answer = service.submit(prepared, "/v1/chat/completions")
    headers = {}
    if history.ignored:
        headers["x-omni-jax-ignored-messages"] = str(history.ignored)
    if ignored_text:
        headers["x-omni-jax-ignored-text"] = "1"
    prompt_length = len(prepared.prompt)
    if body.stream:
        head = response_head("chat.completion.chunk", body.model)
        if body.outputs_audio:
            events = _chat_audio_events(answer, head, format, service.omni.sample_rate, texts)
        else:
            events = _chat_text_events(answer, head)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        lines = _chat_event_lines(events, answer, head, prompt_length if with_usage else None)
        return StreamedAnswer(answer, lines, media_type="text/event-stream", headers=headers)
    reply = await whole_answer(request, answer)
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.audio is not None:
        data = base64.b64encode(await asyncio.to_thread(encode, reply.audio, reply.sample_rate, format)).decode()
        audio = audio_head()
        texts.put(audio["id"], reply.text)
        message |= {"content": None, "audio": {**audio, "data": data, "transcript": reply.text}}
    choice = {"index": 0, "finish_reason": finish_reason(reply), "message": message, "logprobs": None}
    content = {
        **response_head("chat.completion", body.model),
        "choices": [choice],
        "usage": usage(prompt_length, reply),
    }
    return JSONResponse(content, headers=headers)


def _last_message(messages: list[Message]) -> tuple[Base64 | None, str | None, bool]:
    """The recording or the text of the last message, which must be the user's, and whether it has text too."""
    if messages[-1].role != "user":
        raise ConfigError("messages: expected the last one to be the user's", field="messages")
    content = messages[-1].content
    if isinstance(content, str) and content:
        return None, content, False
    parts = content if isinstance(content, list) else []
    # With one part of another kind, or a damaged one, all parts are dicts.
    if kinds := [part.get("type") for part in parts if isinstance(part, dict)]:
        other = next((repr(kind) for kind in kinds if kind not in ("text", "input_audio")), "one without its field")
        raise ConfigError(f"messages: expected parts of type text or input_audio, found {other}", field="messages")
    recordings = [part.input_audio.data for part in parts if isinstance(part, AudioPart)]
    text = " ".join(part.text for part in parts if isinstance(part, TextPart) and part.text)
    if len(recordings) > 1 or not (recordings or text):
        raise ConfigError(
            f"messages: expected the last one to have a text or one recording, found {len(recordings)} recordings"
            + ("" if recordings else " and no text"),
            field="messages",
        )
    if recordings:
        return Base64(recordings[0], "input_audio.data"), None, bool(text)
    return None, text, False


async def _chat_text_events(answer: AnswerStream, head: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a text answer."""
    yield _chat_event(head, {"role": "assistant", "content": ""})
    async for chunk in answer:
        if chunk.text:
            yield _chat_event(head, {"content": chunk.text})
    if answer.reply is not None:
        yield _chat_event(head, {}, finish_reason(answer.reply))


async def _chat_audio_events(
    answer: AnswerStream, head: dict[str, Any], format: str, rate: int, texts: TextCache
) -> AsyncIterator[dict[str, Any]]:
    """The events of an answer in text and audio."""
    audio = audio_head()

    def event(**delta: Any) -> dict[str, Any]:
        return _chat_event(head, {"audio": {"id": audio["id"], **delta}})

    yield _chat_event(head, {"role": "assistant", "audio": {"id": audio["id"], "transcript": ""}})
    beginning = streamed_beginning(format, rate)
    async for chunk in answer:
        if chunk.text:
            yield event(transcript=chunk.text)
        if len(chunk.audio):
            yield event(data=base64.b64encode(beginning + pcm_bytes(chunk.audio)).decode())
            beginning = b""
    if answer.reply is not None:
        texts.put(audio["id"], answer.reply.text)
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
        yield failure_line(answer)
        return
    if prompt_length is not None:
        yield server_sent_event({**head, "choices": [], "usage": usage(prompt_length, answer.reply)})
    yield "data: [DONE]\n\n"
