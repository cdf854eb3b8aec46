"""Requests and responses of OpenAI's API, as far as this server has them.

Types are checked here; values of options are checked by `GenerationConfig`. Fields of OpenAI's API that are not listed
are accepted and ignored, apart from those in `UNSUPPORTED`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omni_jax.audio.tempo import MAX_SPEED, MIN_SPEED
from omni_jax.errors import ConfigError
from omni_jax.inference.answer import Reply
from omni_jax.inference.generation import GenerationConfig
from omni_jax.serve.errors import RequestRefusedError, client_fields, error_body
from omni_jax.serve.sessions import AnswerStream
from omni_jax.serve.streaming import STREAMABLE_FORMATS
from omni_jax.tasks import Task

AUDIO_LIFETIME = 3600
"""Seconds after which an answer's audio expires, which clients require. The server stores no audio."""

Format = Literal["wav", "mp3", "flac", "ogg", "opus", "aac", "m4a", "pcm", "pcm16"]
Temperature = Annotated[float, Field(le=2)]
"""2 is the limit of OpenAI's API."""


class Body(BaseModel):
    """A JSON object; unknown fields are kept in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class SamplingOptions(Body):
    """How to decode. Those that OpenAI's API does not have are of `GenerationConfig`; clients send them as extra."""

    temperature: Temperature | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    enforce_delay: bool | None = None
    batch_parallel: bool | None = None


class FormOptions(SamplingOptions):
    """The same in a form, whose fields are texts."""

    model_config = ConfigDict(strict=False)


class TextPart(Body):
    """Text in a message."""

    type: Literal["text"]
    text: str


class InputAudio(Body):
    """A recording; its real format is recognized by its content."""

    data: str
    format: str = "wav"


class AudioPart(Body):
    """A recording in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AnswerReference(Body):
    """An answer in speech, by its id."""

    id: str


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    audio: AnswerReference | None = None
    content: (
        str
        | Annotated[list[Annotated[TextPart | AudioPart, Field(discriminator="type")]], Field(fail_fast=True)]
        | Annotated[list[dict[str, Any]], Field(fail_fast=True)]
        | None
    ) = None


class AudioOptions(Body):
    """Format of the answer's audio."""

    format: Format = "wav"
    voice: str | dict[str, Any] | None = None


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False


class AnswerRequest(SamplingOptions):
    """What the bodies of `/v1/chat/completions` and `/v1/responses` have in common."""

    model: str
    modalities: Annotated[list[Literal["text", "audio"]], Field(fail_fast=True)] | None = None
    audio: AudioOptions | None = None
    stream: bool | None = False
    truncate: bool = False

    @property
    def outputs_audio(self) -> bool:
        """Whether speech is asked for."""
        return "audio" in (self.modalities or ["text"])

    def task(self, *, takes_audio: bool) -> Task:
        """The task of an answer to a recording, or to a text."""
        if takes_audio:
            return Task.A1A2 if self.outputs_audio else Task.A1T2
        return Task.T1A2 if self.outputs_audio else Task.T1T2

    def audio_format(self) -> str:
        """The format of the answer's audio.

        Raises:
            ConfigError: it cannot be streamed, and should be.
        """
        format = self.audio.format if self.audio else "wav"
        if self.stream and self.outputs_audio and format not in STREAMABLE_FORMATS:
            message = f"audio.format: expected wav or pcm16 in a stream, found {format}"
            raise ConfigError(message, field="audio.format")
        return format

    def check_supported(self, unsupported: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse fields that would change the answer in a way this model cannot.

        Args:
            unsupported: the fields, and their values that change nothing.

        Raises:
            RequestRefusedError: one of them has another value.
        """
        for name, neutral in unsupported.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                message = f"{name}: not supported by this model; leave it out"
                raise RequestRefusedError(400, message, field=name, code="unsupported")


class ChatRequest(AnswerRequest):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class SpeechRequest(SamplingOptions):
    """Body of `/v1/audio/speech`."""

    model: str
    input: str
    voice: str | dict[str, Any] | None = None
    response_format: Format = "mp3"
    speed: Annotated[float, Field(ge=MIN_SPEED, le=MAX_SPEED, allow_inf_nan=False)] | None = None
    stream_format: Literal["audio", "sse"] | None = None


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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
"""Fields that would change the answer in a way this model cannot, and their values that change nothing."""


def generation_config(options: SamplingOptions, limit: str | None = None) -> GenerationConfig:
    """The options of a request; what is left out has its default, so decoding is greedy without a temperature.

    Args:
        options: the body of the request, or a part of it.
        limit: name of the field that limits the steps.

    Raises:
        ConfigError: an option is out of range; names it as OpenAI does.
    """
    values = {name: getattr(options, name) for name in SamplingOptions.model_fields}
    if limit is not None:
        values["max_steps"] = getattr(options, limit)
    with client_fields(max_steps=limit or "max_steps"):
        return GenerationConfig.from_dict({name: value for name, value in values.items() if value is not None})


def response_head(kind: str, model: str) -> dict[str, Any]:
    """What every chat completion and every chunk of one begins with."""
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def audio_head() -> dict[str, Any]:
    """Id of an answer's audio."""
    return {"id": f"audio_{secrets.token_hex(12)}", "expires_at": int(time.time()) + AUDIO_LIFETIME}


def finish_reason(reply: Reply) -> str:
    """`stop` or `length`, as OpenAI has it."""
    return "stop" if reply.finish_reason == "stop" else "length"


def usage(prompt_length: int, reply: Reply) -> dict[str, Any]:
    """Positions of the trunk; one decode step is one position, with up to eight tokens."""
    steps = reply.tokens.shape[1]
    return {
        "prompt_tokens": prompt_length,
        "completion_tokens": steps,
        "total_tokens": prompt_length + steps,
        "prompt_tokens_details": {"cached_tokens": reply.cached_positions},
    }


def input_output_usage(prompt_length: int, reply: Reply) -> dict[str, int]:
    """The same by the names that newer endpoints have."""
    counts = usage(prompt_length, reply)
    return {
        "input_tokens": counts["prompt_tokens"],
        "output_tokens": counts["completion_tokens"],
        "total_tokens": counts["total_tokens"],
    }


def server_sent_event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def failure_line(answer: AnswerStream) -> str:
    """The error that ends an incomplete stream, whose status has been sent already."""
    error = answer.failure()
    return server_sent_event(error_body(str(error), status=error.status, code=error.code))
