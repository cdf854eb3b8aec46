"""What every endpoint shares: the model, its running batch, limits, metrics, and answers for asynchronous readers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from omni_jax.api import Omni, Request
from omni_jax.audio import io as audio_io
from omni_jax.errors import AudioTooLongError, BusyError, ConfigError, OmniError
from omni_jax.inference.answer import Chunk, Reply
from omni_jax.inference.async_engine import AsyncEngine, Outcome, RequestHandle
from omni_jax.inference.engine import PreparedRequest
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.request import Turn
from omni_jax.serve.budget import Budget, Share, client_name
from omni_jax.serve.errors import RequestRefusedError, kind_of
from omni_jax.tasks import Task

MAX_CHARACTERS_PER_POSITION = 16
"""Texts of more characters per position of the trunk's context are refused before they are tokenized."""
MAX_READ_CHARACTERS = 65_536
"""The same for texts that are read aloud sentence by sentence, whatever the context."""
URL_SAFE = bytes.maketrans(b"-_", b"+/")
"""From the URL-safe alphabet of base64 (RFC 4648, section 5) to the standard one."""
BASE64_PIECE = 1 << 20
"""Characters that are decoded at once; between two pieces other threads have their turn."""
WHITESPACE = b" \t\n\r\x0b\x0c"
PADDING = "= \t\n\r\x0b\x0c"
DATA_URI_HEAD = 1024
"""A data URI's type takes fewer characters."""
BODIES_PER_CLIENT, BODIES = 2, 8
"""Bodies of the largest size that the requests of one client, and of all, may hold at once."""
RECORDINGS = 4
"""How many times as much of recordings as those of one client the requests of all clients may hold at once."""
SECONDS_PER_CLIENT = 600
"""Of recordings that a client may have in progress, or else one of the greatest length, if that is longer."""
READY_INTERVAL = 0.2
"""Seconds between two looks whether the model is ready."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Limits and keys of a server."""

    max_batch_size: int = 8
    """Requests decoded at once."""
    max_queue_size: int = 64
    """Requests that may be queued; further ones get status 429."""
    cache_bytes: float | None = None
    """Memory for the keys and values of the running batch; None, or more than that: what all requests at full length
    take."""
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
    allowed_hosts: tuple[str, ...] = ()
    """Names of this server, besides `localhost` and addresses, in lower case; `*`: any."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of proxies, which stand for many clients and say for whom each request is."""
    max_connections: int = 1024
    """Connections at once; a client has at most a quarter of them."""


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
        self.realtime_sessions = Gauge(
            "omni_realtime_sessions", "Open sessions of the Realtime API.", registry=registry
        )
        engine = service.engine
        gauges = {
            "omni_batch_slots": ("Requests that can be decoded at once.", lambda: engine.max_batch_size),
            "omni_batch_slots_in_use": ("Requests being decoded.", lambda: engine.num_active),
            "omni_cache_pages": ("Pages of the cache of keys and values.", lambda: engine.num_pages),
            "omni_cache_pages_in_use": ("Pages that requests have.", lambda: engine.num_used_pages),
            "omni_queue_length": ("Requests queued.", lambda: max(0, engine.num_requests - engine.num_active)),
            "omni_ready": ("1 once requests are answered.", lambda: service.ready),
            "omni_compiled": ("1 once nothing is left to compile.", engine.warmed_up.is_set),
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
        bodies: bytes that requests in progress have received.
        recordings: samples at 16 kHz that requests in progress hold.
    """

    def __init__(self, omni: Omni, name: str, settings: Settings):
        self.omni, self.name, self.settings = omni, name, settings
        self.engine = AsyncEngine(
            omni,
            max_batch_size=settings.max_batch_size,
            max_queue_size=settings.max_queue_size,
            warm_up=True,
            cache_bytes=settings.cache_bytes,
        )
        self.metrics = Metrics(self)
        most = settings.max_body_bytes
        self.bodies = Budget(BODIES * most, BODIES_PER_CLIENT * most)
        # A client may ask several short questions at once, and have each of them transcribed, too.
        most = int(max(settings.max_audio_seconds, SECONDS_PER_CLIENT) * audio_io.SAMPLE_RATE)
        self.recordings = Budget(RECORDINGS * most, most)
        # Decoding a file takes a core for a moment; more at once would only take it from the model.
        self._decoding = asyncio.Semaphore(2)
        # So does making megabytes of JSON.
        self._large = asyncio.Semaphore(1)
        # The recording of each client that is decoded; others of the same client wait for it.
        self._decoding_of: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def client_of(self, address: Sequence[Any] | None, key: str = "") -> str | None:
        """Whom a connection or request is counted for; None for a proxy.

        Args:
            address: its address and port.
            key: its API key, if it has a valid one. Where there are several, a client is a key, not an address.
        """
        if key and len(self.settings.api_keys) > 1:
            return f"key {hashlib.sha256(key.encode()).hexdigest()}"
        host = str(address[0]) if address else ""
        return None if host in self.settings.trusted_proxies else client_name(host)

    def max_samples(self, task: Task | None) -> int:
        """Longest recording for a task, in samples at 16 kHz."""
        limit = int(self.settings.max_audio_seconds * audio_io.SAMPLE_RATE)
        return min(self.omni.max_samples(task or Task.A1A2), limit)

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model."""
        return (self.name, *self.settings.aliases)

    @property
    def remembers(self) -> bool:
        """Whether the model takes a system text and past turns."""
        return self.omni.config.conversation

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

    async def run_large(self, work: Callable[[], Result]) -> Result:
        """The result of work on much data, in a thread: one at a time, so that the model and the others go on."""
        async with self._large:
            return await asyncio.to_thread(work)

    async def prepare(
        self,
        *,
        client: str | None,
        audio: bytes | Base64 | np.ndarray | None = None,
        sample_rate: int | None = None,
        text: str | None = None,
        task: Task | None = None,
        truncate: bool = False,
        system: str = "",
        history: Sequence[Turn] = (),
        config: GenerationConfig,
    ) -> PreparedRequest:
        """Validate and prepare a request, in a thread.

        Args:
            client: see `client_of`.
            audio: a whole file, or samples: int16 or f32 [samples].
            sample_rate: samples per second of an array.
            text: the input, where it is no recording.
            task: see `Request`.
            truncate: answer the beginning of a recording that is too long.
            system: text that a conversation begins with.
            history: its turns so far. A model that was not trained on conversations (`remembers`) takes neither.
            config: how to answer.

        Raises:
            AudioError, ConfigError: as `Omni.prepare`; or the recording or the text exceeds the server's limit.
            BusyError: the client's requests hold too long recordings together.
        """
        limit = MAX_CHARACTERS_PER_POSITION * self.omni.config.trunk.max_position
        if task is Task.T1A1 and self.omni.config.text.max_words is not None:
            limit = max(limit, MAX_READ_CHARACTERS)
        if text is not None and len(text) > limit:
            raise ConfigError(f"text: expected at most {limit} characters, found {len(text)}", field="text")

        def prepare(max_samples: int) -> PreparedRequest:
            source: Any = audio.decode() if isinstance(audio, Base64) else audio
            request = Request(
                source, text, task, sample_rate, truncate, config, name="recording", system=system, history=history
            )
            return self.omni.prepare(request, max_samples=max_samples)

        if audio is None:
            return await asyncio.to_thread(prepare, self.max_samples(task))
        async with contextlib.AsyncExitStack() as turn:
            if client is not None:
                await turn.enter_async_context(self._decoding_of.setdefault(client, asyncio.Lock()))
            await turn.enter_async_context(self._decoding)
            decoding = asyncio.ensure_future(
                self._prepare_recording(client, prepare, self.max_samples(task), turn.pop_all())
            )
        # What it raises after it was given up is of no interest.
        decoding.add_done_callback(lambda done: done.cancelled() or done.exception())
        # A thread cannot be ended: if this is cancelled, the client's next recording waits for it all the same.
        return await asyncio.shield(decoding)

    async def _prepare_recording(
        self,
        client: str | None,
        prepare: Callable[[int], PreparedRequest],
        max_samples: int,
        turn: contextlib.AsyncExitStack,
    ) -> PreparedRequest:
        """Prepare a request whose recording has to fit into what is left of the client's budget."""
        most = min(max_samples, self.recordings.left(client))
        busy = BusyError("other long recordings are being answered; try again later")
        async with turn:
            with Share(self.recordings, client) as share:
                if most <= 0 or not share.take(most):
                    raise busy
                try:
                    prepared = await asyncio.to_thread(prepare, most)
                except AudioTooLongError:
                    if most == max_samples:
                        raise
                    raise busy from None
        kept = Share(self.recordings, client)
        kept.take(int(prepared.duration * audio_io.SAMPLE_RATE))
        # The recording is in memory as long as the request is.
        weakref.finalize(prepared, kept.give_back)
        return prepared

    async def remember(self, system: str, turns: Sequence[Turn]) -> None:
        """Have the keys and values of a conversation computed before its next turn comes."""
        # Before, it could wait for a compiler, and requests with it. One that does not fit is answered all the same.
        if self.engine.warmed_up.is_set():
            with contextlib.suppress(OmniError):
                self.engine.remember(await asyncio.to_thread(self.omni.prepare_history, system, turns))

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
        if self._handle.first_audio is not None:
            metrics.time_to_first_audio.observe(self._handle.first_audio)
        if self.reply is not None:
            metrics.observe(self.reply)


@dataclass(frozen=True)
class Base64:
    """A recording as it came, which is decoded in a thread: it may take long."""

    data: str
    """Base64, standard or URL-safe, with or without padding and line ends, or in a data URI."""
    field: str
    """Of the request, for messages."""

    def decode(self) -> bytearray:
        """The bytes.

        Raises:
            ConfigError: it is not base64, or empty.
        """
        data, start, end = self.data, 0, len(self.data)
        if data[:5].lower() == "data:":
            head, _, _ = data[:DATA_URI_HEAD].partition(",")
            if not head.lower().endswith(";base64"):
                raise self._error(f"expected a data URI in base64, found {head[:100]!r}")
            start = len(head) + 1
        while end > start and data[end - 1] in PADDING:
            end -= 1
        decoded, rest = bytearray(), b""
        try:
            for begin in range(start, end, BASE64_PIECE):
                rest += data[begin : min(begin + BASE64_PIECE, end)].encode("ascii").translate(URL_SAFE, WHITESPACE)
                if b"=" in rest:
                    raise ValueError("padding before the end")
                # Only the last piece may end within four characters.
                whole = len(rest) if begin + BASE64_PIECE >= end else len(rest) // 4 * 4
                decoded += base64.b64decode(rest[:whole] + b"=" * (-whole % 4), validate=True)
                rest = rest[whole:]
        except (binascii.Error, ValueError) as error:
            raise self._error(f"expected base64, found {error}") from None
        if not decoded:
            raise self._error("expected a recording in base64, found nothing")
        return decoded

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.field}: {message}", field=self.field)
