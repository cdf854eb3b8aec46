"""`AsyncEngine`: one running batch for many clients. Any thread may submit; chunks are returned as they are decoded.

A thread of its own drives the engine. `submit` returns a `RequestHandle`, which is iterated for the chunks of the
answer: slow readers do not block the batch, and cancelling frees the batch slot at once. Tokens are those of
`Omni.run`, whatever else is in the batch.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

from omni_jax.codec.stream import StreamDecoder
from omni_jax.errors import BusyError, ClosedError, ConfigError
from omni_jax.inference.answer import AnswerBuilder, Chunk, OutputDecoder
from omni_jax.inference.engine import COARSE_PROMPT_BUCKETS, MAX_TO_REMEMBER, Engine, PreparedRequest
from omni_jax.inference.prefix_cache import DEFAULT_MAX_BYTES, PrefixCache
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.pages import PAGE_LEN, pages_for
from omni_jax.prompts import History

Outcome = Literal["done", "cancelled", "expired", "failed"]
"""How a request ended."""

WARM_UP_JOIN_SECONDS = 2.0
"""Seconds that `AsyncEngine.close` waits for a compilation, which may take minutes."""

log = logging.getLogger(__name__)


class Model(Protocol):
    """What an engine needs of a model; `omni_jax.Omni` is one."""

    @property
    def runner(self) -> ModelRunner:
        """Its compiled programs."""

    @property
    def outputs(self) -> OutputDecoder:
        """What decodes its tokens."""


@dataclass(eq=False)
class RequestHandle:
    """A submitted request. Iterate over it for the chunks of the answer; see `outcome` for how it ended."""

    request: PreparedRequest
    deadline: float | None
    """On the clock of `time.monotonic`."""
    notify: Callable[[], object] | None
    outcome: Outcome | None = None
    """None while it goes on; set before the last item of the iteration."""
    submitted: float = field(default_factory=time.monotonic)
    first_audio: float | None = None
    """Seconds from submission to the first audio, queueing included."""
    _chunks: queue.SimpleQueue[Chunk | None] = field(default_factory=queue.SimpleQueue)
    _cancel: Callable[[RequestHandle], None] | None = None

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks as they are decoded; blocks in between."""
        while (chunk := self._chunks.get()) is not None:
            yield chunk

    def get_nowait(self) -> Chunk | None:
        """The next chunk if it is there, None when there are no more.

        Raises:
            queue.Empty: there is nothing yet; `notify` is called, from another thread, when there is.
        """
        return self._chunks.get_nowait()

    def cancel(self) -> None:
        """Stop answering; no effect on a request that has ended."""
        if self._cancel is not None:
            self._cancel(self)

    def _put(self, chunk: Chunk) -> None:
        if self.first_audio is None and len(chunk.audio):
            self.first_audio = time.monotonic() - self.submitted
        if chunk.reply is not None:
            self.outcome = "done"
        self._chunks.put(chunk)
        self._notify()

    def _end(self, outcome: Outcome) -> None:
        self.outcome = self.outcome or outcome
        self._chunks.put(None)
        self._notify()

    def _notify(self) -> None:
        if self.notify is not None:
            try:
                self.notify()
            except Exception:
                # The reader is gone, which must not affect the other requests.
                log.debug("a reader could not be notified", exc_info=True)


class AsyncEngine:
    """A running batch and the thread that drives it; a context manager, which closes it.

    Attributes:
        max_batch_size: requests decoded at once.
        max_queue_size: how many more may be queued.
        ready: set once requests are answered; with `warm_up`, when the programs of the first one are compiled.
        warmed_up: set once nothing is left to compile beforehand.
        broken: whether a fault has ended the thread: nothing is answered any more.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch_size: int = 8,
        max_queue_size: int = 64,
        max_len: int | None = None,
        warm_up: bool = False,
        prefix_cache_bytes: int = DEFAULT_MAX_BYTES,
        cache_bytes: float | None = None,
    ):
        """Start.

        Args:
            model: an `Omni`.
            max_batch_size: requests decoded at once.
            max_queue_size: how many more may be queued; further ones are refused.
            max_len: positions of each slot's cache; None: the trunk's context.
            warm_up: compile what the first request needs before `ready` is set, and the rest in the background.
                Only a request for which nothing is compiled waits for the compiler.
            prefix_cache_bytes: memory for the keys and values of conversations that wait for their next turn.
            cache_bytes: memory for the keys and values of the running batch, which requests take page by page; None, or
                more than that: what all batch slots and companion rows at full length take.

        Raises:
            ConfigError: `cache_bytes` is no number, not enough for one request, or more than the devices have.
        """
        if max_batch_size < 1 or max_queue_size < 0:
            raise ValueError(
                f"expected max_batch_size of 1 or more and max_queue_size of 0 or more, "
                f"found {max_batch_size} and {max_queue_size}"
            )
        self._outputs = model.outputs
        self.max_batch_size, self.max_queue_size = max_batch_size, max_queue_size
        self._keys = itertools.count()
        self._lock = threading.Condition()
        # What other threads want; under the lock.
        self._new: list[tuple[int, RequestHandle]] = []
        self._cancelled: set[RequestHandle] = set()
        self._histories: deque[History] = deque(maxlen=MAX_TO_REMEMBER)
        self._closing: Literal["finish", "cancel"] | None = None
        # The thread's own; changed under the lock too, so that others can count them.
        self._answers: dict[int, tuple[RequestHandle, AnswerBuilder]] = {}
        max_len = max_len or self._outputs.config.trunk.max_position
        prefixes = PrefixCache(prefix_cache_bytes)
        page_len = min(PAGE_LEN, max_len)
        num_pages = None
        if cache_bytes is not None:
            page_bytes, groups = model.runner.page_bytes(page_len), model.runner.row_groups(max_batch_size)
            least = groups * 2 * pages_for(max_len, page_len) * page_bytes
            if not least <= cache_bytes < math.inf:
                raise ConfigError(
                    f"cache_bytes: expected a finite number, at least {math.ceil(least / 1e6) / 1e3:g} GB: keys and "
                    f"values of one request and its companion row, in each of {groups} groups of rows; found "
                    f"{cache_bytes / 1e9:g} GB",
                    field="cache_bytes",
                )
            num_pages = int(cache_bytes // page_bytes)
        self._engine = Engine(
            model.runner,
            max_batch_size,
            max_len,
            COARSE_PROMPT_BUCKETS,
            prefixes,
            num_pages=num_pages,
            page_len=page_len,
        )
        self.ready, self.warmed_up = threading.Event(), threading.Event()
        self._compiling: threading.Thread | None = None
        self.broken = False
        self._thread = threading.Thread(target=self._run, args=(warm_up,), name="omni_jax engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> AsyncEngine:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close; active requests are cancelled."""
        self.close(finish=False)

    @property
    def num_requests(self) -> int:
        """Requests that are being answered or queued."""
        with self._lock:
            return len(self._new) + len(self._answers)

    @property
    def num_active(self) -> int:
        """Batch slots in use."""
        return sum(active is not None for active in self._engine.active)

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self._engine.pages.total

    @property
    def num_used_pages(self) -> int:
        """Pages of the cache that requests have."""
        return self._engine.pages.used

    def submit(
        self, request: PreparedRequest, *, timeout: float | None = None, notify: Callable[[], object] | None = None
    ) -> RequestHandle:
        """Queue a prepared request (`Omni.prepare`).

        Args:
            request: what to answer.
            timeout: seconds after which it is given up, queued or active; its outcome is `expired` then.
            notify: called from another thread whenever there is something new to read.

        Raises:
            BusyError: the queue is full.
            ClosedError: the engine is closed, closing or broken.
            ConfigError: the request does not fit the slots' caches.
        """
        self._engine.check(request)
        deadline = None if timeout is None else time.monotonic() + timeout
        handle = RequestHandle(request, deadline, notify, _cancel=self._request_cancel)
        with self._lock:
            if self._closing is not None:
                raise ClosedError(f"no more requests: {'the model has failed' if self.broken else 'closing'}")
            if self.num_requests >= self.max_batch_size + self.max_queue_size:
                raise BusyError(f"{self.num_requests} requests are active or queued, the most allowed; try again later")
            self._new.append((next(self._keys), handle))
            self._lock.notify()
        return handle

    def remember(self, history: History) -> None:
        """Compute the keys and values of a history while no request is queued, so that the next turn is faster.

        Args:
            history: as `Omni.prepare_history` makes it, at the end of a turn.

        Raises:
            ConfigError: it does not fit the slots' caches.
        """
        if len(history) > self._engine.max_len:
            raise ConfigError(f"the history takes {len(history)} positions, the slots have {self._engine.max_len}")
        with self._lock:
            self._histories.append(history)
            self._lock.notify()

    def close(self, *, finish: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, and end.

        Args:
            finish: whether queued and active requests are answered first; otherwise they are cancelled.
            timeout: seconds to wait at most; what has not ended by then is cancelled.

        Returns:
            Whether everything was answered that should have been.
        """
        with self._lock:
            self._closing = "finish" if finish else "cancel"
            self._lock.notify()
        if not finish and not self.ready.is_set():
            timeout = WARM_UP_JOIN_SECONDS
        self._thread.join(timeout)
        in_time = not self._thread.is_alive()
        if not in_time:
            with self._lock:
                self._closing = "cancel"
                self._lock.notify()
            # A compilation cannot be interrupted; the thread ends after it, or with the process.
            self._thread.join(None if self.ready.is_set() else 0)
        if self._compiling is not None:
            # A process that ends while a thread compiles may abort.
            self._compiling.join()
        return in_time

    def _request_cancel(self, handle: RequestHandle) -> None:
        with self._lock:
            if handle.outcome is None:
                self._cancelled.add(handle)
                self._lock.notify()

    def _run(self, warm_up: bool) -> None:
        try:
            self._serve(warm_up)
        except Exception:
            # Whatever ended the thread: no reader may wait forever.
            log.exception("the model has failed: the engine is closed")
            with self._lock:
                self.broken, self._closing = True, "cancel"
                handles = [handle for _, handle in self._new] + [handle for handle, _ in self._answers.values()]
                self._new.clear()
                self._answers.clear()
            self.ready.clear()
            for handle in handles:
                handle._end("failed")

    def _serve(self, warm_up: bool) -> None:
        if warm_up:
            start = time.monotonic()
            log.info("compiling what the first request needs ...")
            stream = StreamDecoder(self._outputs.codec, self._outputs.config.codec)
            # The compiler of the codec's programs runs while the others are traced, and the other way round.
            with ThreadPoolExecutor(1) as pool:
                codec = pool.submit(stream.warm_up)
                self._engine.warm_up(stop=lambda: self._closing == "cancel")
                codec.result()
            if self._closing != "cancel":
                seconds = time.monotonic() - start
                log.info("ready after %.1f s of compiling; the rest is compiled in the background", seconds)
                self._compiling = threading.Thread(target=self._compile_rest, name="omni_jax compiler", daemon=True)
                self._compiling.start()
        else:
            self.warmed_up.set()
        if self._closing != "cancel":
            self.ready.set()
        while self._process_orders():
            try:
                self._advance()
            except Exception:
                # A fault must not end the service: requests that it hits for the first time are answered again.
                log.exception("the running batch failed and is reset")
                for key in self._engine.reset():
                    self._end(key, "failed")

    def _process_orders(self) -> bool:
        """Wait for something to do; submit, cancel and expire requests. False when all is done."""
        with self._lock:
            while not (self._new or self._cancelled or self._answers or self._histories or self._closing):
                self._lock.wait()
            # One at a time: a request that arrives meanwhile comes first.
            history = self._histories.popleft() if self._histories else None
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, set()
            closing = self._closing
            for key, handle in new:
                self._answers[key] = (handle, AnswerBuilder(self._outputs, handle.request, streaming=True))
        for key, handle in new:
            try:
                self._engine.submit(key, handle.request)
            except Exception:
                log.exception("a request could not be queued")
                self._end(key, "failed")
        if history is not None:
            self._engine.remember(history)
        now = time.monotonic()
        for key, (handle, _) in list(self._answers.items()):
            if handle in cancelled or closing == "cancel":
                self._end(key, "cancelled")
            elif handle.deadline is not None and handle.deadline <= now:
                self._end(key, "expired")
        return bool(self._answers) or closing is None

    def _advance(self) -> None:
        if not self._engine.busy:
            return
        active = {request.key for request in self._engine.active if request is not None}
        # Newcomers are admitted before the chunk begins, and their first audio should come soon.
        newcomers = self._engine.has_room
        steps = [answer.next_steps for key, (_, answer) in self._answers.items() if key in active or newcomers]
        for progress in self._engine.advance(min(steps, default=1)):
            if progress.key not in self._answers:
                # Its answer has failed in this chunk, or the transcription of its question.
                continue
            handle, answer = self._answers[progress.key]
            if progress.error is not None:
                self._end(progress.key, "failed")
                continue
            try:
                chunk = answer.add(progress)
            except Exception:
                log.exception("an answer failed")
                self._end(progress.key, "failed")
                continue
            if chunk is not None:
                handle._put(chunk)
            if progress.done:
                self._end(progress.key, "done")

    def _compile_rest(self) -> None:
        """Compile the other programs, until the engine is closed."""
        for _ in self._engine.warm_up_rest():
            if self._closing is not None:
                return
        log.info("every program is compiled")
        self.warmed_up.set()

    def _end(self, key: int, outcome: Outcome) -> None:
        self._engine.cancel(key)
        with self._lock:
            handle, _ = self._answers.pop(key)
        handle._end(outcome)
