"""`/live`: conversation over a WebSocket. Audio is sent up while it is spoken; speaking again interrupts the answer.

From the client, JSON in text messages and audio in binary messages:

    {"type": "start", "sample_rate": 16000, "task": "A1A2", "options": {...}, "api_key": "..."}
        the first message; sent again, it changes these settings. Every field but the type is optional; `options` are
        those of `omni_jax.GenerationConfig`; with `"transcript": true` the server also sends transcripts, with
        `"truncate": true` it answers the beginning of a recording that is too long
    binary: mono 16-bit little-endian samples at that rate, in pieces of any size; during an answer they interrupt it
    {"type": "end"}                         the recording is complete: answer it
    {"type": "file", "data": base64}        answer a recording, a file of any format
    {"type": "text", "text": "..."}         answer a text
    {"type": "cancel"}                      stop the answer and discard the recording

From the server, JSON; `turn` counts the requests of a connection from 1:

    {"type": "ready", "model": ..., "trained": ..., "sample_rate": 24000, "max_audio_seconds": ...,
     "max_file_bytes": ...}
    {"type": "state", "state": "ready"}     or `warming up`, which `ready` follows; questions are answered after that
    {"type": "transcript", "turn": 1, "text": "..."}     of the question, if asked for; before or after the answer
    {"type": "text", "turn": 1, "text": "..."}
    {"type": "audio", "turn": 1, "data": base64 of 16-bit little-endian samples at the rate of `ready`}
    {"type": "timing", "turn": 1, "first_audio_seconds": ..., "total_seconds": ..., "real_time_factor": ...}
    {"type": "end", "turn": 1, "outcome": "done", "finish_reason": "stop"}      the last message of the turn
    {"type": "error", "turn": 1 or null, "message": "...", "code": ...}         the connection stays open

Outcomes are `done`, `cancelled`, `refused`, `busy` and `failed`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from typing import Annotated, Any, Literal, cast

import numpy as np
import pydantic
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field

from omni_jax.audio.io import SAMPLE_RATE, pcm_bytes
from omni_jax.errors import ConfigError, OmniError
from omni_jax.inference.engine import PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.serve.bodies import MAX_VALUES, check_number_of_values
from omni_jax.serve.budget import Share
from omni_jax.serve.errors import MAX_MESSAGE, describe_validation_error, kind_of
from omni_jax.serve.limits import POLICY_VIOLATION, is_known_key
from omni_jax.serve.sessions import AnswerStream, Base64, Service
from omni_jax.tasks import Task

router = APIRouter()

ENDPOINT = "/live"

DISCONNECTED = (WebSocketDisconnect, TimeoutError, RuntimeError)
"""What sending and receiving raise once a client has left or reads nothing; Starlette's own is a RuntimeError."""

SAMPLE_BYTES = 2

MESSAGE_BYTES = 1024
"""More than a message has around its data."""

SMALL_MESSAGE = 1 << 16
"""Characters of JSON that are parsed at once; more are parsed in a thread."""


class StartMessage(BaseModel):
    """Settings of the connection."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["start"]
    sample_rate: Annotated[int, Field(ge=8_000, le=192_000)] = SAMPLE_RATE
    task: Annotated[Task | None, Field(strict=False)] = None
    options: dict[str, Any] = {}
    transcript: bool = False
    truncate: bool = False
    api_key: str = ""


class TextMessage(BaseModel):
    """A request in text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class FileMessage(BaseModel):
    """A request in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["file"]
    data: str


class ControlMessage(BaseModel):
    """The end of a recording, or the cancellation of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["end", "cancel"]


ClientMessage = StartMessage | TextMessage | FileMessage | ControlMessage
MESSAGES: pydantic.TypeAdapter[ClientMessage] = pydantic.TypeAdapter(
    Annotated[ClientMessage, Field(discriminator="type")]
)


@router.websocket(ENDPOINT)
async def live(socket: WebSocket) -> None:
    """Answer requests until the client disconnects."""
    await socket.accept()
    await LiveSession(socket, cast(Service, socket.app.state.service)).run()


class LiveSession:
    """One connection.

    Attributes:
        settings: of the last start message.
        recording: 16-bit samples received since the last request.
        turn: requests so far.
        task: answers the current request.
        answer: of the current request, once it has been queued.
        waiting: announces that the model is ready.
        transcribing: transcribe questions.
    """

    def __init__(self, socket: WebSocket, service: Service):
        self.socket, self.service = socket, service
        self.settings = StartMessage(type="start")
        self.recording = bytearray()
        self.client = service.client_of(socket.client)
        self._recorded = Share(service.bodies, self.client)
        self.turn = 0
        self.task: asyncio.Task[None] | None = None
        self.answer: AnswerStream | None = None
        self.waiting: asyncio.Task[None] | None = None
        self.transcribing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Handle messages until the client disconnects."""
        try:
            if not await self._handshake():
                return
            while True:
                await self._handle(await self.socket.receive())
                # Others have their turn between two messages, however many have arrived.
                await asyncio.sleep(0)
        except DISCONNECTED:
            pass
        finally:
            self._recorded.give_back()
            for task in (self.task, self.waiting, *self.transcribing):
                if task is not None:
                    task.cancel()

    async def _handshake(self) -> bool:
        """Wait for the first message, which has the key if one is needed; False if the connection was closed."""
        async with asyncio.timeout(self.service.settings.idle_timeout):
            received = await self.socket.receive()
        message = await self._parse(received)
        keys = self.service.settings.api_keys
        if not isinstance(message, StartMessage) or (keys and not is_known_key(message.api_key, keys)):
            expected = "a valid API key" if isinstance(message, StartMessage) else "a message of type start first"
            await self._send_error(f"expected {expected}", code="invalid_api_key" if keys else None)
            await self.socket.close(POLICY_VIOLATION, f"expected {expected}")
            return False
        self.settings = message
        service = self.service
        self.client = service.client_of(self.socket.client, message.api_key if keys else "")
        self._recorded = Share(service.bodies, self.client)
        # From now on messages may be large.
        if trust := self.socket.scope.get("state", {}).get("trust"):
            trust(self.client)
        await self._send(
            type="ready",
            model=service.name,
            trained=service.omni.trained,
            sample_rate=service.omni.sample_rate,
            max_audio_seconds=self._max_seconds,
            max_file_bytes=service.settings.max_body_bytes * 3 // 4 - MESSAGE_BYTES,
        )
        # Once: a model that becomes ready while this is sent is announced, too.
        state = service.state
        await self._send(type="state", state=state)
        if state == "warming up":
            self.waiting = asyncio.create_task(self._announce_ready())
        return True

    @property
    def _max_seconds(self) -> float:
        """Longest recording with the current settings, all of which is kept until it is answered."""
        most = self.service.settings.max_body_bytes / (SAMPLE_BYTES * self.settings.sample_rate)
        return min(self.service.max_samples(self.settings.task) / SAMPLE_RATE, most)

    async def _announce_ready(self) -> None:
        await self.service.wait_until_ready()
        with contextlib.suppress(*DISCONNECTED):
            await self._send(type="state", state=self.service.state)

    async def _handle(self, received: Any) -> None:
        if received.get("bytes") is not None:
            await self._add_audio(received["bytes"])
            return
        message = await self._parse(received)
        if isinstance(message, StartMessage):
            if message.sample_rate != self.settings.sample_rate:
                # The samples so far have the old rate.
                self._discard_recording()
            self.settings = message
        elif isinstance(message, TextMessage):
            await self._interrupt()
            self._begin_turn(self._keep(), text=message.text)
        elif isinstance(message, FileMessage):
            self._discard_recording()
            await self._interrupt()
            self._begin_turn(self._keep(), file=message.data)
        elif isinstance(message, ControlMessage) and message.type == "cancel":
            self._discard_recording()
            await self._interrupt()
        elif isinstance(message, ControlMessage):
            await self._interrupt()
            # A message may end within a sample; the next one continues it.
            samples = np.frombuffer(bytes(self.recording[: len(self.recording) // 2 * 2]), "<i2")
            self.recording.clear()
            held, self._recorded = self._recorded, Share(self.service.bodies, self.client)
            self._begin_turn(held, audio=samples, sample_rate=self.settings.sample_rate)

    async def _parse(self, received: Any) -> ClientMessage | None:
        """The message, or None after an error has been sent."""
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        if received.get("text") is None:
            return None
        text = received["text"]
        try:
            check_number_of_values(text)
        except ValueError as error:
            await self._send_error(f"expected JSON of at most {MAX_VALUES} commas, colons and brackets, found {error}")
            return None
        try:
            if len(text) <= SMALL_MESSAGE:
                message = MESSAGES.validate_json(text)
            else:
                message = await asyncio.to_thread(MESSAGES.validate_json, text)
            if isinstance(message, StartMessage):
                GenerationConfig.from_dict(message.options)
            return message
        except pydantic.ValidationError as error:
            await self._send_error(describe_validation_error(error.errors())[1])
        except ConfigError as error:
            await self._send_error(str(error))
        return None

    async def _add_audio(self, data: bytes) -> None:
        await self._interrupt()
        seconds = self._max_seconds
        if len(self.recording) + len(data) > seconds * self.settings.sample_rate * SAMPLE_BYTES:
            self._discard_recording()
            message = f"expected a recording of at most {seconds:g} s; it was discarded, speak again"
            await self._send_error(message, code="audio_too_long")
            return
        if not self._recorded.take(len(data)):
            self._discard_recording()
            message = "too many recordings at once; it was discarded, try again later"
            await self._send_error(message, code="busy")
            return
        self.recording += data

    def _discard_recording(self) -> None:
        self.recording.clear()
        self._recorded.give_back()

    async def _interrupt(self) -> None:
        """Stop the current answer, if there is one."""
        task, self.task = self.task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])
            if task.cancelled():
                if self.answer is None:
                    # An answer that has been queued counts itself.
                    self.service.metrics.count(ENDPOINT, "cancelled")
                await self._send(type="end", turn=self.turn, outcome="cancelled", finish_reason=None)

    def _keep(self) -> Share:
        """The share of the message that is handled."""
        keep = self.socket.scope.get("state", {}).get("keep")
        return keep() if keep else Share(self.service.bodies, self.client)

    def _begin_turn(self, held: Share, **inputs: Any) -> None:
        """Begin to answer a request, whose share is held until it is answered."""
        self.turn += 1
        self.answer = None
        self.task = asyncio.create_task(self._run_turn(self.turn, inputs))
        self.task.add_done_callback(lambda _: held.give_back())

    async def _run_turn(self, turn: int, inputs: dict[str, Any]) -> None:
        """Answer one request; an error is sent to the client, which may continue."""
        outcome, finish_reason = "done", None
        try:
            try:
                finish_reason = await self._answer(turn, inputs)
            except OmniError as error:
                outcome = kind_of(error).outcome
                self.service.metrics.count_error(ENDPOINT, error)
                await self._send_error(str(error), turn, kind_of(error).code)
            await self._send(type="end", turn=turn, outcome=outcome, finish_reason=finish_reason)
        except DISCONNECTED:
            # Which ends `run`, too.
            pass

    async def _answer(self, turn: int, inputs: dict[str, Any]) -> str:
        """Send an answer; its finish reason."""
        config = GenerationConfig.from_dict(self.settings.options)
        if "file" in inputs:
            inputs = {"audio": Base64(inputs["file"], "data")}
        request = await self.service.prepare(
            client=self.client, **inputs, task=self.settings.task, truncate=self.settings.truncate, config=config
        )
        if self.waiting is not None:
            # The client is told first; a turn that is interrupted does not end the announcement.
            await asyncio.shield(self.waiting)
        answer = self.answer = self.service.submit(request, ENDPOINT)
        if self.settings.transcript and request.task.takes_audio:
            task = asyncio.create_task(self._transcribe(turn, request))
            self.transcribing.add(task)
            task.add_done_callback(self.transcribing.discard)
        try:
            await self._send_chunks(turn, answer)
        finally:
            answer.close()
        if answer.reply is None:
            raise answer.failure()
        return answer.reply.finish_reason

    async def _transcribe(self, turn: int, request: PreparedRequest) -> None:
        """Send the transcript of a question, unless the server has more to do than it can."""
        with contextlib.suppress(OmniError, *DISCONNECTED):
            answer = self.service.submit(self.service.omni.to_transcription(request), ENDPOINT)
            try:
                reply = await answer.wait()
            finally:
                answer.close()
            await self._send(type="transcript", turn=turn, text=reply.text)

    async def _send_chunks(self, turn: int, answer: AnswerStream) -> None:
        timing_sent = False
        async for chunk in answer:
            if chunk.text:
                await self._send(type="text", turn=turn, text=chunk.text)
            if len(chunk.audio):
                await self._send(type="audio", turn=turn, data=base64.b64encode(pcm_bytes(chunk.audio)).decode())
            if answer.first_audio is not None and not timing_sent:
                timing_sent = True
                await self._send(type="timing", turn=turn, first_audio_seconds=round(answer.first_audio, 4))
            if chunk.reply is not None:
                await self._send(
                    type="timing",
                    turn=turn,
                    first_audio_seconds=answer.first_audio,
                    total_seconds=chunk.reply.timing.total,
                    real_time_factor=chunk.reply.timing.real_time_factor,
                )

    async def _send_error(self, message: str, turn: int | None = None, code: str | None = None) -> None:
        await self._send(type="error", turn=turn, message=message[:MAX_MESSAGE], code=code)

    async def _send(self, **message: Any) -> None:
        await self.socket.send_text(json.dumps(message))
