"""Many requests in one running batch: who sits in which slot, what each chunk computes, who has finished.

The host's side of `omni_jax.inference.decode`. It reads a chunk's tokens while the next chunk runs, so what it
knows is one chunk old; that only ever costs a chunk that does nothing, never a token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.audio.features import pad
from omni_jax.config import ConfigError
from omni_jax.inference.decode import LONGEST_CHUNK, DecodeState, Programs, Requests, Routing
from omni_jax.inference.sampling import Sampling
from omni_jax.prompts import Prompt, Task, speech_positions, speech_prompt, text_prompt
from omni_jax.vocab import STREAMS, TEXT, Vocab

PROMPT_BUCKETS = tuple(sorted({int(base * 2**power) for base in (16, 20, 24, 28) for power in range(12)}))
"""Lengths prompts are padded to: 16, 20, 24, 28, 32, 40, ..., so that at most a fifth is padding."""
FEW_BUCKETS = tuple(2**power for power in range(4, 16))
"""For those who compile everything beforehand: 16, 32, 64, ..., a quarter as many programs."""
CACHE_STEP = 256
"""Cache lengths are multiples of this, up to the trunk's context."""
MOST_PREFILL_ROWS = 8
"""Prompts prefilled at once; more are taken in turns."""


@dataclass(frozen=True)
class Request:
    """One thing to answer.

    Raises:
        ConfigError: a setting is out of range; names it.
    """

    prompt: Prompt
    speech: np.ndarray | None = None
    """float32 [samples] at 16 kHz, at most what the ear hears at once; None for text input."""
    max_steps: int | None = None
    """Stop after this many steps (finish reason `length`); None: when the trunk's context is full."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability; 1: from all."""
    seed: int = 0
    enforce_delay: bool = True
    """Whether an audio layer that is not yet due emits padding; False leaves it to the model."""
    batch_parallel: bool = True
    """A1A2 only: take the text from a second row that answers in text alone."""

    def __post_init__(self) -> None:
        def check(name: str, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
            value = getattr(self, name)
            if not isinstance(value, kind) or not fits(value):
                raise ConfigError(f"{name}: expected {expected}, found {value!r}")

        if self.max_steps is not None:
            check("max_steps", Integral, lambda steps: steps >= 1, "a whole number, at least 1")
        check("temperature", Real, lambda t: t >= 0 and np.isfinite(t), "a number, 0 or more")
        check("top_k", Integral, lambda k: k >= 0, "a whole number, 0 (all) or more")
        check("top_p", Real, lambda p: 0 < p <= 1, "a number above 0 and at most 1")
        check("seed", Integral, lambda seed: 0 <= seed < 2**32, "a whole number, 0..2^32-1")
        for name in ("enforce_delay", "batch_parallel"):
            check(name, bool, lambda _: True, "True or False")
        if (self.speech is not None) != self.prompt.task.hears:
            raise ConfigError(f"task {self.prompt.task}: expected speech exactly when the task hears")

    @property
    def parallel(self) -> bool:
        """Whether it gets a second row."""
        return self.batch_parallel and self.prompt.task is Task.A1A2

    def limit(self, context: int) -> int:
        """Steps it may take: the last step's tokens are never an input, so one more than the room left."""
        room = context - len(self.prompt) + 1
        return room if self.max_steps is None else min(self.max_steps, room)

    def cache_length(self, context: int) -> int:
        """Positions its cache needs, rounded up so that few shapes are compiled."""
        needed = len(self.prompt) - 1 + self.limit(context)
        return min(context, -(-needed // CACHE_STEP) * CACHE_STEP)


@dataclass(frozen=True)
class Progress:
    """What a request has newly said."""

    key: int
    tokens: np.ndarray
    """int32 [8, n]."""
    finish: str | None
    """None while it goes on. `stop`: said its end; `length`: max_steps; `context`: the trunk's context is full."""


@dataclass
class _Seat:
    key: int
    request: Request
    step: int = 0
    running: bool = True
    writing: bool = True
    shadow: int | None = None


@dataclass
class Engine:
    """A running batch of `slots` requests whose caches hold `length` positions; prompts are padded to `buckets`."""

    programs: Programs
    slots: int
    length: int
    buckets: Sequence[int] = PROMPT_BUCKETS
    queue: deque[tuple[int, Request]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.vocab = Vocab(self.programs.config.vocab)
        self.context = self.programs.config.trunk.context
        self.state: DecodeState = self.programs.empty(self.programs.weights, self.slots, self.length)
        self.seats: list[_Seat | None] = [None] * self.slots
        self.shadow_rows = 0
        self.unread: tuple[list[_Seat | None], jax.Array, jax.Array] | None = None

    def check(self, request: Request) -> None:
        """Make sure that a request can be answered here.

        Raises:
            ConfigError: its prompt does not fit the context, or it needs a longer cache than this batch has.
        """
        if len(request.prompt) > self.context:
            raise ConfigError(
                f"the prompt takes {len(request.prompt)} positions; expected at most the context of {self.context}"
            )
        if request.cache_length(self.context) > self.length:
            raise ConfigError(
                f"the request needs a cache of {request.cache_length(self.context)} positions, "
                f"this batch has {self.length}"
            )

    def submit(self, key: int, request: Request) -> None:
        """Queue a request under a number of the caller's.

        Raises:
            ConfigError: as `check`.
        """
        self.check(request)
        self.queue.append((key, request))

    @property
    def busy(self) -> bool:
        """Whether anything is queued, running or unread."""
        return bool(self.queue) or self.unread is not None or any(seat is not None for seat in self.seats)

    def advance(self, steps: int = LONGEST_CHUNK) -> list[Progress]:
        """Seat who waits, start a chunk of up to `steps` steps, and return what the chunk before it said."""
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        self._seat_waiting()
        read, self.unread = self.unread, None
        if any(seat is not None and seat.running for seat in self.seats):
            routing = self._route()
            self.state, tokens, status = self.programs.chunk(
                self.programs.weights, self.state, routing, jnp.int32(min(steps, LONGEST_CHUNK))
            )
            self.unread = (list(self.seats), tokens, status)
        return self._read(*read) if read else []

    def cancel(self, key: int) -> bool:
        """Forget a request, wherever it is; its slot is free at once, and nothing more is heard of it.

        Returns:
            Whether it was still there.
        """
        for index, (waiting, _) in enumerate(self.queue):
            if waiting == key:
                del self.queue[index]
                return True
        for slot, seat in enumerate(self.seats):
            if seat is not None and seat.key == key:
                # The chunk that runs may still speak for it: whoever reads that sees that it has stopped.
                seat.running = False
                self.seats[slot] = None
                self.state = self.programs.halt(self.state, jnp.int32(slot))
                return True
        return False

    def begin_anew(self) -> None:
        """Lose what runs and keep who waits: after a fault, when the state may be one that a program has consumed."""
        # The old state makes room before the new one is there.
        del self.state, self.unread
        self.__post_init__()

    def warm_up(self) -> None:
        """Compile, by running it on nothing, every program that any request can come to need here.

        Raises:
            RuntimeError: something is queued or running.
        """
        if self.busy:
            raise RuntimeError("a batch that is busy can't be warmed up")
        vocab, config = self.vocab, self.programs.config
        longest = speech_positions(config.ear.samples, config.ear.positions, config.adapter.stack)
        most_rows = min(self.slots, MOST_PREFILL_ROWS)
        rows = sorted({1 << (count - 1).bit_length() for count in range(1, most_rows + 1)})
        # Without a TTS adapter prefill does not depend on what is answered.
        tasks = (Task.T1A1, Task.A1A2, Task.T1T2, Task.A1T1) if config.tts_adapter_layers else (Task.T1A1, Task.A1A2)
        sizes = sorted({self._size(count) for count in range(self.slots + 1)})
        for shadows in sizes:
            self._resize_shadows([], 0)
            self._resize_shadows([], shadows)
            for task in tasks:
                most = min(longest + 2, self.length) if task.hears else self.length
                for length in sorted({self._padded(length) for length in range(1, most + 1)}):
                    prompt = speech_prompt(task, 1, vocab) if task.hears else text_prompt(task, [0], vocab)
                    request = Request(prompt, np.zeros(0, np.float32) if task.hears else None)
                    for count in rows:
                        nowhere = _Seat(-1, request)
                        self._prefill(length, task.hears, [(self.slots, nowhere)] * count)
            for texts, audios in itertools.product(sizes, sizes):
                # Whoever has a second row writes and speaks.
                if min(texts, audios) >= shadows and texts + audios:
                    idle = [jnp.full(size, self.slots, jnp.int32) for size in (shadows, texts, texts, audios)]
                    self.state, *_ = self.programs.chunk(
                        self.programs.weights, self.state, Routing(*idle), jnp.int32(1)
                    )
            self.state = self.programs.halt(self.state, jnp.int32(0))
            for other in sizes:
                self._resize_shadows([], other)
                self._resize_shadows([], shadows)
        self._resize_shadows([], 0)

    def run(self, steps: int = LONGEST_CHUNK) -> Iterator[Progress]:
        """Advance until nothing is left."""
        while self.busy:
            yield from self.advance(steps)

    def _read(self, seats: list[_Seat | None], tokens: jax.Array, status: jax.Array) -> list[Progress]:
        said, (steps, running, writing) = np.asarray(tokens), np.asarray(status)
        news = []
        for slot, seat in enumerate(seats):
            if seat is None or not seat.running:
                continue
            new = said[: steps[slot] - seat.step, slot].T
            seat.step, seat.running, seat.writing = int(steps[slot]), bool(running[slot]), bool(writing[slot])
            finish = None
            if not seat.running:
                finish = self._finish(seat, new)
                self.seats[slot] = None
            news.append(Progress(seat.key, new, finish))
        return news

    def _finish(self, seat: _Seat, new: np.ndarray) -> str:
        speaks = seat.request.prompt.task.speaks
        last, end = (new[TEXT - 1, -1], self.vocab.eoa) if speaks else (new[TEXT, -1], self.vocab.eot)
        if last == end:
            return "stop"
        return "length" if seat.step == seat.request.max_steps else "context"

    def _size(self, count: int) -> int:
        """Round a number of rows up to nothing, a quarter or all of the slots: few shapes, little idle work."""
        if not count:
            return 0
        quarter = self.slots // 4
        return quarter if 0 < count <= quarter else self.slots

    def _route(self) -> Routing:
        live = [(slot, seat) for slot, seat in enumerate(self.seats) if seat is not None and seat.running]
        writers = [(slot, seat) for slot, seat in live if seat.writing]
        speakers = [slot for slot, seat in live if seat.request.prompt.task.speaks]
        pairs = [(slot, seat) for slot, seat in writers if seat.shadow is not None]
        self._resize_shadows([seat for _, seat in pairs], self._size(len(pairs)))

        def fill(values: Sequence[int], size: int) -> jax.Array:
            return jnp.asarray(np.array([*values, *[self.slots] * (size - len(values))], np.int32))

        texts, audios = self._size(len(writers)), self._size(len(speakers))
        shadow_slot = np.full(self.shadow_rows, self.slots, np.int32)
        for slot, seat in pairs:
            shadow_slot[seat.shadow] = slot
        rows = [slot if seat.shadow is None else self.slots + seat.shadow for slot, seat in writers]
        return Routing(
            shadow_slot=jnp.asarray(shadow_slot),
            text_slot=fill([slot for slot, _ in writers], texts),
            text_row=fill(rows, texts),
            audio_slot=fill(speakers, audios),
        )

    def _resize_shadows(self, kept: Sequence[_Seat], size: int) -> None:
        """Keep the second rows of these seats alone, in a cache of `size` rows."""
        if size == self.shadow_rows:
            return
        shadows = None
        if size:
            if self.state.shadows is None:
                shadows = self.programs.shadows(self.programs.weights, size, self.length)
            else:
                rows = [seat.shadow for seat in kept if seat.shadow is not None]
                rows += [0] * (size - len(rows))
                shadows = self.programs.keep_shadows(self.state.shadows, jnp.asarray(np.array(rows, np.int32)))
                for index, seat in enumerate(kept):
                    seat.shadow = index
        self.state = dataclasses.replace(self.state, shadows=shadows)
        self.shadow_rows = size

    def _seat_waiting(self) -> None:
        free = [slot for slot, seat in enumerate(self.seats) if seat is None]
        arrivals = []
        for key, request in self._next_in(len(free)):
            seat = _Seat(key, request, writing=request.prompt.task.writes)
            slot = free.pop(0)
            self.seats[slot] = seat
            arrivals.append((slot, seat))
        if not arrivals:
            return
        # Second rows for the newcomers, beside those in use.
        newcomers = [seat for _, seat in arrivals if seat.request.parallel]
        if newcomers:
            kept = [s for s in self.seats if s is not None and s.running and s.writing and s.shadow is not None]
            self._resize_shadows(kept, self._size(len(kept) + len(newcomers)))
            used = {seat.shadow for seat in kept}
            unused = (row for row in range(self.shadow_rows) if row not in used)
            for seat in newcomers:
                seat.shadow = next(unused)
        groups: dict[tuple[int, bool], list[tuple[int, _Seat]]] = {}
        for slot, seat in arrivals:
            groups.setdefault(self._prefill_shape(seat.request), []).append((slot, seat))
        for (length, hears), group in groups.items():
            for start in range(0, len(group), MOST_PREFILL_ROWS):
                self._prefill(length, hears, group[start : start + MOST_PREFILL_ROWS])

    def _next_in(self, free: int) -> list[tuple[int, Request]]:
        """Take from the queue whoever is seated now, at most `free`.

        While others run they wait for one prefill at most: then only those who share the first one's are let in.
        """
        if not any(seat is not None for seat in self.seats):
            return [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        if not free or not self.queue:
            return []
        shape, rows = self._prefill_shape(self.queue[0][1]), min(free, MOST_PREFILL_ROWS)
        chosen: list[tuple[int, Request]] = []
        left: deque[tuple[int, Request]] = deque()
        for entry in self.queue:
            together = len(chosen) < rows and self._prefill_shape(entry[1]) == shape
            (chosen if together else left).append(entry)
        self.queue = left
        return chosen

    def _prefill_shape(self, request: Request) -> tuple[int, bool]:
        """Padded length, and whether there is speech: prompts alike in this are prefilled together."""
        return self._padded(len(request.prompt) - 1), request.prompt.task.hears

    def _padded(self, length: int) -> int:
        return min(next(size for size in self.buckets if size >= length), self.length)

    def _prefill(self, length: int, hears: bool, group: list[tuple[int, _Seat]]) -> None:
        count = len(group)
        rows = 1 << (count - 1).bit_length()
        tokens = np.full((rows, STREAMS, length), self.vocab.pad_a, np.int32)
        tokens[:, TEXT] = self.vocab.pad_t
        for row, (_, seat) in enumerate(group):
            prompt = seat.request.prompt.tokens[:, :-1]
            tokens[row, :, : prompt.shape[1]] = prompt

        def column(values: Sequence[float], dtype: type, filler: float = 0) -> jax.Array:
            return jnp.asarray(np.array([*values, *[filler] * (rows - count)], dtype))

        speech = positions = None
        if hears:
            ear = self.programs.config.ear
            sound = np.zeros((rows, ear.samples), np.float32)
            for row, (_, seat) in enumerate(group):
                assert seat.request.speech is not None
                sound[row] = pad(seat.request.speech, ear.samples)
            speech = self.programs.hear(self.programs.weights, jnp.asarray(sound))
            positions = column([seat.request.prompt.speech_positions for _, seat in group], np.int32)
        asks = [seat.request for _, seat in group]
        caches = self.programs.prefill(
            self.programs.weights,
            jnp.asarray(tokens),
            speech,
            positions,
            # Only a TTS adapter's cache depends on it: without one there is one program less per shape.
            audio=self.programs.config.tts_adapter_layers > 0 and any(ask.prompt.task.speaks for ask in asks),
        )
        last = np.zeros((rows, STREAMS), np.int32)
        last[:count] = [ask.prompt.tokens[:, -1] for ask in asks]
        arrivals = DecodeState(
            tokens=jnp.asarray(last),
            positions=column([len(ask.prompt) - 1 for ask in asks], np.int32),
            step=jnp.zeros(rows, jnp.int32),
            running=jnp.ones(rows, bool),
            writing=column([ask.prompt.task.writes for ask in asks], bool),
            requests=Requests(
                speaks=column([ask.prompt.task.speaks for ask in asks], bool),
                limit=column([ask.limit(self.context) for ask in asks], np.int32),
                enforce_delay=column([ask.enforce_delay for ask in asks], bool),
                sampling=Sampling(
                    temperature=column([ask.temperature for ask in asks], np.float32),
                    top_k=column([ask.top_k for ask in asks], np.int32),
                    top_p=column([ask.top_p for ask in asks], np.float32, 1),
                    seed=column([ask.seed for ask in asks], np.uint32),
                ),
            ),
            caches={},
            shadows=None,
        )
        nowhere = self.slots
        shadows = [nowhere if seat.shadow is None else seat.shadow for _, seat in group]
        self.state = self.programs.join(
            self.state,
            caches,
            column([slot for slot, _ in group], np.int32, nowhere),
            column(shadows, np.int32, nowhere),
            arrivals,
        )
