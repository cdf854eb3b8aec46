"""Sessions, items and client events of OpenAI's Realtime API, as far as this server has them, in the shape of GA.

Types are checked here. Fields of OpenAI's API that are not listed are accepted and ignored, apart from those in
`UNSUPPORTED`. The shape of the beta is translated in `omni_jax.serve.realtime_beta`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field

from omni_jax.audio.raw import RawFormat
from omni_jax.inference.generation import GenerationConfig
from omni_jax.serve.bodies import MAX_VALUES, check_number_of_values
from omni_jax.serve.errors import RequestRefusedError, describe_validation_error
from omni_jax.serve.openai_schema import Temperature

RAW_FORMATS = {
    "audio/pcm": RawFormat(24_000),
    "audio/pcmu": RawFormat(8000, "mulaw"),
    "audio/pcma": RawFormat(8000, "alaw"),
}
"""Formats of audio in events."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "prompt": (),
    "include": ([],),
}
"""Fields of sessions and responses that this model cannot honor, and their values that change nothing."""

SMALL_MESSAGE = 1 << 16
"""Characters of JSON that are parsed at once; more are parsed in a thread."""

MAX_INSTRUCTIONS = 65_536
"""Most characters of instructions, and of a text in an item."""

MAX_PARTS = 16
"""Most parts of an item from the client."""

MAX_INPUT = 1024
"""Most items that a response brings."""

MAX_IDLE_MS = 3_600_000
"""Longest silence that can be waited for."""

MAX_NAME = 512
"""Most characters of names and ids."""

Name = Annotated[str, Field(max_length=MAX_NAME)]
"""A short text that is kept, and repeated in events."""
Text = Annotated[str, Field(max_length=MAX_INSTRUCTIONS)]

EAGERNESS_MS = {"high": 300, "medium": 500, "auto": 500, "low": 1000}
"""Silence that ends a turn under `semantic_vad`; the end of a turn is detected by silence alone."""


class Model(BaseModel):
    """A JSON object; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class AudioFormat(Model):
    """A format of audio in events."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Literal[24_000] | None = None

    @property
    def raw(self) -> RawFormat:
        """How its samples are encoded."""
        return RAW_FORMATS[self.type]

    def render(self) -> dict[str, Any]:
        """As events have it."""
        return {"type": self.type, "rate": 24_000} if self.type == "audio/pcm" else {"type": self.type}


class TurnDetection(Model):
    """How the end of a turn is found."""

    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=10_000)] = 300
    silence_duration_ms: Annotated[int, Field(ge=0, le=60_000)] = 500
    idle_timeout_ms: Annotated[int, Field(ge=1, le=MAX_IDLE_MS)] | None = None
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True

    @property
    def silence_ms(self) -> int:
        """Silence that ends a turn."""
        return self.silence_duration_ms if self.type == "server_vad" else EAGERNESS_MS[self.eagerness]

    def render(self) -> dict[str, Any]:
        """As events have it."""
        other = (
            {"eagerness"}
            if self.type == "server_vad"
            else {*TurnDetection.model_fields}
            - {
                "type",
                "eagerness",
                "create_response",
                "interrupt_response",
            }
        )
        return self.model_dump(exclude=other)


class Transcription(Model):
    """Whether and how what the user says is transcribed; the served model does it, whatever model is named."""

    model: Name | None = None
    language: Name | None = None
    prompt: Text | None = None


class InputConfig(Model):
    """Audio from the client."""

    format: AudioFormat = AudioFormat()
    transcription: Transcription | None = None
    turn_detection: TurnDetection | None = TurnDetection()


class OutputConfig(Model):
    """Audio to the client."""

    format: AudioFormat = AudioFormat()
    voice: Name | dict[Literal["id"], Name] = "alloy"
    speed: Annotated[float, Field(ge=0.25, le=1.5)] = 1.0


class AudioConfig(Model):
    """Audio in both directions."""

    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()


Modalities = Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=1)]
MaxTokens = Annotated[int, Field(ge=1, le=4096)] | Literal["inf"]


class AnswerSettings(Model):
    """What sessions and single responses can set."""

    output_modalities: Modalities = ["audio"]
    instructions: Text = ""
    max_output_tokens: MaxTokens = "inf"
    temperature: Temperature | None = None
    audio: AudioConfig = AudioConfig()

    @property
    def outputs_audio(self) -> bool:
        """Whether answers are spoken; else they are text alone."""
        return self.output_modalities == ["audio"]

    def generation_config(self) -> GenerationConfig:
        """How to decode; greedy without a temperature.

        Raises:
            ConfigError: an option is out of range.
        """
        options: dict[str, Any] = {} if self.temperature is None else {"temperature": self.temperature}
        if self.max_output_tokens != "inf":
            options["max_steps"] = self.max_output_tokens
        return GenerationConfig.from_dict(options)


class Session(AnswerSettings):
    """The settings of a connection."""

    type: Literal["realtime", "transcription"] = "realtime"
    model: Name

    def render(self) -> dict[str, Any]:
        """As events have it, without its id."""
        detection = self.audio.input.turn_detection
        audio_in = {
            "format": self.audio.input.format.render(),
            "transcription": _dump(self.audio.input.transcription),
            "noise_reduction": None,
            "turn_detection": None if detection is None else detection.render(),
        }
        if self.type == "transcription":
            return {
                "type": self.type,
                "object": "realtime.transcription_session",
                "audio": {"input": audio_in},
                "include": None,
                "expires_at": None,
            }
        output = self.audio.output
        return {
            "type": self.type,
            "object": "realtime.session",
            "model": self.model,
            "output_modalities": self.output_modalities,
            "instructions": self.instructions,
            "audio": {
                "input": audio_in,
                "output": {"format": output.format.render(), "voice": output.voice, "speed": output.speed},
            },
            "max_output_tokens": self.max_output_tokens,
            "tools": [],
            "tool_choice": "auto",
            "tracing": None,
            "truncation": "auto",
            "prompt": None,
            "include": None,
            "expires_at": None,
            # GA has none.
            **({} if self.temperature is None else {"temperature": self.temperature}),
        }


class ResponseParams(AnswerSettings):
    """The settings of one response."""

    conversation: Literal["auto", "none"] = "auto"
    input: Annotated[list[dict[str, Any]], Field(max_length=MAX_INPUT, fail_fast=True)] | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None


class Content(Model):
    """A part of an item from the client."""

    type: Literal["input_text", "input_audio", "output_text", "output_audio", "text", "audio"]
    text: Text | None = None
    audio: str | None = None
    transcript: Text | None = None


class ItemParam(Model):
    """An item from the client."""

    type: Literal["message"]
    id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Content], Field(max_length=MAX_PARTS, fail_fast=True)]


class Event(Model):
    """An event from the client."""

    type: str
    event_id: Name | None = None


class SessionUpdate(Event):
    """Change the settings."""

    session: dict[str, Any]


class AudioAppend(Event):
    """Samples in base64."""

    audio: str


class ItemCreate(Event):
    """Add an item."""

    item: ItemParam
    previous_item_id: Name | None = None


class ItemEvent(Event):
    """Delete or retrieve an item."""

    item_id: Name


class ItemTruncate(ItemEvent):
    """Cut the audio of an answer at what was played."""

    content_index: Annotated[int, Field(ge=0, lt=2**31)]
    audio_end_ms: Annotated[int, Field(ge=0, lt=2**31)]


class ResponseCreate(Event):
    """Answer."""

    response: dict[str, Any] = Field(default_factory=dict)


class ResponseCancel(Event):
    """Stop answering."""

    response_id: Name | None = None


CLIENT_EVENTS: dict[str, type[Event]] = {
    "session.update": SessionUpdate,
    "transcription_session.update": SessionUpdate,
    "input_audio_buffer.append": AudioAppend,
    "input_audio_buffer.commit": Event,
    "input_audio_buffer.clear": Event,
    "conversation.item.create": ItemCreate,
    "conversation.item.delete": ItemEvent,
    "conversation.item.retrieve": ItemEvent,
    "conversation.item.truncate": ItemTruncate,
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}
"""By type. `output_audio_buffer.clear` is of WebRTC, where the server knows what is played."""


def invalid(message: str, field: str | None = None, code: str = "invalid_value") -> RequestRefusedError:
    """An event that cannot be followed; the connection stays open."""
    return RequestRefusedError(400, message, field=field, code=code)


def parse_json(text: str) -> dict[str, Any]:
    """The JSON object of a client's message.

    Raises:
        RequestRefusedError: it is none.
    """
    try:
        check_number_of_values(text)
    except ValueError as error:
        message = f"event: expected JSON of at most {MAX_VALUES} commas, colons and brackets, found {error}"
        raise invalid(message, code="invalid_json") from None
    try:
        found = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"event: expected JSON, found {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(f"event: expected a JSON object, found {type(found).__name__}", code="invalid_json")
    return found


def repeatable(event_id: Any) -> str | None:
    """A client's id of an event as errors repeat it; None if it is none, or too long."""
    return event_id if isinstance(event_id, str) and len(event_id) <= MAX_NAME else None


def parse_event(found: dict[str, Any]) -> Event:
    """The event of a client.

    Raises:
        RequestRefusedError: there is no such event, or a field of it is invalid.
    """
    kind = found.get("type")
    if not isinstance(kind, str) or kind not in CLIENT_EVENTS:
        raise invalid(f"type: expected one of {', '.join(CLIENT_EVENTS)}, found {kind!r:.100}", "type")
    return validate(CLIENT_EVENTS[kind], {key: value for key, value in found.items() if value is not None})


AnyModel = TypeVar("AnyModel", bound=Model)
AnySettings = TypeVar("AnySettings", bound=AnswerSettings)


def validate(model: type[AnyModel], values: Any, prefix: str = "") -> AnyModel:
    """A model of some values.

    Args:
        model: the class.
        values: a JSON object.
        prefix: of field names in messages.

    Raises:
        RequestRefusedError: a field is invalid.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False)
        field, message = describe_validation_error(errors)
        missing = errors[0]["type"] == "missing"
        code = "missing_required_parameter" if missing else "invalid_value"
        raise invalid(prefix + message, prefix + field if field else None, code) from None


def update(settings: AnswerSettings, patch: dict[str, Any], model: type[AnySettings], prefix: str) -> AnySettings:
    """Settings with some fields changed; those that are absent stay, and null resets what can be off.

    Args:
        settings: before.
        patch: the client's fields, in the shape of GA.
        model: class of the result.
        prefix: of field names in messages.

    Raises:
        RequestRefusedError: a field is invalid or not supported.
    """
    for name, neutral in UNSUPPORTED.items():
        value = patch.get(name)
        if value is not None and value not in neutral:
            raise invalid(f"{prefix}{name}: not supported by this model; leave it out", prefix + name, "unsupported")
    return validate(model, _merge(settings.model_dump(), patch), prefix)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        if name in ("audio", "input", "output") and isinstance(value, dict) and isinstance(old.get(name), dict):
            merged[name] = _merge(old[name], value)
        elif value is not None or name in ("transcription", "turn_detection"):
            merged[name] = value
    return merged


def _dump(model: Model | None) -> dict[str, Any] | None:
    return None if model is None else model.model_dump()
