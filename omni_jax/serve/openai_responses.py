"""OpenAI's Responses API in its simplest form: one message in, text or text and speech out, whole or streamed.

Speech is asked for as in the chat, with `modalities` and `audio`, which OpenAI's own client sends as extra body. No
response is stored, so none can be continued.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from omni_jax.audio.encoding import encode
from omni_jax.audio.io import pcm_bytes
from omni_jax.errors import ConfigError
from omni_jax.inference.answer import Reply
from omni_jax.serve.bodies import JsonRoute
from omni_jax.serve.errors import RequestRefusedError, client_fields
from omni_jax.serve.openai_schema import AnswerRequest, AudioPart, Body, generation_config, input_output_usage
from omni_jax.serve.sessions import AnswerStream, Base64
from omni_jax.serve.streaming import (
    StreamedAnswer,
    check_model,
    client_of,
    service_of,
    streamed_beginning,
    whole_answer,
)

router = APIRouter(prefix="/v1", route_class=JsonRoute)

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "tools": ([],),
    "prompt": (),
    "top_logprobs": (0,),
}
"""Fields that this server cannot honor, and their values that change nothing."""


class InputTextPart(Body):
    """Text in a message."""

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Body):
    """A message of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[Annotated[InputTextPart | AudioPart, Field(discriminator="type")]], Field(fail_fast=True)]
    )


class TextFormat(Body):
    """How the text of an answer is formatted."""

    type: str


class TextOptions(Body):
    """Options of the text of an answer."""

    format: TextFormat | None = None


class ResponseRequest(AnswerRequest):
    """Body of `/v1/responses`."""

    text: TextOptions | None = None
    input: str | Annotated[list[InputMessage], Field(fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = None


@router.post("/responses", response_model=None)
async def responses(request: Request, body: ResponseRequest) -> Response:
    """Answer the last message, in text or in text and speech."""
    check_model(body.model, request)
    body.check_supported(UNSUPPORTED)
    if body.text is not None and body.text.format is not None and body.text.format.type != "text":
        message = f"text.format: expected type text, found {body.text.format.type!r}"
        raise RequestRefusedError(400, message, field="text.format", code="unsupported")
    format = body.audio_format()
    recording, text = _last_message(body.input)
    task = body.task(takes_audio=recording is not None)
    service = service_of(request)
    config = generation_config(body, "max_output_tokens")
    with client_fields(text="input"):
        prepared = await service.prepare(
            client=client_of(request),
            audio=recording,
            text=text,
            task=task,
            truncate=body.truncate,
            config=config,
        )
    answer = service.submit(prepared, "/v1/responses")
    writer = _Writer(body, format, service.omni.sample_rate, len(prepared.prompt))
    if body.stream:
        return StreamedAnswer(answer, writer.events(answer), media_type="text/event-stream")
    reply = await whole_answer(request, answer)
    return JSONResponse(await asyncio.to_thread(writer.finished, reply))


def _last_message(messages: str | list[InputMessage]) -> tuple[Base64 | None, str | None]:
    """The recording of the last message, which must be the user's, or else its text."""
    if isinstance(messages, str):
        return None, messages
    if not messages:
        raise ConfigError("input: expected at least one message, found none", field="input")
    if messages[-1].role != "user":
        raise ConfigError("input: expected the last message to be the user's", field="input")
    content = messages[-1].content
    if isinstance(content, str):
        return None, content
    recordings = [part.input_audio.data for part in content if isinstance(part, AudioPart)]
    if len(recordings) > 1:
        raise ConfigError(f"input: expected one recording in a message, found {len(recordings)}", field="input")
    if recordings:
        return Base64(recordings[0], "input_audio.data"), None
    return None, " ".join(part.text for part in content if isinstance(part, InputTextPart))


class _Writer:
    """Writes one response, whole or as events."""

    def __init__(self, body: ResponseRequest, format: str, rate: int, prompt_length: int):
        self._format, self._rate, self._prompt_length = format, rate, prompt_length
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self._numbers = itertools.count()
        self._head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "instructions": body.instructions,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": body.temperature,
            "top_p": body.top_p,
        }

    def finished(self, reply: Reply) -> dict[str, Any]:
        """The complete response."""
        content = [_text_part(reply.text)]
        if reply.audio is not None:
            data = base64.b64encode(encode(reply.audio, reply.sample_rate, self._format)).decode()
            content.append({"type": "output_audio", "data": data, "transcript": reply.text})
        complete = reply.finish_reason == "stop"
        return self._head | {
            "status": "completed" if complete else "incomplete",
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "output": [self._message("completed" if complete else "incomplete", content)],
            "usage": {
                **input_output_usage(self._prompt_length, reply),
                "input_tokens_details": {"cached_tokens": reply.cached_positions},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, type: str, **fields: Any) -> str:
        data = {"type": type, "sequence_number": next(self._numbers), **fields}
        return f"event: {type}\ndata: {json.dumps(data)}\n\n"

    async def events(self, answer: AnswerStream) -> AsyncIterator[str]:
        """The answer as it is decoded; the last event has all of it."""
        part = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        begun = self._head | {"status": "in_progress", "output": [], "usage": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **part, part=_text_part(""))
        beginning = streamed_beginning(self._format, self._rate)
        async for chunk in answer:
            if chunk.text:
                yield self._event("response.output_text.delta", **part, delta=chunk.text, logprobs=[])
            if len(chunk.audio):
                data = base64.b64encode(beginning + pcm_bytes(chunk.audio)).decode()
                yield self._event("response.audio.delta", delta=data)
                beginning = b""
        reply = answer.reply
        if reply is None:
            error = answer.failure()
            failed = {"error": {"code": "server_error", "message": str(error)}, "status": "failed", "output": []}
            yield self._event("response.failed", response=self._head | failed)
            return
        response = await asyncio.to_thread(self.finished, reply)
        (message,) = response["output"]
        if reply.audio is not None:
            yield self._event("response.audio.done")
        yield self._event("response.output_text.done", **part, text=reply.text, logprobs=[])
        yield self._event("response.content_part.done", **part, part=_text_part(reply.text))
        yield self._event("response.output_item.done", output_index=0, item=message)
        yield self._event(f"response.{response['status']}", response=response)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
