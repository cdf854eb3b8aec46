"""A client of `/v1/realtime` that checks each event against the types of OpenAI's package."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydantic
import soxr
from openai.types.beta.realtime import RealtimeServerEvent as BetaServerEvent
from openai.types.realtime import RealtimeServerEvent
from websockets.sync.client import ClientConnection, connect

import omni_jax
from omni_jax.audio import io as audio_io

RATE = 24_000
QUESTIONS = Path(omni_jax.__file__).parent / "assets" / "questions"
SESSION_FIELDS = {"id", "object", "expires_at", "temperature"}
"""Of sessions: OpenAI's server sends them, and its package has them in other types."""

Event = dict[str, Any]


@cache
def event_types(*, beta: bool) -> dict[str, Any]:
    """The class of each event from the server, by its type."""
    union = get_args(BetaServerEvent if beta else RealtimeServerEvent)[0]
    return {get_args(event.model_fields["type"].annotation)[0]: event for event in get_args(union)}


def check_event(event: Event, *, beta: bool = False) -> None:
    """An event has the fields that OpenAI's package expects, and no others."""
    if event["type"].startswith("transcription_session."):
        return
    if beta and "model" in event.get("session", {}):
        # The beta's package knows the names of OpenAI's models only.
        event = {**event, "session": event["session"] | {"model": "gpt-4o-realtime-preview"}}
    found = event_types(beta=beta)[event["type"]].model_validate(event)
    _check_no_extra_fields(found, event["type"])


def _check_no_extra_fields(value: Any, where: str) -> None:
    if isinstance(value, pydantic.BaseModel):
        assert not {*(value.model_extra or {})} - SESSION_FIELDS, where
        for name in value.model_fields_set & {*type(value).model_fields}:
            _check_no_extra_fields(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for element in value:
            _check_no_extra_fields(element, where)


class Client:
    """A connection; every event that it receives is checked."""

    def __init__(self, url: str, *, query: str = "model=small", beta: bool = False, **options: Any):
        headers = options.pop("additional_headers", {}) | ({"OpenAI-Beta": "realtime=v1"} if beta else {})
        self.beta = beta
        self._closing = contextlib.ExitStack()
        self.socket: ClientConnection = self._closing.enter_context(
            connect(f"{url.replace('http', 'ws')}/v1/realtime?{query}", additional_headers=headers, **options)
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def receive(self) -> Event:
        event: Event = json.loads(self.socket.recv(timeout=60))
        check_event(event, beta=self.beta)
        return event

    def until(self, type: str, true: Callable[[Event], bool] = lambda event: True) -> list[Event]:
        """Events up to and including one of a type."""
        events = []
        while True:
            events.append(self.receive())
            if events[-1]["type"] == type and true(events[-1]):
                return events

    def last(self, type: str) -> Event:
        return self.until(type)[-1]

    def error(self, type: str, **fields: Any) -> Event:
        """The error that an event is answered with."""
        self.send(type, event_id="mine", **fields)
        event = self.receive()
        assert event["type"] == "error", event
        assert event["error"]["event_id"] == "mine"
        error: Event = event["error"]
        return error

    def update(self, **session: Any) -> Event:
        """Change the session."""
        self.send("session.update", session=session if self.beta else {"type": "realtime", **session})
        updated: Event = self.last("session.updated")["session"]
        return updated

    def append(self, data: bytes, piece: int = 960) -> None:
        """Send samples."""
        for start in range(0, len(data), piece):
            self.send("input_audio_buffer.append", audio=base64.b64encode(data[start : start + piece]).decode())

    def add_text(self, text: str, role: str = "user", **fields: Any) -> Event:
        """Add a message, and return its item."""
        kind = "output_text" if role == "assistant" else "input_text"
        item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **fields}
        self.send("conversation.item.create", item=item)
        added: Event = self.last("conversation.item.done")["item"]
        return added


def joined(events: list[Event], type: str) -> str:
    """The text of the deltas of a type."""
    return "".join(event["delta"] for event in events if event["type"] == f"{type}.delta")


def audio_bytes(events: list[Event], type: str = "response.output_audio") -> bytes:
    return b"".join(base64.b64decode(event["delta"]) for event in events if event["type"] == f"{type}.delta")


def pcm(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i2").astype(np.int16)


def question(name: str, rate: int = RATE) -> np.ndarray:
    """A recorded question as int16 samples."""
    samples = audio_io.read_audio(QUESTIONS / f"{name}.wav")
    return audio_io.to_pcm16(soxr.resample(samples, audio_io.SAMPLE_RATE, rate))
