"""One response of a Realtime session, and the transcription of one recording: what is asked, and the events of both."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from omni_jax.audio.raw import RawEncoder
from omni_jax.audio.tempo import TempoStream
from omni_jax.errors import ConfigError, NoSpeechError, OmniError
from omni_jax.inference.answer import Chunk, Reply
from omni_jax.inference.engine import PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.request import Turn
from omni_jax.serve.errors import error_body, kind_of
from omni_jax.serve.openai_schema import input_output_usage
from omni_jax.serve.realtime_conversation import Context, Conversation, Item, Part, PlaybackClock, new_id
from omni_jax.serve.realtime_schema import ResponseParams
from omni_jax.serve.sessions import AnswerStream, Service
from omni_jax.tasks import Task

ENDPOINT = "/v1/realtime"

log = logging.getLogger(__name__)

Send = Callable[..., Awaitable[None]]
"""Sends an event: its type, and its fields by name."""


class Response:
    """An answer to a conversation.

    Attributes:
        id: of the response.
        item: the message that is being spoken or written; None until the model has begun.
        clock: what of it has been played.
        conversation: that it belongs to; None for one that is out of band.
    """

    def __init__(
        self,
        service: Service,
        client: str | None,
        send: Send,
        params: ResponseParams,
        context: Context,
        conversation: Conversation | None,
        transcribe: Callable[[Item, PreparedRequest | None], Awaitable[None]],
        *,
        asked_for: bool,
    ):
        """Prepare.

        Args:
            service: answers.
            client: see `Service.client_of`.
            send: sends an event to the client.
            params: how to answer.
            context: what is asked, and what was said before.
            conversation: that the answer is added to; None: to none.
            transcribe: called when the question may be transcribed: its item, and the prepared request if it could be
                prepared. Not before the first audio was sent, which should come soon.
            asked_for: whether the client has asked for it. Else a turn or a time-out has, which may be no speech to the
                model: the answer is nothing then, and no failure.
        """
        self.id = new_id("resp")
        self.item: Item | None = None
        self.clock = PlaybackClock()
        self._done: Callable[[Response], object]
        self.conversation = conversation
        self._service, self._client, self._send_event, self._params = service, client, send, params
        self._context, self._transcribe, self._asked_for = context, transcribe, asked_for
        self._prepared: PreparedRequest | None = None
        self._status = "in_progress"
        self._details: dict[str, Any] | None = None
        self._usage: dict[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending = False
        self._answering: AnswerStream | None = None

    @property
    def items(self) -> list[Item]:
        """The question, while it is held, and what was said before."""
        return [*self._context.before, *filter(None, [self._context.asked])]

    async def start(self, done: Callable[[Response], object]) -> None:
        """Begin to answer.

        Args:
            done: called once it has ended, unless it was abandoned.
        """
        await self._send_event("response.created", response=self.render())
        self._task = asyncio.create_task(self._run())
        self._done = done

    async def cancel(self, reason: str) -> None:
        """Stop answering, and tell the client; no effect on a response that has ended.

        Args:
            reason: `turn_detected` or `client_cancelled`.
        """
        task = self._task
        if task is None or task.done():
            return
        if not self._ending:
            task.cancel()
            if self._answering is not None:
                # At once: the task may have to send the rest of a message to a client that reads slowly.
                self._answering.close()
        await asyncio.wait([task])
        if task.cancelled():
            if self._answering is None:
                # An answer that has been submitted counts itself.
                self._service.metrics.count(ENDPOINT, "cancelled")
            await self._end("cancelled", {"type": "cancelled", "reason": reason})
            await self._transcribe_question()

    def abandon(self) -> None:
        """Stop answering; the client is gone."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            reply = await self._answer()
        except OmniError as error:
            self._service.metrics.count_error(ENDPOINT, error)
            if isinstance(error, NoSpeechError) and not self._asked_for:
                await self._transcribe_question()
                await self._end("completed", None)
            else:
                await self._fail(error)
            return
        except Exception:
            log.exception("a response has failed; the session goes on")
            await self._fail(OmniError("the answer failed; the server's log says why"))
            return
        if reply.finish_reason == "stop":
            await self._end("completed", None)
        else:
            await self._end("incomplete", {"type": "incomplete", "reason": "max_output_tokens"})

    async def _fail(self, error: OmniError) -> None:
        await self._transcribe_question()
        found = describe_error(error)
        error_fields = {name: found[name] for name in ("type", "code", "message")}
        await self._end("failed", {"type": "failed", "error": error_fields})

    async def _answer(self) -> Reply:
        prepared = self._prepared = await self._prepare()
        await self._service.wait_until_ready()
        answer = self._answering = self._service.submit(prepared, ENDPOINT)
        try:
            await self._begin_item()
            encoder = _AudioStream(self._service.omni.sample_rate, self._params)
            async for chunk in answer:
                await self._send_chunk(chunk, encoder)
                if self.clock.remaining or not self._params.outputs_audio:
                    await self._transcribe_question()
        finally:
            answer.close()
        await self._transcribe_question()
        if answer.reply is None:
            raise answer.failure()
        self._usage = _usage(prepared, answer.reply, spoken=self._params.outputs_audio)
        return answer.reply

    async def _prepare(self) -> PreparedRequest:
        """The last message of the user as a request.

        Without one the instructions of this response are answered, as those of a greeting are.
        """
        config = self._params.generation_config()
        spoken = self._params.outputs_audio
        asked = self._context.asked
        system, history = "", list[Turn]()
        if self._service.remembers:
            for item in self._context.before:
                await self._transcribe(item, None)
            # Without a message of the user the instructions are what is answered.
            instructions = "" if asked is None else self._params.instructions
            system, history = await self._context.history(instructions)
        recording = None if asked is None else asked.audio
        if recording is not None:
            if not recording.audio:
                raise ConfigError("input: expected a recording that is still there, found one without samples")
            samples = recording.format.decode(bytes(recording.audio))
            return await self._service.prepare(
                client=self._client,
                audio=samples,
                sample_rate=recording.format.rate,
                task=Task.A1A2 if spoken else Task.A1T2,
                system=system,
                history=history,
                config=config,
            )
        text = self._params.instructions if asked is None else asked.text
        if not text:
            raise ConfigError("input: expected a message of the user to answer, found none", field="input")
        return await self._service.prepare(
            client=self._client,
            text=text,
            task=Task.T1A2 if spoken else Task.T1T2,
            system=system,
            history=history,
            config=config,
        )

    async def _transcribe_question(self) -> None:
        asked, self._context.asked = self._context.asked, None
        prepared, self._prepared = self._prepared, None
        if asked is not None:
            await self._transcribe(asked, prepared)

    async def _begin_item(self) -> None:
        spoken = self._params.outputs_audio
        part = Part("output_audio" if spoken else "output_text", "", complete=False)
        part.format = self._params.audio.output.format.raw
        self.item = Item("assistant", [part], status="in_progress")
        before = None if self.conversation is None else self.conversation.add(self.item)
        empty = self.item.render() | {"content": []}
        await self._send("response.output_item.added", output_index=0, item=empty)
        if self.conversation is not None:
            await self._send_event("conversation.item.added", previous_item_id=before, item=empty)
        await self._send_part("response.content_part.added", part=self._part_object(part))

    async def _send_chunk(self, chunk: Chunk, encoder: _AudioStream) -> None:
        assert self.item is not None
        (part,) = self.item.parts
        if chunk.text:
            part.text = (part.text or "") + chunk.text
            kind = "output_audio_transcript" if part.is_audio else "output_text"
            await self._send_part(f"response.{kind}.delta", delta=chunk.text)
        if part.is_audio:
            data = encoder.push(chunk)
            seconds = part.format.seconds(len(data))
            part.audio += data
            part.seconds += seconds
            part.complete = chunk.reply is not None
            if data:
                self.clock.send(seconds)
                await self._send_part("response.output_audio.delta", delta=base64.b64encode(data).decode())
        if self.conversation is not None:
            self.conversation.limit_memory(self.item)

    async def _end(self, status: str, details: dict[str, Any] | None) -> None:
        """Send the last events, of which a cancellation leaves out none."""
        self._ending = True
        self._status, self._details = status, details
        if self.item is not None:
            (part,) = self.item.parts
            self.item.status = "completed" if status == "completed" else "incomplete"
            if part.is_audio:
                await self._send_part("response.output_audio.done")
                await self._send_part("response.output_audio_transcript.done", transcript=part.text)
            else:
                await self._send_part("response.output_text.done", text=part.text)
            await self._send_part("response.content_part.done", part=self._part_object(part))
            await self._send("response.output_item.done", output_index=0, item=self.item.render())
            if self.conversation is not None:
                before = self.conversation.previous(self.item)
                await self._send_event("conversation.item.done", previous_item_id=before, item=self.item.render())
        await self._send_event("response.done", response=self.render())
        self._done(self)

    def _part_object(self, part: Part) -> dict[str, Any]:
        return {"type": "audio", "transcript": part.text} if part.is_audio else {"type": "text", "text": part.text}

    async def _send(self, type: str, **fields: Any) -> None:
        await self._send_event(type, response_id=self.id, **fields)

    async def _send_part(self, type: str, **fields: Any) -> None:
        assert self.item is not None
        await self._send(type, item_id=self.item.id, output_index=0, content_index=0, **fields)

    def render(self) -> dict[str, Any]:
        """As events have it."""
        output = self._params.audio.output
        ended = self.item is not None and self._status != "in_progress"
        return {
            "object": "realtime.response",
            "id": self.id,
            "status": self._status,
            "status_details": self._details,
            "output": [self.item.render()] if self.item is not None and ended else [],
            "conversation_id": None if self.conversation is None else self.conversation.id,
            "output_modalities": self._params.output_modalities,
            "max_output_tokens": self._params.max_output_tokens,
            "audio": {"output": {"format": output.format.render(), "voice": output.voice}},
            "usage": self._usage,
            "metadata": self._params.metadata,
        }


class _AudioStream:
    """The audio of an answer, at the speed and in the format that the client has asked for."""

    def __init__(self, rate: int, params: ResponseParams):
        self._tempo = TempoStream(rate, params.audio.output.speed)
        self._encoder = RawEncoder(rate, params.audio.output.format.raw)

    def push(self, chunk: Chunk) -> bytes:
        last = chunk.reply is not None
        return self._encoder.push(self._tempo.push(chunk.audio, last=last), last=last)


async def transcribe(
    service: Service, client: str | None, send: Send | None, item: Item, prepared: PreparedRequest | None
) -> None:
    """Transcribe the recording of an item.

    Args:
        service: transcribes.
        client: see `Service.client_of`.
        send: sends the text as it is decoded; None: it is for the history alone.
        item: has a recording.
        prepared: a request with that recording, if there is one already.
    """
    index = next(index for index, part in enumerate(item.parts) if part.type == "input_audio")
    part, where = item.parts[index], {"item_id": item.id, "content_index": index}

    async def tell(kind: str, **fields: Any) -> None:
        if send is not None:
            await send(f"conversation.item.input_audio_transcription.{kind}", **where, **fields)

    try:
        if prepared is None:
            samples, rate = part.format.decode(bytes(part.audio)), part.format.rate
            prepared = await service.prepare(
                client=client, audio=samples, sample_rate=rate, task=Task.A1T1, config=GenerationConfig()
            )
        else:
            prepared = service.omni.to_transcription(prepared)
        await service.wait_until_ready()
        answer: AnswerStream = service.submit(prepared, ENDPOINT)
        try:
            async for chunk in answer:
                if chunk.text:
                    await tell("delta", delta=chunk.text)
        finally:
            answer.close()
        if answer.reply is None:
            raise answer.failure()
    except OmniError as error:
        service.metrics.count_error(ENDPOINT, error)
        await tell("failed", error=describe_error(error))
        return
    part.text = answer.reply.text
    usage = {"type": "duration", "seconds": round(part.seconds, 3)}
    await tell("completed", transcript=part.text, usage=usage)


def describe_error(error: OmniError) -> dict[str, Any]:
    """An error as events have it."""
    status, code, _ = kind_of(error)
    found: dict[str, Any] = error_body(str(error), status=status, field=getattr(error, "field", None), code=code)
    return dict(found["error"])


def _usage(prepared: PreparedRequest, reply: Reply, *, spoken: bool) -> dict[str, Any]:
    counts = input_output_usage(len(prepared.prompt), reply)
    audio = prepared.prompt.speech_positions
    steps = counts["output_tokens"]
    return {
        **counts,
        "input_token_details": {
            "text_tokens": counts["input_tokens"] - audio,
            "audio_tokens": audio,
            "cached_tokens": reply.cached_positions,
        },
        "output_token_details": {"text_tokens": 0 if spoken else steps, "audio_tokens": steps if spoken else 0},
    }
