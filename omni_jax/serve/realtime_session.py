"""A Realtime session: what each event of a client does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.errors import ConfigError, OmniError
from omni_jax.inference.engine import PreparedRequest
from omni_jax.serve.budget import Share
from omni_jax.serve.errors import RequestRefusedError
from omni_jax.serve.realtime_beta import from_beta
from omni_jax.serve.realtime_conversation import Context, Conversation, Item, Part, make_item, new_id
from omni_jax.serve.realtime_input import InputBuffer, TurnEdge
from omni_jax.serve.realtime_response import Response, Send, describe_error, transcribe
from omni_jax.serve.realtime_schema import (
    SMALL_MESSAGE,
    AudioAppend,
    Event,
    ItemCreate,
    ItemEvent,
    ItemParam,
    ItemTruncate,
    ResponseCancel,
    ResponseCreate,
    ResponseParams,
    Session,
    SessionUpdate,
    invalid,
    update,
    validate,
)
from omni_jax.serve.sessions import Base64, Service
from omni_jax.serve.streaming import check_language
from omni_jax.tasks import Task

MIN_COMMIT_MS = 100
"""Shortest recording that a client may commit."""
MAX_CONVERSATION_BYTES = 8 << 20
"""Most bytes of texts and audio that a conversation keeps."""
MAX_PENDING = 8
"""Most responses, and most transcriptions, that a session has in progress."""


def update_session(service: Service, settings: Session, patch: dict[str, Any]) -> Session:
    """Settings of a session with some fields changed, in the shape of GA.

    Raises:
        RequestRefusedError: a field is invalid, or this model cannot honor it.
    """
    found = update(settings, patch, Session, "session.")
    if found.model not in service.names:
        known = " or ".join(map(repr, service.names))
        raise invalid(f"session.model: expected {known}, found {found.model!r}", "session.model", "model_not_found")
    transcription = found.audio.input.transcription
    if transcription is not None and transcription.language is not None:
        check_language(transcription.language, service, "session.audio.input.transcription.language")
    return found


class RealtimeSession:
    """The state of a connection.

    Attributes:
        id: of the session.
        settings: as the client has set them.
        conversation: its items.
    """

    def __init__(self, service: Service, client: str | None, settings: Session, send: Send):
        """Begin a session.

        Args:
            service: answers.
            client: see `Service.client_of`.
            settings: how it begins.
            send: sends an event to the client.
        """
        self.id = new_id("sess")
        self.settings = settings
        self.conversation = Conversation(min(MAX_CONVERSATION_BYTES, service.settings.max_body_bytes))
        self._service, self._client, self._send = service, client, send
        self._held = Share(service.bodies, client)
        self._input = InputBuffer(settings.audio.input)
        self._turn: tuple[str, float] | None = None
        """Id and beginning of the turn that is being spoken."""
        self._responses: dict[str, Response] = {}
        self._spoken: Response | None = None
        """The last response of the conversation, whose audio may still be played."""
        self._transcribing: set[asyncio.Task[None]] = set()
        self._idle: asyncio.Task[None] | None = None
        self._remembering: asyncio.Task[None] | None = None
        self._closed = False
        # A client's event and an idle time-out are not handled at once.
        self._lock = asyncio.Lock()

    def render(self) -> dict[str, Any]:
        """The session as events have it."""
        return {"id": self.id, **self.settings.render()}

    async def open(self) -> None:
        """Tell the client how the session begins."""
        await self._send("session.created", session=self.render())
        await self._send("conversation.created", conversation=self._conversation_object())

    def _conversation_object(self) -> dict[str, Any]:
        return {"id": self.conversation.id, "object": "realtime.conversation"}

    async def handle(self, event: Event) -> None:
        """Do what a client's event asks for; what is wrong with it is sent as an error."""
        async with self._lock:
            try:
                await HANDLERS[event.type](self, event)
                await self._account()
            except OmniError as error:
                await self.send_error(error, event.event_id)

    async def _account(self) -> None:
        """Count what the session holds for its client.

        Raises:
            RequestRefusedError: all that the client holds is too much, and the input was discarded.
        """
        if self._hold():
            return
        self.conversation.drop_audio()
        if not self._hold():
            await self._clear_input()
            # What responses in progress hold stays.
            self._hold()
            raise RequestRefusedError(429, "too much audio at once; it was discarded, speak again", code="busy")

    def _hold(self) -> bool:
        """Count what the session holds now, items of responses in progress included; False if it is too much."""
        items = {*self.conversation}.union(*(response.items for response in self._responses.values()))
        return self._held.change(self._input.num_bytes + sum(item.num_bytes for item in items))

    async def send_error(self, error: OmniError, event_id: str | None = None) -> None:
        """Tell the client what is wrong."""
        await self._send("error", error={**describe_error(error), "event_id": event_id})

    def close(self) -> None:
        """Free all that the session holds; the client is gone."""
        self._closed = True
        self._held.give_back()
        for response in self._responses.values():
            response.abandon()
        self._stop_remembering()
        for task in (self._idle, *self._transcribing):
            if task is not None:
                task.cancel()
        # They refer to this session: as a cycle all would keep their audio until garbage collection.
        self._responses.clear()
        self._spoken = self._idle = None

    # Settings

    async def _update(self, event: SessionUpdate) -> None:
        patch = from_beta(event.session)
        if event.type == "transcription_session.update":
            patch["type"] = "transcription"
        self.settings = update_session(self._service, self.settings, patch)
        self._input.configure(self.settings.audio.input)
        if not self._input.speaking:
            self._turn = None
        self._watch_idle()
        await self._send("session.updated", session=self.render())

    # Audio from the client

    async def _append(self, event: AudioAppend) -> None:
        encoded = Base64(event.audio, "audio")
        try:
            if len(event.audio) <= SMALL_MESSAGE:
                data = bytes(encoded.decode() if event.audio else b"")
            else:
                data = bytes(await asyncio.to_thread(encoded.decode))
        except ConfigError as error:
            raise invalid(str(error), "audio") from None
        for piece in self._input.slices(data):
            for edge in self._input.push(piece):
                await (self._start_turn(edge) if edge.kind == "started" else self._stop_turn(edge))
            await self._check_length()
            # Other clients are served in between.
            await asyncio.sleep(0)

    async def _check_length(self) -> None:
        limits = self._service.settings
        task = Task.A1T1 if self.settings.type == "transcription" else Task.A1A2
        most = min(self._service.max_samples(task) / SAMPLE_RATE, self._input.format.seconds(limits.max_body_bytes))
        if self._input.seconds <= most:
            return
        await self._clear_input()
        message = f"audio: expected at most {most:g} s between two commits; it was discarded, speak again"
        raise invalid(message, "audio", "audio_too_long")

    async def _start_turn(self, edge: TurnEdge) -> None:
        self._turn = (new_id("item"), edge.seconds)
        self._stop_idle()
        await self._send(
            "input_audio_buffer.speech_started", audio_start_ms=round(edge.seconds * 1000), item_id=self._turn[0]
        )
        detection = self.settings.audio.input.turn_detection
        if detection is not None and detection.interrupt_response and self.settings.type == "realtime":
            await self._interrupt()

    async def _interrupt(self) -> None:
        """Stop the response of the conversation, and cut it at what has been played."""
        spoken = self._spoken
        if spoken is None:
            return
        played, playing = spoken.clock.played_ms, spoken.clock.remaining > 0
        await spoken.cancel("turn_detected")
        item = spoken.item
        if playing and item is not None and item in self.conversation and item.audio is not None:
            await self._truncate(item.id, 0, min(played, int(item.audio.seconds * 1000)))
        self._spoken = None

    async def _stop_turn(self, edge: TurnEdge) -> None:
        if self._turn is None:
            return
        (item_id, start), self._turn = self._turn, None
        await self._send("input_audio_buffer.speech_stopped", audio_end_ms=round(edge.seconds * 1000), item_id=item_id)
        item = await self._commit(self._input.take(start, edge.seconds), item_id)
        detection = self.settings.audio.input.turn_detection
        if detection is not None and detection.create_response and self.settings.type == "realtime":
            try:
                await self._respond(self._params({}), list(self.conversation), asked_for=False)
            except OmniError as error:
                # The samples that follow are taken all the same.
                await self.send_error(error)
                await self._transcribe(item)
        else:
            await self._transcribe(item)

    async def _commit_all(self, _: Event) -> None:
        found = self._input.seconds * 1000
        if found < MIN_COMMIT_MS:
            raise invalid(
                f"expected at least {MIN_COMMIT_MS} ms of audio to commit, found {found:.2f} ms",
                code="input_audio_buffer_commit_empty",
            )
        item_id = self._turn[0] if self._turn else new_id("item")
        self._turn = None
        item = await self._commit(self._input.take_all(), item_id)
        if self._transcription_wanted:
            await self._transcribe(item)

    async def _commit(self, data: bytes, item_id: str) -> Item:
        """Make a message of the user of audio."""
        format = self._input.format
        part = Part("input_audio", None, bytearray(data), format, format.seconds(len(data)))
        item = Item("user", [part], item_id)
        before = self.conversation.add(item)
        await self._send("input_audio_buffer.committed", previous_item_id=before, item_id=item.id)
        await self._announce(item, before)
        return item

    @property
    def _transcription_wanted(self) -> bool:
        return self.settings.type == "transcription" or self.settings.audio.input.transcription is not None

    async def _transcribe(self, item: Item, prepared: PreparedRequest | None = None) -> None:
        """Begin to transcribe the recording of an item, if the client or the history needs it.

        Args:
            item: a message of the user.
            prepared: a request with its recording, if there is one already.
        """
        part, wanted = item.audio, self._transcription_wanted
        known = part is None or part.type != "input_audio" or part.text is not None or part.transcription is not None
        if part is None or known or not (wanted or self._service.remembers):
            return
        if len(self._transcribing) >= MAX_PENDING:
            # The client's next events wait too, which is back-pressure.
            await asyncio.wait(self._transcribing, return_when=asyncio.FIRST_COMPLETED)
        send = self._send if wanted else None
        task = part.transcription = asyncio.create_task(transcribe(self._service, self._client, send, item, prepared))
        self._transcribing.add(task)
        task.add_done_callback(self._transcribing.discard)

    async def _announce(self, item: Item, before: str | None) -> None:
        rendered = item.render()
        await self._send("conversation.item.added", previous_item_id=before, item=rendered)
        await self._send("conversation.item.done", previous_item_id=before, item=rendered)

    async def _clear(self, _: Event) -> None:
        await self._clear_input()

    async def _clear_input(self) -> None:
        self._turn = None
        self._input.clear()
        await self._send("input_audio_buffer.cleared")

    # Items

    async def _create_item(self, event: ItemCreate) -> None:
        item = await self._make_item(event.item)
        await self._announce(item, self.conversation.add(item, event.previous_item_id))

    async def _make_item(self, param: ItemParam, prefix: str = "item") -> Item:
        """As `make_item`, in a thread if its recordings are large."""
        if sum(len(content.audio or "") for content in param.content) <= SMALL_MESSAGE:
            return make_item(param, self._input.format, prefix)
        return await asyncio.to_thread(make_item, param, self._input.format, prefix)

    async def _delete_item(self, event: ItemEvent) -> None:
        self.conversation.delete(event.item_id)
        await self._send("conversation.item.deleted", item_id=event.item_id)

    async def _retrieve_item(self, event: ItemEvent) -> None:
        item = self.conversation.find(event.item_id, "retrieve")

        def render() -> dict[str, Any]:
            return {"item": item.render(with_audio=True)}

        # Of a few bytes it is soon done.
        large = render if item.num_bytes > SMALL_MESSAGE else None
        await self._send("conversation.item.retrieved", large=large, **({} if large else render()))

    async def _truncate_item(self, event: ItemTruncate) -> None:
        await self._truncate(event.item_id, event.content_index, event.audio_end_ms)

    async def _truncate(self, item_id: str, content_index: int, audio_end_ms: int) -> None:
        self.conversation.truncate(item_id, content_index, audio_end_ms)
        fields = {"item_id": item_id, "content_index": content_index, "audio_end_ms": audio_end_ms}
        await self._send("conversation.item.truncated", **fields)
        self._remember()

    def _remember(self) -> None:
        """Have the keys and values of the conversation computed, so that the next turn prefills only what is new."""
        if self._service.remembers and not self._closed:
            self._stop_remembering()
            self._remembering = asyncio.create_task(self._remember_items(list(self.conversation)))

    async def _remember_items(self, items: list[Item]) -> None:
        system, turns = await Context(None, items).history(self.settings.instructions)
        await self._service.remember(system, turns)

    def _stop_remembering(self) -> None:
        remembering, self._remembering = self._remembering, None
        if remembering is not None:
            remembering.cancel()

    # Responses

    def _params(self, patch: dict[str, Any]) -> ResponseParams:
        return update(self.settings, from_beta(patch), ResponseParams, "response.")

    async def _create_response(self, event: ResponseCreate) -> None:
        if self.settings.type == "transcription":
            raise invalid("response.create: a transcription session has no responses")
        params = self._params(event.response)
        await self._respond(params, await self._context(params), asked_for=True)

    async def _context(self, params: ResponseParams) -> list[Item]:
        """The items before an answer: those that a response brings, or those of the conversation."""
        if params.input is None:
            return list(self.conversation)
        items = []
        for index, value in enumerate(params.input):
            where = f"response.input.{index}."
            if value.get("type") == "item_reference":
                items.append(self.conversation.find(str(value.get("id")), "reference"))
            else:
                items.append(await self._make_item(validate(ItemParam, value, where), where.rstrip(".")))
        return items

    async def _respond(self, params: ResponseParams, context: list[Item], *, asked_for: bool) -> None:
        """Begin a response; for `asked_for` see `Response`.

        Raises:
            RequestRefusedError: another one of the conversation goes on, too many go on, or it brings too much.
        """
        in_conversation = params.conversation == "auto"
        active = next((response for response in self._responses.values() if response.conversation is not None), None)
        if in_conversation and active is not None:
            raise invalid(
                f"expected no response of the conversation in progress, found {active.id}",
                code="conversation_already_has_active_response",
            )
        if len(self._responses) >= MAX_PENDING:
            raise RequestRefusedError(429, f"expected at most {MAX_PENDING} responses in progress", code="busy")
        if not self._held.take(sum(item.num_bytes for item in {*context} - {*self.conversation})):
            raise RequestRefusedError(429, "too much audio at once; try again later", code="busy")
        self._stop_idle()
        conversation = self.conversation if in_conversation else None
        response = Response(
            self._service,
            self._client,
            self._send,
            params,
            Context.of(context),
            conversation,
            self._transcribe,
            asked_for=asked_for,
        )
        self._responses[response.id] = response
        if in_conversation:
            self._spoken = response
        await response.start(self._response_done)

    def _response_done(self, response: Response) -> None:
        self._responses.pop(response.id, None)
        if not self._closed:
            self._hold()
        if response.conversation is not None:
            self._remember()
        if response is self._spoken and response.item is not None:
            # After an answer of nothing the user is waited for without end.
            self._watch_idle()

    async def _cancel_response(self, event: ResponseCancel) -> None:
        response_id = event.response_id
        chosen = [
            response
            for response in self._responses.values()
            if (response.id == response_id if response_id else response.conversation is not None)
        ]
        if not chosen:
            # LiveKit's client knows this error by how its message begins.
            raise invalid("Cancellation failed: no active response found", code="response_cancel_not_active")
        for response in chosen:
            await response.cancel("client_cancelled")

    # A user who says nothing

    def _watch_idle(self) -> None:
        """Begin to wait for the user to speak, from when the last answer has been played."""
        self._stop_idle()
        detection = self.settings.audio.input.turn_detection
        timeout = None if detection is None else detection.idle_timeout_ms
        waiting = self._spoken is not None and self._turn is None and self._spoken.id not in self._responses
        if timeout is not None and waiting and self.settings.type == "realtime":
            self._idle = asyncio.create_task(self._wait_for_speech(timeout / 1000))

    def _stop_idle(self) -> None:
        idle, self._idle = self._idle, None
        if idle is not None and idle is not asyncio.current_task():
            idle.cancel()

    async def _wait_for_speech(self, timeout: float) -> None:
        assert self._spoken is not None
        await asyncio.sleep(self._spoken.clock.remaining)
        start = self._input.end
        await asyncio.sleep(timeout)
        async with self._lock:
            if self._turn is not None or self._spoken is None:
                return
            # One answer to silence; the next waits for speech or a response.
            self._spoken = None
            item_id = new_id("item")
            times = {"audio_start_ms": round(start * 1000), "audio_end_ms": round(self._input.end * 1000)}
            await self._send("input_audio_buffer.timeout_triggered", item_id=item_id, **times)
            # Of a client that sends nothing while it is silent there are too few samples for a recording.
            format = self._input.format
            silence = format.encode(np.zeros(format.rate * MIN_COMMIT_MS // 1000, np.int16))
            data = self._input.take(start, self._input.end)
            await self._commit(data + silence[len(data) :], item_id)
            with contextlib.suppress(RequestRefusedError):
                await self._respond(self._params({}), list(self.conversation), asked_for=False)


HANDLERS: dict[str, Callable[[RealtimeSession, Any], Awaitable[None]]] = {
    "session.update": RealtimeSession._update,
    "transcription_session.update": RealtimeSession._update,
    "input_audio_buffer.append": RealtimeSession._append,
    "input_audio_buffer.commit": RealtimeSession._commit_all,
    "input_audio_buffer.clear": RealtimeSession._clear,
    "conversation.item.create": RealtimeSession._create_item,
    "conversation.item.delete": RealtimeSession._delete_item,
    "conversation.item.retrieve": RealtimeSession._retrieve_item,
    "conversation.item.truncate": RealtimeSession._truncate_item,
    "response.create": RealtimeSession._create_response,
    "response.cancel": RealtimeSession._cancel_response,
}
"""What does what each of `CLIENT_EVENTS` asks for."""
