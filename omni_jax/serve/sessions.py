"""What every endpoint shares: the model, its running batch, limits, metrics, and answers for asynchronous readers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import queue
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from omni_jax.api import Omni, Request
from omni_jax.audio import io as audio_io
from omni_jax.errors import ConfigError, OmniError
from omni_jax.inference.answer import Chunk, Reply
from omni_jax.inference.async_engine import AsyncEngine, Outcome, RequestHandle
from omni_jax.inference.engine import PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.serve.errors import RequestRefusedError, kind_of
from omni_jax.tasks import Task

MAX_CHARACTERS_PER_POSITION = 16
"""Texts of more characters per position of the trunk's context are refused before they are tokenized."""
MAX_READ_CHARACTERS = 65_536
"""The same for texts that are read aloud sentence by sentence, whatever the context."""
URL_SAFE = str.maketrans("-_", "+/")
"""From the URL-safe alphabet of base64 (RFC 4648, section 5) to the standard one."""
READY_INTERVAL = 0.2
"""Seconds between two looks whether the model is ready."""


@dataclass(frozen=True)
class Settings:
    """Limits and keys of a server."""

    max_batch_size: int = 8
    """Requests decoded at once."""
    max_queue_size: int = 64
    """Requests that may be queued; further ones get status 429."""
    max_audio_seconds: float = 3600.0
    """Longest recording, where the model takes so much; see `Omni.max_samples`."""
    max_body_bytes: int = 32 << 20
    """Largest body of a request, or message of a WebSocket."""
    request_timeout: float = 120.0
    """Seconds after which a request is given up, queueing included."""
    idle_timeout: float = 30.0
    """Seconds that a client may take to send or to read the next piece."""
    api_keys: tuple[str, ...] = ()
    """Accepted keys; empty: no key is needed."""
    aliases: tuple[str, ...] = ()
    """Further names of the model."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://example.org`) whose pages may use the server, besides its own page; `*`: all."""


class Metrics:
    """Metrics for Prometheus."""

    def __init__(self, service: Service):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "omni_requests", "Requests by endpoint and outcome.", ["endpoint", "outcome"], registry=registry
        )
        self.decode_steps = Counter("omni_decode_steps", "Decode steps of answered requests.", registry=registry)
        self.audio_seconds = Counter("omni_audio_seconds", "Seconds of audio of answered requests.", registry=registry)
        self.time_to_first_audio = Histogram(
            "omni_time_to_first_audio_seconds",
            "Time from submission of a request to the first audio of its answer, queueing included.",
            buckets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self.real_time_factor = Histogram(
            "omni_real_time_factor",
            "Time an answer took over the duration of its audio.",
            buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 4, 8),
            registry=registry,
        )
        engine = service.engine
        gauges = {
            "omni_batch_slots": ("Requests that can be decoded at once.", lambda: engine.max_batch_size),
            "omni_batch_slots_in_use": ("Requests being decoded.", lambda: engine.num_active),
            "omni_queue_length": ("Requests queued.", lambda: max(0, engine.num_requests - engine.num_active)),
            "omni_ready": ("1 once requests are answered.", lambda: service.ready),
        }
        for name, (meaning, value) in gauges.items():
            Gauge(name, meaning, registry=registry).set_function(value)

    def count(self, endpoint: str, outcome: str) -> None:
        """Count a request."""
        self.requests.labels(endpoint, outcome).inc()

    def count_error(self, endpoint: str, error: OmniError) -> None:
        """Count a request that ended with an error, unless its answer stream has counted it."""
        if not (isinstance(error, RequestRefusedError) and error.counted):
            self.count(endpoint, kind_of(error).outcome)

    def observe(self, reply: Reply) -> None:
        """Record a complete answer."""
        self.decode_steps.inc(reply.tokens.shape[1])
        if reply.timing.real_time_factor is not None:
            self.audio_seconds.inc(reply.seconds)
            self.real_time_factor.observe(reply.timing.real_time_factor)


class Service:
    """A model and its running batch behind the endpoints.

    Attributes:
        omni: the model.
        name: what clients call it.
        settings: limits and keys.
        engine: the running batch.
        metrics: for Prometheus.
    """

    def __init__(self, omni: Omni, name: str, settings: Settings):
        self.omni, self.name, self.settings = omni, name, settings
        self.engine = AsyncEngine(
            omni, max_batch_size=settings.max_batch_size, max_queue_size=settings.max_queue_size, warm_up=True
        )
        self.metrics = Metrics(self)
        # Decoding a file takes a core for a moment; more at once would only take it from the model.
        self._decoding = asyncio.Semaphore(2)

    def max_samples(self, task: Task | None) -> int:
        """Longest recording for a task, in samples at 16 kHz."""
        limit = int(self.settings.max_audio_seconds * audio_io.SAMPLE_RATE)
        return min(self.omni.max_samples(task or Task.A1A2), limit)

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model."""
        return (self.name, *self.settings.aliases)

    @property
    def ready(self) -> bool:
        """Whether requests are answered: the programs of the first one are compiled."""
        return self.engine.ready.is_set()

    @property
    def state(self) -> Literal["ready", "warming up", "broken"]:
        """`broken`: an exception ended the model's thread, and only a restart will help."""
        if self.engine.broken:
            return "broken"
        return "ready" if self.ready else "warming up"

    async def wait_until_ready(self) -> None:
        """Wait until requests are answered, or that has failed."""
        while self.state == "warming up":
            await asyncio.sleep(READY_INTERVAL)

    async def prepare(
        self,
        *,
        audio: bytes | np.ndarray | None = None,
        sample_rate: int | None = None,
        text: str | None = None,
        task: Task | None = None,
        truncate: bool = False,
        config: GenerationConfig,
    ) -> PreparedRequest:
        """Validate and prepare a request, in a thread.

        Args:
            audio: a whole file, or samples: int16 or f32 [samples].
            sample_rate: samples per second of an array.
            text: the input, where it is no recording.
            task: see `Request`.
            truncate: answer the beginning of a recording that is too long.
            config: how to answer.

        Raises:
            AudioError, ConfigError: as `Omni.prepare`; or the recording or the text exceeds the server's limit.
        """
        limit = MAX_CHARACTERS_PER_POSITION * self.omni.config.trunk.max_position
        if task is Task.T1A1 and self.omni.config.text.max_words is not None:
            limit = max(limit, MAX_READ_CHARACTERS)
        if text is not None and len(text) > limit:
            raise ConfigError(f"text: expected at most {limit} characters, found {len(text)}", field="text")
        request = Request(audio, text, task, sample_rate, truncate, config, name="recording")
        async with self._decoding:
            return await asyncio.to_thread(self.omni.prepare, request, max_samples=self.max_samples(task))

    def submit(self, request: PreparedRequest, endpoint: str) -> AnswerStream:
        """Queue a prepared request; the returned stream must be closed.

        Raises:
            RequestRefusedError: the model is not ready yet.
            BusyError, ClosedError, ConfigError: as `AsyncEngine.submit`.
        """
        if self.state == "warming up":
            raise RequestRefusedError(503, "the model is still warming up; see /readyz", code="not_ready")
        return AnswerStream(self, request, endpoint)

    def close(self) -> None:
        """Cancel all requests and end."""
        self.engine.close(finish=False)


class AnswerStream:
    """One answer as it is decoded, for an asynchronous reader.

    Attributes:
        reply: the answer, once it is complete.
    """

    def __init__(self, service: Service, request: PreparedRequest, endpoint: str):
        self._service, self._endpoint = service, endpoint
        # The handle must not refer to this object: as a cycle both would keep their audio until garbage collection.
        self._changed = changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._handle: RequestHandle = service.engine.submit(
            request,
            timeout=service.settings.request_timeout,
            notify=lambda: loop.call_soon_threadsafe(changed.set),
        )
        self._closed = False
        self.reply: Reply | None = None

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it goes on."""
        return self._handle.outcome

    @property
    def first_audio(self) -> float | None:
        """Seconds from submission to the first audio, queueing included."""
        return self._handle.first_audio

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Chunks as they are decoded; ends with a complete answer or without one: see `outcome`."""
        while True:
            self._changed.clear()
            try:
                chunk = self._handle.get_nowait()
            except queue.Empty:
                await self._changed.wait()
                continue
            if chunk is None:
                return
            self.reply = chunk.reply
            yield chunk

    async def wait(self) -> Reply:
        """The complete answer.

        Raises:
            RequestRefusedError: there is none.
        """
        async for _ in self:
            pass
        if self.reply is None:
            raise self.failure()
        return self.reply

    def failure(self) -> RequestRefusedError:
        """Why there is no complete answer."""
        if self.outcome == "expired":
            message = f"not answered within {self._service.settings.request_timeout:g} s"
            return RequestRefusedError(504, message, code="deadline_exceeded", counted=True)
        if self.outcome == "cancelled":
            return RequestRefusedError(503, "the server is shutting down", code="closed", counted=True)
        return RequestRefusedError(500, "the answer failed; the server's log says why", code="failed", counted=True)

    def close(self) -> None:
        """Free the batch slot if it is still in use, and record the answer in the metrics."""
        if self._closed:
            return
        self._closed = True
        self._handle.cancel()
        metrics = self._service.metrics
        metrics.count(self._endpoint, self.outcome or "cancelled")
        if self.first_audio is not None:
            metrics.time_to_first_audio.observe(self.first_audio)
        if self.reply is not None:
            metrics.observe(self.reply)


def decode_base64(data: str, field: str) -> bytes:
    """Bytes of a base64 text: standard or URL-safe, with or without padding and line ends, or in a data URI.

    Raises:
        ConfigError: it is not base64, or empty.
    """
    if data[:5].lower() == "data:":
        head, _, data = data.partition(",")
        if not head.lower().endswith(";base64"):
            raise ConfigError(f"{field}: expected a data URI in base64, found {head[:100]!r}", field=field)
    data = "".join(data.split()).translate(URL_SAFE).rstrip("=")
    try:
        decoded = base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{field}: expected base64, found {error}", field=field) from None
    if not decoded:
        raise ConfigError(f"{field}: expected a recording in base64, found nothing", field=field)
    return decoded
