"""Live talk over a WebSocket, `/live`: speech goes up, text and speech come down, speaking again interrupts.

Up, JSON as text messages and sound as binary ones:

    {"type": "start", "sample_rate": 16000, "task": "A1A2", "options": {...}, "api_key": "..."}
        first, and again whenever something is to change; all but the type may be left out
    binary: mono, 16-bit little-endian, at that rate; what comes during an answer interrupts it
    {"type": "end"}                         the question is complete: answer it
    {"type": "text", "text": "..."}         a question in writing
    {"type": "cancel"}                      stop answering, forget what was said

Down, JSON; `turn` counts the questions of this socket from 1:

    {"type": "ready", "model": ..., "trained": ..., "sample_rate": 24000, "max_audio_seconds": ...}
    {"type": "text", "turn": 1, "text": "..."}
    {"type": "audio", "turn": 1, "data": base64 of 16-bit little-endian samples at the rate of `ready`}
    {"type": "timing", "turn": 1, "first_sound_seconds": ..., "total_seconds": ..., "real_time_factor": ...}
    {"type": "end", "turn": 1, "outcome": "done", "finish_reason": "stop"}      nothing of this turn follows
    {"type": "error", "turn": 1 or null, "message": "..."}                      the socket stays open
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import numpy as np
import pydantic
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field

from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.errors import AudioError, BusyError, ClosedError, ConfigError
from omni_jax.serve import sound
from omni_jax.serve.limits import is_known
from omni_jax.serve.sessions import Conversation, Refusal, Service, sentence
from omni_jax.tasks import Task

router = APIRouter()

ENDPOINT = "/live"
GONE = (WebSocketDisconnect, TimeoutError, RuntimeError)
"""What a client that has left, or reads nothing any more, is noticed by; Starlette's own is a RuntimeError."""
POLICY_VIOLATION = 1008
"""Close code, RFC 6455 section 7.4.1."""


class Start(BaseModel):
    """How to hear and how to answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["start"]
    sample_rate: Annotated[int, Field(ge=8_000, le=192_000)] = SAMPLE_RATE
    task: Annotated[Task | None, Field(strict=False)] = None
    options: dict[str, Any] = {}
    api_key: str = ""


class Text(BaseModel):
    """A question in writing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Sign(BaseModel):
    """The end of a question, or that it is taken back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["end", "cancel"]


Order = Annotated[Start | Text | Sign, Field(discriminator="type")]
ORDERS: pydantic.TypeAdapter[Start | Text | Sign] = pydantic.TypeAdapter(Order)


@router.websocket(ENDPOINT)
async def live(socket: WebSocket) -> None:
    """Talk until the client leaves."""
    origin, host = socket.headers.get("origin"), socket.headers.get("host")
    if origin is not None and urlsplit(origin).netloc != host:
        # A browser lets any page open a socket to anywhere and says only whose page it is.
        await socket.close(POLICY_VIOLATION, "this page is not the server's own")
        return
    await socket.accept()
    await _Talker(socket, cast(Service, socket.app.state.service)).run()


class _Talker:
    """One socket."""

    def __init__(self, socket: WebSocket, service: Service):
        self.socket, self.service = socket, service
        self.start = Start(type="start")
        self.heard = bytearray()
        self.turn = 0
        self.answering: asyncio.Task[None] | None = None
        self.conversation: Conversation | None = None
        """Of the turn, once it has begun to be answered."""

    async def run(self) -> None:
        try:
            if not await self._welcome():
                return
            while True:
                await self._take(await self.socket.receive())
        except GONE:
            pass
        finally:
            if self.answering is not None:
                self.answering.cancel()

    async def _welcome(self) -> bool:
        """Wait for the first order, which brings the key if one is needed; whether the socket may stay."""
        message = await asyncio.wait_for(self.socket.receive(), self.service.settings.idle_seconds)
        order = await self._order(message)
        keys = self.service.settings.api_keys
        if not isinstance(order, Start) or (keys and not is_known(order.api_key, keys)):
            expected = "a key of this server's" if isinstance(order, Start) else "a message of type start first"
            await self._refuse(f"expected {expected}")
            await self.socket.close(POLICY_VIOLATION, f"expected {expected}")
            return False
        self.start = order
        service = self.service
        await self._send(
            type="ready",
            model=service.name,
            trained=service.omni.trained,
            sample_rate=service.omni.config.codec.sample_rate,
            max_audio_seconds=service.max_audio_seconds,
        )
        return True

    async def _take(self, message: Any) -> None:
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        if message.get("bytes") is not None:
            await self._hear(message["bytes"])
            return
        order = await self._order(message)
        if isinstance(order, Start):
            if order.sample_rate != self.start.sample_rate:
                # What was heard so far would be read at the new rate.
                self.heard.clear()
            self.start = order
        elif isinstance(order, Text):
            await self._interrupt()
            self._answer(text=order.text)
        elif isinstance(order, Sign) and order.type == "cancel":
            self.heard.clear()
            await self._interrupt()
        elif isinstance(order, Sign):
            await self._interrupt()
            samples = np.frombuffer(bytes(self.heard), "<i2")
            self.heard.clear()
            self._answer(sound=samples, rate=self.start.sample_rate)

    async def _order(self, message: Any) -> Start | Text | Sign | None:
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        if message.get("text") is None:
            return None
        try:
            return ORDERS.validate_json(message["text"])
        except pydantic.ValidationError as error:
            await self._refuse(sentence(error.errors())[1])
            return None

    async def _hear(self, data: bytes) -> None:
        await self._interrupt()
        if len(data) % 2:
            await self._refuse(f"expected whole samples of two bytes, found {len(data)} bytes")
            return
        limit = self.service.max_samples * self.start.sample_rate // SAMPLE_RATE * 2
        if len(self.heard) + len(data) > limit:
            self.heard.clear()
            seconds = self.service.max_audio_seconds
            await self._refuse(f"expected a question of at most {seconds:g} s; it is forgotten, say it again")
            return
        self.heard += data

    async def _interrupt(self) -> None:
        """Stop the answer that is being made, if there is one."""
        answering, self.answering = self.answering, None
        if answering is not None and not answering.done():
            answering.cancel()
            await asyncio.wait([answering])
            if answering.cancelled():
                if self.conversation is None:
                    # One that has begun counts itself.
                    self.service.count(ENDPOINT, "cancelled")
                await self._send(type="end", turn=self.turn, outcome="cancelled", finish_reason=None)

    def _answer(self, **question: Any) -> None:
        self.turn += 1
        self.conversation = None
        self.answering = asyncio.create_task(self._speak(self.turn, question))

    async def _speak(self, turn: int, question: dict[str, Any]) -> None:
        """Answer one question; whatever is wrong with it the client is told, and may go on."""
        outcome, finish = "refused", None
        try:
            request = await self.service.prepare(**question, task=self.start.task, options=self.start.options)
            conversation = self.conversation = self.service.ask(request, ENDPOINT)
            try:
                await self._parts(turn, conversation)
            finally:
                conversation.close()
            if conversation.whole is None:
                raise conversation.refusal()
            outcome, finish = "done", conversation.whole.finish_reason
        except (AudioError, ConfigError, BusyError, ClosedError) as error:
            outcome = "busy" if isinstance(error, (BusyError, ClosedError)) else outcome
            self.service.count(ENDPOINT, outcome)
            await self._refuse(str(error), turn)
        except Refusal as refusal:
            outcome = "failed" if refusal.status >= 500 else outcome
            await self._refuse(refusal.message, turn)
        except GONE:
            # Whoever reads nothing is let go; `run` notices.
            with contextlib.suppress(*GONE):
                await asyncio.wait_for(self.socket.close(), 1)
            return
        with contextlib.suppress(*GONE):
            await self._send(type="end", turn=turn, outcome=outcome, finish_reason=finish)

    async def _parts(self, turn: int, conversation: Conversation) -> None:
        told = False
        async for part in conversation:
            if part.text:
                await self._send(type="text", turn=turn, text=part.text)
            if len(part.audio):
                data = base64.b64encode(sound.pcm(part.audio)).decode()
                await self._send(type="audio", turn=turn, data=data)
            if conversation.first_sound is not None and not told:
                told = True
                await self._send(type="timing", turn=turn, first_sound_seconds=round(conversation.first_sound, 4))
            if part.reply is not None:
                timing = part.reply.timing
                await self._send(
                    type="timing",
                    turn=turn,
                    first_sound_seconds=conversation.first_sound,
                    total_seconds=timing.total,
                    real_time_factor=timing.real_time_factor,
                )

    async def _refuse(self, message: str, turn: int | None = None) -> None:
        await self._send(type="error", turn=turn, message=message)

    async def _send(self, **message: Any) -> None:
        await asyncio.wait_for(self.socket.send_text(json.dumps(message)), self.service.settings.idle_seconds)
