"""What every way of asking over the network shares: one model, one running batch, its limits and its figures."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import queue
import reprlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from omni_jax.api import Omni, Request
from omni_jax.audio import io as audio_io
from omni_jax.inference.answer import Chunk, Reply
from omni_jax.inference.async_engine import AsyncEngine, Outcome, RequestHandle
from omni_jax.inference.engine import PreparedRequest

LETTERS_PER_POSITION = 16
"""Longer texts than this many letters per position of the trunk's context are refused before they are tokenized."""
RETRY_SECONDS = 2
"""What one who is turned away is told to wait."""


class Refusal(Exception):  # noqa: N818 - it is an answer, not a fault
    """What was asked can't be answered: an HTTP status and one sentence that says why."""

    def __init__(self, status: int, message: str, *, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code


@dataclass(frozen=True)
class Settings:
    """How much is let in, and who."""

    slots: int = 8
    """Requests answered at once."""
    waiting: int = 64
    """How many more may be queued."""
    max_audio_seconds: float | None = None
    """Longest recording; None: what the ear hears at once."""
    max_body_bytes: int = 32 << 20
    """Largest body of a request or message of a socket."""
    max_seconds: float = 120.0
    """After which a request is given up."""
    idle_seconds: float = 30.0
    """How long a client may take to send or to read the next piece."""
    api_keys: tuple[str, ...] = ()
    """One of these must be given; empty: anybody may ask."""


class Figures:
    """What Prometheus reads."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "omni_requests", "Requests by where they came in and how they ended", ["endpoint", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.steps = Counter("omni_steps", "Decoding steps of answered requests", registry=self.registry)
        self.sound = Counter("omni_sound_seconds", "Seconds of speech answered", registry=self.registry)
        self.first_sound = Histogram(
            "omni_first_sound_seconds", "From the end of a question to the first sound of its answer, waiting included",
            buckets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2, 4, 8, 16, 32), registry=self.registry,
        )  # fmt: skip
        self.real_time_factor = Histogram(
            "omni_real_time_factor", "Time an answer took over the duration of its sound",
            buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 4, 8), registry=self.registry,
        )  # fmt: skip
        gauges = {
            "omni_slots": ("Requests that can be answered at once", lambda: service.settings.slots),
            "omni_slots_occupied": ("Requests being answered", lambda: service.live.occupied),
            "omni_waiting": ("Requests queued", lambda: max(0, service.live.alive - service.live.occupied)),
            "omni_ready": ("1 once everything is compiled", lambda: service.ready),
        }
        for name, (meaning, value) in gauges.items():
            Gauge(name, meaning, registry=self.registry).set_function(value)


class Service:
    """A model that answers over the network.

    Attributes:
        omni: the model.
        name: what clients call it.
        settings: its limits.
        live: the running batch.
        figures: what it counts.
    """

    def __init__(self, omni: Omni, name: str, settings: Settings):
        ear = omni.config.audio_encoder.max_samples
        limit = settings.max_audio_seconds
        self.omni, self.name, self.settings = omni, name, settings
        self.max_samples = ear if limit is None else min(ear, int(limit * audio_io.SAMPLE_RATE))
        self.live = AsyncEngine(omni, slots=settings.slots, waiting=settings.waiting, warm_up=True)
        self.figures = Figures(self)
        # Reading a recording takes a core for a moment; more at once would only take it from the model.
        self._reading = asyncio.Semaphore(2)

    @property
    def max_audio_seconds(self) -> float:
        """Longest question."""
        return self.max_samples / audio_io.SAMPLE_RATE

    @property
    def ready(self) -> bool:
        """Whether everything is compiled."""
        return self.live.ready.is_set()

    @property
    def state(self) -> Literal["ready", "warming up", "broken"]:
        """`broken`: a fault has ended the model's thread, and only a restart will help."""
        if self.live.broken:
            return "broken"
        return "ready" if self.ready else "warming up"

    async def prepare(
        self, *, sound: bytes | np.ndarray | None = None, rate: int | None = None, **ask: Any
    ) -> PreparedRequest:
        """Check and prepare what is asked, beside everything else.

        Args:
            sound: a whole file, or samples: int16 or f32 [samples].
            rate: samples per second of an array.
            **ask: fields of `Ask`.

        Raises:
            Refusal: the recording or the text is too long.
            AudioError, ConfigError: as `Omni.prepare`.
        """
        text = ask.get("text")
        most = LETTERS_PER_POSITION * self.omni.config.trunk.max_position
        if isinstance(text, str) and len(text) > most:
            raise Refusal(400, f"text: expected at most {most} letters, found {len(text)}", field="text")

        def work() -> PreparedRequest:
            if sound is None:
                return self.omni.prepare(Request(**ask))
            if isinstance(sound, bytes):
                samples = audio_io.read_audio(io.BytesIO(sound), max_seconds=self.max_audio_seconds)
            else:
                assert rate is not None
                samples = audio_io.to_mono(sound, rate)
            samples = audio_io.check_duration(samples, self.max_samples, cut=False, name="recording")
            return self.omni.prepare(Request(audio=samples, sample_rate=audio_io.SAMPLE_RATE, **ask))

        async with self._reading:
            return await asyncio.to_thread(work)

    def ask(self, request: PreparedRequest, endpoint: str) -> Conversation:
        """Begin to answer; the conversation must be closed.

        Raises:
            Refusal: it is not ready yet.
            BusyError, ClosedError, ConfigError: as `Live.ask`.
        """
        if self.state == "warming up":
            raise Refusal(503, "the model is still being made ready; see /readyz", code="not_ready")
        return Conversation(self, request, endpoint)

    def count(self, endpoint: str, outcome: str) -> None:
        """Note how a request ended."""
        self.figures.requests.labels(endpoint, outcome).inc()

    def close(self) -> None:
        """Cancel what runs, and end."""
        self.live.close(finish=False)


class Conversation:
    """One answer as it is made, for an asynchronous reader."""

    def __init__(self, service: Service, request: PreparedRequest, endpoint: str):
        self._service, self._endpoint = service, endpoint
        # Without a way from the talk back to here: in a cycle both would keep their sound until it is searched for.
        self._news = news = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._talk: RequestHandle = service.live.ask(
            request,
            seconds=service.settings.max_seconds,
            notify=lambda: loop.call_soon_threadsafe(news.set),
        )
        self._closed = False
        self.whole: Reply | None = None
        """The answer, once it is complete."""

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it goes on."""
        return self._talk.outcome

    @property
    def first_sound(self) -> float | None:
        """Seconds from the question to the first sound, waiting included."""
        return self._talk.first_sound

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Parts as they are made; ends with the answer or without one: see `outcome`."""
        while True:
            self._news.clear()
            try:
                part = self._talk.get_nowait()
            except queue.Empty:
                await self._news.wait()
                continue
            if part is None:
                return
            self.whole = part.reply
            yield part

    async def reply(self) -> Reply:
        """The whole answer.

        Raises:
            Refusal: there is none.
        """
        async for _ in self:
            pass
        if self.whole is None:
            raise self.refusal()
        return self.whole

    def refusal(self) -> Refusal:
        """Why there is no answer."""
        if self.outcome == "expired":
            return Refusal(
                504, f"not answered within {self._service.settings.max_seconds:g} s", code="deadline_exceeded"
            )
        if self.outcome == "cancelled":
            return Refusal(503, "the server is being shut down", code="closed")
        return Refusal(500, "the answer failed; the server's log says why", code="failed")

    def close(self) -> None:
        """Give the slot back if it is still in use, and count what came of it."""
        if self._closed:
            return
        self._closed = True
        self._talk.cancel()
        figures, whole = self._service.figures, self.whole
        self._service.count(self._endpoint, self.outcome or "cancelled")
        if self.first_sound is not None:
            figures.first_sound.observe(self.first_sound)
        if whole is not None:
            figures.steps.inc(whole.tokens.shape[1])
            if whole.audio is not None and len(whole.audio):
                figures.sound.inc(whole.seconds)
                figures.real_time_factor.observe(whole.timing.total / whole.seconds)


def sentence(errors: Sequence[Any]) -> tuple[str | None, str]:
    """The first of pydantic's errors: the field, and a sentence that says what is wrong with it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return None, f"body: expected JSON, found {first.get('ctx', {}).get('error', 'something else')}"
    places = [str(place) for place in first["loc"] if place not in ("body", "query", "path")]
    field = ".".join(places) or None
    found = "" if first["type"] == "missing" else f", found {reprlib.repr(first.get('input'))}"
    return field, f"{field or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{found}"


def from_base64(data: str, field: str) -> bytes:
    """Bytes of a base64 text.

    Raises:
        Refusal: it is not base64, or empty.
    """
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{field}: expected base64, found {error}", field=field) from None
    if not decoded:
        raise Refusal(400, f"{field}: expected a recording in base64, found nothing", field=field)
    return decoded
