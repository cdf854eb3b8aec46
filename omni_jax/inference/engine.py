"""Continuous batching: slot assignment, what each chunk computes, and which requests have finished.

The host's side of `omni_jax.inference.decode`. It reads a chunk's tokens while the next chunk runs, so its knowledge
is one chunk old; that costs at most a chunk that does nothing, never a token.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.audio.features import pad
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.errors import ConfigError
from omni_jax.inference.decode import MAX_CHUNK_STEPS, DecodeState, Routing, SlotParams
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.page_pool import PagePool
from omni_jax.inference.prefix_cache import Prefix, PrefixCache
from omni_jax.inference.runner import ModelRunner
from omni_jax.inference.sampling import Sampling
from omni_jax.model.pages import PAGE_LEN, Cache, PageTable, pages_for
from omni_jax.prompts import (
    History,
    Prompt,
    max_speech_positions,
    speech_positions,
    speech_prompt,
    text_prompt,
)
from omni_jax.tasks import Task
from omni_jax.vocab import NUM_STREAMS, TEXT_STREAM, Vocab

log = logging.getLogger(__name__)

PROMPT_BUCKETS = tuple(sorted({int(base * 2**power) for base in (16, 20, 24, 28) for power in range(12)}))
"""Lengths prompts are padded to: 16, 20, 24, 28, 32, 40, ..., so that at most a fifth is padding."""
COARSE_PROMPT_BUCKETS = tuple(2**power for power in range(4, 16))
"""For engines that compile everything beforehand: 16, 32, 64, ..., a quarter as many programs."""
CACHE_LEN_STEP = 256
"""Cache lengths are multiples of this, up to the trunk's context."""
MAX_PREFILL_ROWS = 8
"""Prompts prefilled at once; more are taken in turns."""

WEIGHTS_COST = 256
"""Reading the weights takes as long as prefilling so many positions: about a TPU's operations per byte it reads."""
AHEAD_STEPS = 16
"""A request is admitted if there are pages for so many more steps of it and of all that run, or for a longer chunk."""
MAX_TO_REMEMBER = 64
"""Histories that wait to be remembered; of more, the first are forgotten, and prefilled with their next turn."""

FinishReason = Literal["stop", "length", "context"]
"""`stop`: end of audio, or of text in text-only tasks; `length`: max_steps; `context`: the trunk's context is full."""


def next_power_of_2(count: int) -> int:
    """The smallest power of 2 that is not below `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class Part:
    """What the model takes at once: a question, a sentence to read aloud, or a window of a long recording.

    Raises:
        ConfigError: there is speech for a task that takes text, or none for one that takes audio.
    """

    prompt: Prompt
    speech: np.ndarray | None = None
    """float32 [samples] at 16 kHz, at most what the audio encoder takes at once; None for text input."""
    text: str = ""
    """T1A1: what is read aloud."""
    start: int = 0
    """Samples of the recording before `speech`."""

    def __post_init__(self) -> None:
        if (self.speech is not None) != self.prompt.task.takes_audio:
            raise ConfigError(f"task {self.prompt.task}: expected speech exactly when the task takes audio")


@dataclass(frozen=True)
class PreparedRequest:
    """One request, validated and tokenized. Its parts are answered one after another, in one answer."""

    task: Task
    parts: tuple[Part, ...]
    """None, if there is nothing to transcribe."""
    config: GenerationConfig = field(default_factory=GenerationConfig)
    duration: float = 0.0
    """Seconds of the recording, whatever of it is used."""
    transcription: PreparedRequest | None = None
    """Transcribes the question next to the answer, in a batch slot of its own."""
    of_question: bool = False
    """Whether it is the `transcription` of a request, whose key it has."""

    @classmethod
    def of(
        cls, prompt: Prompt, speech: np.ndarray | None = None, config: GenerationConfig | None = None
    ) -> PreparedRequest:
        """A request of one part."""
        return cls(prompt.task, (Part(prompt, speech),), config or GenerationConfig())

    @property
    def prompt(self) -> Prompt:
        """Of the first part."""
        return self.parts[0].prompt

    @property
    def has_companion(self) -> bool:
        """Whether it is decoded batch-parallel, with a companion row."""
        return self.config.batch_parallel and self.task is Task.A1A2

    @property
    def longest_prompt(self) -> int:
        """Positions of the longest prompt."""
        return max((len(part.prompt) for part in self.parts), default=0)

    def max_steps(self, context: int) -> int:
        """Steps after the first prompt: the last step's tokens are never an input, so one more than the room left."""
        room = context - len(self.prompt) + 1
        return room if self.config.max_steps is None else min(self.config.max_steps, room)

    def cache_len(self, context: int) -> int:
        """Positions its cache needs, rounded up so that few shapes are compiled."""
        needed = self.longest_prompt - 1 + self.max_steps(context) if self.parts else 1
        return min(context, -(-needed // CACHE_LEN_STEP) * CACHE_LEN_STEP)

    def after_first(self, steps: int) -> PreparedRequest:
        """What is left once the first part is answered, which took so many steps."""
        max_steps = self.config.max_steps
        config = self.config if max_steps is None else self.config.replace(max_steps=max_steps - steps)
        return dataclasses.replace(self, parts=self.parts[1:], config=config)


@dataclass(frozen=True)
class Progress:
    """New tokens of a request."""

    key: int
    tokens: np.ndarray
    """int32 [8, n]."""
    finish: FinishReason | None
    """None while it goes on."""
    part_finish: FinishReason | None = None
    """How a part ended that others follow; `finish` is None then."""
    error: Exception | None = None
    """Why the request has failed: nothing follows, and the other requests go on."""
    of_question: bool = False
    """Whether the tokens are those of the question's transcription; `finish` is the transcription's then."""
    pending: bool = False
    """Whether the other one of the answer and the transcription goes on when this one has ended."""
    cached: int = 0
    """Positions of the prompt that the prefix cache had; known when `finish` is."""

    @property
    def done(self) -> bool:
        """Whether the request has ended, and its transcription, if it has one."""
        return self.finish is not None and not self.pending


@dataclass
class ActiveRequest:
    """A request in a batch slot, as far as the host has read."""

    key: int
    request: PreparedRequest
    reported: int = 0
    """Steps that were reported before the batch was reset; they are decoded again, but not reported again."""
    step: int = 0
    running: bool = True
    text_pending: bool = True
    prefix: Prefix | None = None
    """The beginning of its history, if it was found in the prefix cache."""
    number: int = 0
    """Counts admissions: the youngest has the highest."""
    started: int = 0
    """Steps at most, with those of chunks that have not been read."""
    pages: list[int] = field(default_factory=list)
    """Of its batch slot, numbered within the group."""
    companion_pages: list[int] = field(default_factory=list)
    """Of its companion row."""

    @property
    def identity(self) -> tuple[int, bool]:
        """What no other request in a batch slot has: an answer and the transcription of its question share a key."""
        return self.key, self.request.of_question

    @property
    def has_companion_row(self) -> bool:
        """Whether its text comes from a companion row, and goes on."""
        return self.request.has_companion and self.text_pending

    def pages_needed(self, steps: int, page_len: int, context: int) -> int:
        """Pages that a row of it needs when so many steps have been started."""
        steps = min(steps, self.request.max_steps(context))
        return pages_for(len(self.request.prompt) - 1 + steps, page_len)


_Program = tuple[str, tuple[Any, ...]]
"""What `Engine` compiles in one of its methods, and the method's arguments."""
_Shape = tuple[Task, int, int, bool]
"""How requests are prefilled: see `Engine._prefilled_as`; padded length, the audio encoder's window (0 without speech),
whether after a prefix. Those that differ at most in the first are prefilled together."""


class Engine:
    """A running batch.

    Attributes:
        max_batch_size: requests decoded at once.
        max_len: positions of each slot's cache at most.
        page_len: positions of a page.
        queue: submitted requests that have no slot yet, with their keys.
        active: the request of each batch slot.
        pages: the pages of the cache. If they run out, the youngest request gives its own back and returns to the
            queue.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_batch_size: int,
        max_len: int,
        buckets: Sequence[int] = PROMPT_BUCKETS,
        prefixes: PrefixCache | None = None,
        *,
        num_pages: int | None = None,
        page_len: int = PAGE_LEN,
    ):
        """Allocate the batch.

        Args:
            runner: the model.
            max_batch_size: requests decoded at once.
            max_len: positions of each slot's cache at most.
            buckets: lengths that prompts are padded to.
            prefixes: histories whose keys and values are known; None: a new one.
            num_pages: of the cache, at least those of one request with its companion row; None, or more than that:
                those of all batch slots and companion rows at full length, which are never short of pages.
            page_len: positions of a page.

        Raises:
            ConfigError: there are too few pages.
        """
        self.prefixes = PrefixCache() if prefixes is None else prefixes
        self.runner, self.max_batch_size, self.max_len, self.buckets = runner, max_batch_size, max_len, buckets
        self.page_len = page_len = min(page_len, max_len)
        self.groups, columns = runner.row_groups(max_batch_size), pages_for(max_len, page_len)
        most = 2 * max_batch_size * columns
        per_group = (most if num_pages is None else min(num_pages, most)) // self.groups
        if per_group < 2 * columns:
            raise ConfigError(
                f"the cache has {per_group} pages of {page_len} positions for each of {self.groups} groups of rows; "
                f"expected at least {2 * columns}, those of one request and its companion row"
            )
        self.columns, self._per_group = columns, per_group
        self.vocab = Vocab(runner.config.vocab)
        self.context = runner.config.trunk.max_position
        self.queue: deque[tuple[int, PreparedRequest]] = deque()
        self._nothing_to_do: list[int] = []
        self._failures: list[Progress] = []
        # Steps reported of requests that are answered again, after a fault or because the pages ran out, by key and
        # whether they transcribe the question.
        self._reported: dict[tuple[int, bool], int] = {}
        self._faulted: set[tuple[int, bool]] = set()
        self._admitted = 0
        self._to_remember: deque[History] = deque(maxlen=MAX_TO_REMEMBER)
        # Empty unless `warm_up_rest` is used, maybe by another thread: any program is compiled when it is needed.
        self._compiled: set[_Program] = set()
        # Of requests with a transcription, how many of the two have not ended.
        self._unfinished: dict[int, int] = {}
        self._init_batch()

    def _init_batch(self) -> None:
        self.state: DecodeState = self.runner.init_state(
            self.max_batch_size, self.groups * self._per_group, self.page_len
        )
        self.active: list[ActiveRequest | None] = [None] * self.max_batch_size
        self.pages = PagePool(self.groups, self._per_group)
        # With how many steps it was started.
        self.in_flight: tuple[list[ActiveRequest | None], jax.Array, jax.Array, int] | None = None
        # Prefilled histories, each with its row of the caches, that are not in the prefix cache yet.
        self._to_keep: list[tuple[dict[str, Cache], list[tuple[int, History]]]] = []
        # The last recordings that were encoded, if they may be needed once more.
        self._encoded: tuple[list[np.ndarray], jax.Array] | None = None

    def check(self, request: PreparedRequest) -> None:
        """Make sure that a request can be answered here.

        Raises:
            ConfigError: its prompt does not fit the context, or it needs a longer cache than this batch has.
        """
        if request.longest_prompt > self.context:
            raise ConfigError(
                f"the prompt takes {request.longest_prompt} positions; expected at most the context of {self.context}"
            )
        if request.cache_len(self.context) > self.max_len:
            raise ConfigError(
                f"the request needs a cache of {request.cache_len(self.context)} positions, "
                f"this batch has {self.max_len}"
            )

    def submit(self, key: int, request: PreparedRequest) -> None:
        """Queue a request under a number of the caller's.

        Raises:
            ConfigError: as `check`.
        """
        self.check(request)
        if request.parts:
            # Whatever it could fail with in the queue, it fails with here.
            self._prefill_shape(request, None)
            self.queue.append((key, request))
            if request.transcription is not None:
                self.queue.append((key, request.transcription))
                self._unfinished[key] = 2
        else:
            self._nothing_to_do.append(key)

    def remember(self, history: History) -> None:
        """Compute the keys and values of a history before the turn that will follow, once no request is queued.

        Raises:
            ConfigError: it is longer than the slots' caches.
        """
        if len(history) > self.max_len:
            raise ConfigError(f"the history takes {len(history)} positions, this batch has {self.max_len}")
        self._to_remember.append(history)

    @property
    def busy(self) -> bool:
        """Whether anything is queued, active or in flight, or a history is to be remembered."""
        return (
            bool(self.queue or self._nothing_to_do or self._failures or self._to_remember)
            or self.in_flight is not None
            or any(self.active)
        )

    @property
    def has_room(self) -> bool:
        """Whether the first request of the queue is admitted before the next chunk, if that is a short one."""
        if not self.queue:
            return False
        slots, room = self._room(AHEAD_STEPS)
        first = self._to_admit(*self.queue[0])
        needed = self._needed(first, first.reported + AHEAD_STEPS)
        return any(free and needed <= pages for free, pages in zip(slots, room, strict=True))

    def advance(self, steps: int = MAX_CHUNK_STEPS) -> list[Progress]:
        """Admit queued requests, start a chunk of up to `steps` steps, and return the tokens of the chunk before.

        A request that cannot be admitted or read fails by itself: see `Progress.error`. Any other exception concerns
        the whole batch: see `reset`.
        """
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        steps = min(steps, MAX_CHUNK_STEPS)
        self._admit(max(steps, AHEAD_STEPS))
        if self._to_remember and not self.queue:
            self._prefill_history(self._to_remember.popleft())
        previous, self.in_flight = self.in_flight, None
        self._take_pages(steps)
        if any(active is not None and active.running for active in self.active):
            routing = self._route()
            self.state, tokens, status = self.runner.decode_chunk(self.state, routing, jnp.int32(steps))
            self.in_flight = (list(self.active), tokens, status, steps)
        self._keep_histories()
        empty, self._nothing_to_do = self._nothing_to_do, []
        progress = [Progress(key, _no_tokens(), "stop") for key in empty]
        if previous:
            progress += self._read(*previous)
        self._drop_unread_chunk()
        failures, self._failures = self._failures, []
        return progress + failures

    def cancel(self, key: int) -> bool:
        """Drop a request, queued or active; its slot is free at once, and no more progress is returned for it.

        Returns:
            Whether it was still there.
        """
        self._unfinished.pop(key, None)
        for of_question in (False, True):
            self._reported.pop((key, of_question), None)
            self._faulted.discard((key, of_question))
        if key in self._nothing_to_do:
            self._nothing_to_do.remove(key)
            return True
        left = deque(entry for entry in self.queue if entry[0] != key)
        found = len(left) < len(self.queue)
        self.queue = left
        for slot, active in enumerate(self.active):
            if active is not None and active.key == key:
                self._stop(slot, active)
                found = True
        self._drop_unread_chunk()
        return found

    def _stop(self, slot: int, active: ActiveRequest) -> None:
        """Stop an active request; its slot and its pages are free."""
        self._free(slot, active)
        self.state = self.runner.stop(self.state, jnp.int32(slot))

    def _free(self, slot: int, active: ActiveRequest) -> None:
        """Free the slot and the pages of a request that has ended or is stopped.

        The chunk in flight may have tokens for it, which `_read` skips, and still writes to its pages, before any other
        request does.
        """
        active.running = False
        self.active[slot] = None
        self.pages.give_back(self._group_of(slot), [*active.pages, *active.companion_pages])
        active.pages, active.companion_pages = [], []

    def _group_of(self, slot: int) -> int:
        return slot * self.groups // self.max_batch_size

    def _drop_unread_chunk(self) -> None:
        """Drop the chunk in flight if all its requests have ended: with it they and their recordings would stay."""
        if self.in_flight is not None and not any(active and active.running for active in self.in_flight[0]):
            self.in_flight = None

    def reset(self) -> list[int]:
        """Start over after a fault of the whole batch, when a program may have consumed the state.

        Active requests are answered again, once: their tokens are the same up to rounding, and those that were reported
        are not reported again. Queued requests stay queued.

        Returns:
            Keys of requests that are dropped: this was their second fault. If none was active, it is the first in the
            queue, so that no request can cause faults forever.
        """
        active = [active for active in self.active if active is not None]
        # The old state is freed before the new one is allocated.
        del self.state, self.in_flight
        self._init_batch()
        dropped = {entry.key for entry in active if entry.identity in self._faulted}
        for entry in sorted(active, key=lambda entry: entry.number, reverse=True):
            self._faulted.add(entry.identity)
            self._reported[entry.identity] = max(entry.step, entry.reported)
            self.queue.appendleft((entry.key, entry.request))
        if not active and self.queue:
            dropped = {self.queue[0][0]}
        for key in dropped:
            # A transcription is of no use without its answer, nor the other way round.
            self.cancel(key)
        return sorted(dropped)

    def warm_up(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Compile the programs of one spoken question of 3 s, by running them on nothing.

        They are what the first request most likely needs, and a small part of all; see `warm_up_rest`.

        Args:
            stop: asked between two programs whether to leave out the rest.

        Raises:
            RuntimeError: something is queued or active.
        """
        if self.busy:
            raise RuntimeError("a busy engine cannot be warmed up")
        for program in self._first_programs():
            if stop():
                return
            self._compile(program)

    def warm_up_rest(self) -> Iterator[None]:
        """Compile every other program that any request can need here, one for each item.

        Nothing is run, so that another thread can do it while this engine answers requests. From the first item on, a
        request gets a larger program that is compiled rather than a smaller one that is not. Those that fit many
        requests come first, then the likeliest: those of one request alone.
        """
        compiler = Engine(
            self.runner.compiler(),
            self.max_batch_size,
            self.max_len,
            self.buckets,
            num_pages=self.pages.total,
            page_len=self.page_len,
        )
        self._compiled.update(self._first_programs())
        others = sorted(dict.fromkeys(self._other_programs()), key=self._num_requests)
        for program in dict.fromkeys([*self._general_programs(), *others]):
            if program in self._compiled:
                continue
            try:
                compiler._compile(program)
            except Exception:
                log.exception("a program could not be compiled beforehand: %s", program)
            else:
                self._compiled.add(program)
            yield

    def _compile(self, program: _Program) -> None:
        kind, sizes = program
        compile_programs: Callable[..., None] = getattr(self, f"_compile_{kind}")
        compile_programs(*sizes)

    def _first_programs(self) -> list[_Program]:
        encoder, few, samples = self.runner.config.audio_encoder, self._bucket_rows(1), self._usual_samples
        positions = speech_positions(samples, encoder.max_position, self.runner.config.adapter.stack)
        length = self._padded(len(speech_prompt(Task.A1A2, positions, self.vocab)) - 1)
        return [
            ("encode", (encoder.window(samples), 1)),
            ("prefill", (Task.A1A2, length, False, 1)),
            ("decode", (self._bucket_companions(1), few, few)),
            ("decode", (0, 0, few)),
            ("stop", ()),
        ]

    @property
    def _usual_samples(self) -> int:
        """Of a spoken question of 3 s, or as long as the audio encoder takes."""
        return min(3 * SAMPLE_RATE, self.runner.config.audio_encoder.max_samples)

    def _general_programs(self) -> Iterator[_Program]:
        """Those that fit any requests, one after another: without them many would wait for a compiler."""
        per_group = self.max_batch_size // self.groups
        yield "decode", (self._bucket_companions(per_group), self.max_batch_size, self.max_batch_size)
        for window in self.runner.config.audio_encoder.windows:
            yield "encode", (window, 1)
        for task, after_prefix in itertools.product(self._prefilled_tasks, self._with_prefix):
            yield "prefill", (task, self._lengths(task)[-1], after_prefix, 1)

    def _other_programs(self) -> Iterator[_Program]:
        sizes = sorted({self._bucket_rows(count) for count in range(self.max_batch_size + 1)})
        of_companions = sorted({self._bucket_companions(n) for n in range(self.max_batch_size // self.groups + 1)})
        for companions, texts, audios in itertools.product(of_companions, sizes, sizes):
            # A request with a companion row outputs text and audio.
            if (min(texts, audios) >= companions or self.groups > 1) and texts + audios:
                yield "decode", (companions, texts, audios)
        max_rows = min(self.max_batch_size, MAX_PREFILL_ROWS)
        rows = sorted({next_power_of_2(count) for count in range(1, max_rows + 1)})
        for window, count in itertools.product(self.runner.config.audio_encoder.windows, rows):
            yield "encode", (window, count)
        for task, after_prefix, count in itertools.product(self._prefilled_tasks, self._with_prefix, rows):
            for length in self._lengths(task):
                yield "prefill", (task, length, after_prefix, count)

    @property
    def _with_prefix(self) -> tuple[bool, ...]:
        return (False, True) if self.runner.config.conversation else (False,)

    @property
    def _prefilled_tasks(self) -> tuple[Task, ...]:
        return tuple(dict.fromkeys(self._prefilled_as(task, task.outputs_audio) for task in Task))

    def _prefilled_as(self, task: Task, outputs_audio: bool) -> Task:
        """The task that stands for all whose prompts the same programs prefill.

        Only the TTS adapter's cache depends on what is output; without one there is one program less per shape.
        """
        if outputs_audio or not self.runner.config.tts_adapter_layers:
            return Task.A1A2 if task.takes_audio else Task.T1A2
        return Task.A1T2 if task.takes_audio else Task.T1T2

    def _lengths(self, task: Task) -> list[int]:
        """What prompts of a task are padded to."""
        config = self.runner.config
        # Any prompt may follow a history.
        speech_only = task.takes_audio and not config.conversation
        most = min(max_speech_positions(config) + 2, self.max_len) if speech_only else self.max_len
        return sorted({self._padded(length) for length in range(1, most + 1)})

    def _num_requests(self, program: _Program) -> int:
        """How many requests there must be at once for a program to be needed."""
        kind, sizes = program
        if kind != "decode":
            return int(sizes[-1]) // 2 + 1
        few = self._bucket_rows(1)
        of_one = (self._bucket_companions(1), few, few)
        return max(1 if size <= one else few + 1 for size, one in zip(sizes, of_one, strict=True))

    def _compile_encode(self, window: int, rows: int) -> None:
        self.runner.encode_audio(jnp.asarray(np.zeros((rows, 320 * window), np.float32)))

    def _compile_prefill(self, task: Task, length: int, after_prefix: bool, rows: int) -> None:
        if task.takes_audio:
            # In the window that is compiled first: prefill is the same for all.
            speech = np.zeros(self._usual_samples, np.float32)
            request = PreparedRequest.of(speech_prompt(task, 1, self.vocab), speech)
        else:
            request = PreparedRequest.of(text_prompt(task, [0], self.vocab))
        prefix = self._empty_prefix() if after_prefix else None
        _, _, window, _ = self._prefill_shape(request, prefix)
        group = [(self.max_batch_size, ActiveRequest(-1, request, prefix=prefix))]
        self._prefill((task, length, window, after_prefix), rows, group)

    def _compile_decode(self, companions: int, texts: int, audios: int) -> None:
        def unused(size: int) -> jax.Array:
            # From the host, as `_route` sends them: that is compiled, too.
            return jnp.asarray(np.full(size, self.max_batch_size, np.int32))

        pages = self._page_table({}, companions)
        routing = Routing(unused(companions), unused(texts), unused(texts), unused(audios), pages)
        self.state, *_ = self.runner.decode_chunk(self.state, routing, jnp.int32(1))

    def _compile_stop(self) -> None:
        self.state = self.runner.stop(self.state, jnp.int32(0))

    def _empty_prefix(self) -> Prefix:
        """A prefix of no positions."""
        return Prefix(
            0, jax.tree.map(lambda x: np.zeros((*x.shape[:-4], 1, x.shape[-3], 0, x.shape[-1])), self.state.caches)
        )

    def _decode_sizes(self, *needed: int) -> tuple[int, ...]:
        """Companion, text and audio rows of the smallest compiled program that has so many; without one, these."""
        fitting = [
            sizes
            for kind, sizes in self._compiled.copy()
            if kind == "decode" and all(size >= least for size, least in zip(sizes, needed, strict=True))
        ]
        return min(fitting, key=sum, default=needed)

    def _prefill_sizes(self, shape: _Shape, count: int) -> tuple[_Shape, int]:
        """Shape and rows of the programs that prefill so many requests of a shape, in turns if they are more.

        Of those that are compiled the cheapest, if possible with the audio encoder; without any, those that fit best.
        """
        task, length, window, after_prefix = shape
        compiled = self._compiled.copy()
        fitting = [
            (sizes[1], sizes[-1])
            for kind, sizes in compiled
            if kind == "prefill" and (sizes[0], sizes[2]) == (task, after_prefix) and sizes[1] >= length
        ]

        def cost(fit: tuple[int, int]) -> tuple[bool, int, int]:
            columns, rows = fit
            waits = window > 0 and ("encode", (window, rows)) not in compiled
            return waits, (columns * rows + WEIGHTS_COST) * -(-count // rows), columns

        length, rows = min(fitting, key=cost, default=(length, next_power_of_2(count)))
        return (task, length, window, after_prefix), rows

    def run(self, steps: int = MAX_CHUNK_STEPS) -> Iterator[Progress]:
        """Advance until nothing is left."""
        while self.busy:
            yield from self.advance(steps)

    def _read(
        self, slots: list[ActiveRequest | None], tokens: jax.Array, status: jax.Array, most_steps: int
    ) -> list[Progress]:
        chunk, (steps, running, text_pending) = np.asarray(tokens), np.asarray(status)
        progress = []
        for slot, active in enumerate(slots):
            if active is None or not active.running:
                continue
            tokens_of_slot = chunk[: steps[slot] - active.step, slot].T
            new = tokens_of_slot[:, max(0, active.reported - active.step) :]
            active.started += int(steps[slot]) - active.step - most_steps
            active.step, active.running = int(steps[slot]), bool(running[slot])
            active.text_pending = bool(text_pending[slot])
            if not active.has_companion_row:
                self.pages.give_back(self._group_of(slot), active.companion_pages)
                active.companion_pages = []
            if active.running:
                progress.append(Progress(active.key, new, None, of_question=active.request.of_question))
                continue
            self._free(slot, active)
            try:
                progress.append(self._end_part(active, new, tokens_of_slot[:, -1]))
            except Exception as error:
                self._fail(slot, active, error)
        return progress

    def _fail(self, slot: int, active: ActiveRequest, error: Exception) -> None:
        """End a request that has failed by itself, and the transcription of its question."""
        log.error("a request has failed; the others go on", exc_info=error)
        self._free(slot, active)
        self.cancel(active.key)
        self._failures.append(Progress(active.key, _no_tokens(), None, error=error))

    def _end_part(self, active: ActiveRequest, new: np.ndarray, last: np.ndarray) -> Progress:
        """The last tokens of a part that have not been reported, and its last step's; the next part is queued, if any.

        A part that is answered again may end where it did not end before: what its programs compute depends on the
        other requests, up to rounding. Then all of it has been reported.
        """
        finish = self._finish_reason(active, last)
        self._reported.pop(active.identity, None)
        self._faulted.discard(active.identity)
        if len(active.request.parts) == 1:
            unfinished = self._unfinished.pop(active.key, 1) - 1
            if unfinished:
                self._unfinished[active.key] = unfinished
            question = active.request.of_question
            cached = 0 if active.prefix is None else active.prefix.length
            return Progress(active.key, new, finish, of_question=question, pending=unfinished > 0, cached=cached)
        if active.step == active.request.config.max_steps:
            return Progress(active.key, new, "length")
        rest = (active.key, active.request.after_first(active.step))
        if active.request.task is Task.A1T1:
            # An hour of sound must not keep those waiting that want a sentence.
            self.queue.append(rest)
        else:
            # The next sentence is spoken at once.
            self.queue.appendleft(rest)
        return Progress(active.key, new, None, finish)

    def _finish_reason(self, active: ActiveRequest, last: np.ndarray) -> FinishReason:
        audio, text = last[TEXT_STREAM - 1], last[TEXT_STREAM]
        if audio == self.vocab.eoa if active.request.task.outputs_audio else text == self.vocab.eot:
            return "stop"
        return "length" if active.step == active.request.config.max_steps else "context"

    def _bucket_rows(self, count: int) -> int:
        """Round a number of rows up to none, a quarter or all of the slots: few shapes, little idle work."""
        if not count:
            return 0
        quarter = self.max_batch_size // 4
        return quarter if count <= quarter else self.max_batch_size

    def _bucket_companions(self, per_group: int) -> int:
        """The companion rows of all groups, if one group needs so many."""
        return -(-self._bucket_rows(self.groups * per_group) // self.groups) * self.groups

    def _route(self) -> Routing:
        running = [(slot, active) for slot, active in enumerate(self.active) if active is not None and active.running]
        text = [(slot, active) for slot, active in running if active.text_pending]
        audio = [slot for slot, active in running if active.request.task.outputs_audio]
        # Companion rows in the group of their slot; the groups have equal numbers of rows.
        paired: list[list[int]] = [[] for _ in range(self.groups)]
        for slot, active in text:
            if active.has_companion_row:
                paired[self._group_of(slot)].append(slot)
        companions, texts, audios = self._decode_sizes(
            self._bucket_companions(max(map(len, paired))), self._bucket_rows(len(text)), self._bucket_rows(len(audio))
        )
        companion_of = {
            slot: group * companions // self.groups + index
            for group, slots in enumerate(paired)
            for index, slot in enumerate(slots)
        }
        companion_slot = np.full(companions, self.max_batch_size, np.int32)
        for slot, companion in companion_of.items():
            companion_slot[companion] = slot
        rows = [self.max_batch_size + companion_of[slot] if slot in companion_of else slot for slot, _ in text]
        return Routing(
            companion_slot=jnp.asarray(companion_slot),
            text_slot=_column([slot for slot, _ in text], texts, np.int32, self.max_batch_size),
            text_row=_column(rows, texts, np.int32, self.max_batch_size),
            audio_slot=_column(audio, audios, np.int32, self.max_batch_size),
            pages=self._page_table(companion_of, companions),
        )

    def _page_table(self, companion_of: Mapping[int, int], companions: int) -> PageTable:
        """The pages of all rows.

        Args:
            companion_of: the companion row of batch slots.
            companions: companion rows.
        """
        tables = [
            np.full((size, self.columns), self._per_group, np.int32) for size in (self.max_batch_size, companions)
        ]
        for slot, active in enumerate(self.active):
            if active is not None:
                tables[0][slot, : len(active.pages)] = active.pages
                if slot in companion_of:
                    tables[1][companion_of[slot], : len(active.companion_pages)] = active.companion_pages
        return PageTable.of(tables if companions else tables[:1], self.pages.total, self.groups)

    def _needed(self, active: ActiveRequest, steps: int) -> int:
        """Pages of both rows of a request that so many more steps need, next to those that it has."""
        row = active.pages_needed(active.started + steps, self.page_len, self.context)
        return row * (1 + active.has_companion_row) - len(active.pages) - len(active.companion_pages)

    def _take_pages(self, steps: int) -> None:
        """Give every running request the pages of a chunk, the oldest first; the youngest go back to the queue.

        The oldest one always goes on: there are pages for one request alone.
        """
        running = [(slot, active) for slot, active in enumerate(self.active) if active is not None and active.running]
        for slot, active in sorted(running, key=_age):
            group = self._group_of(slot)
            while active.running and self._needed(active, steps) > self.pages.free(group):
                self._pause(*max((e for e in running if e[1].running and self._group_of(e[0]) == group), key=_age))
            if active.running:
                active.started += steps
                self._take_row_pages(slot, active)

    def _take_row_pages(self, slot: int, active: ActiveRequest) -> None:
        """Take the pages that the steps need which were started."""
        group = self._group_of(slot)
        needed = active.pages_needed(active.started, self.page_len, self.context)
        active.pages += self.pages.take(group, max(0, needed - len(active.pages)))
        if active.has_companion_row:
            active.companion_pages += self.pages.take(group, max(0, needed - len(active.companion_pages)))

    def _pause(self, slot: int, active: ActiveRequest) -> None:
        """Send a request back to the queue, the first in it: it is answered again, and reported from where it was."""
        log.info("out of memory for the cache: a request waits, after %d steps", active.step)
        self._stop(slot, active)
        self._reported[active.identity] = max(active.step, active.reported)
        self.queue.appendleft((active.key, active.request))

    def _admit(self, steps: int) -> None:
        """Give free slots to queued requests, while there are pages for so many steps of all, and prefill them."""
        arrivals = self._take_from_queue(steps)
        for slot, active in arrivals:
            self.active[slot] = active
            self._take_row_pages(slot, active)
        if not arrivals:
            return
        groups: dict[tuple[int, int, bool], list[tuple[int, ActiveRequest]]] = {}
        for slot, active in arrivals:
            groups.setdefault(self._prefill_shape(active.request, active.prefix)[1:], []).append((slot, active))
        for group in groups.values():
            while group:
                shape, rows = self._prefill_sizes(self._shape_of(group), min(len(group), MAX_PREFILL_ROWS))
                self._try_prefill(shape, rows, group[:rows])
                group = group[rows:]

    def _try_prefill(self, shape: _Shape, rows: int, group: list[tuple[int, ActiveRequest]]) -> None:
        """Prefill requests; where that fails, each by itself, so that only one that cannot be prefilled fails."""
        group = [(slot, active) for slot, active in group if active.running]
        if not group:
            return
        try:
            self._prefill(shape, rows, group)
        except Exception as error:
            if any(array.is_deleted() for array in jax.tree.leaves(self.state)):
                # The running batch went into the program that failed.
                raise
            if len(group) == 1:
                self._fail(*group[0], error)
                return
            for entry in group:
                self._try_prefill(*self._prefill_sizes(self._shape_of([entry]), 1), [entry])

    def _take_from_queue(self, steps: int) -> list[tuple[int, ActiveRequest]]:
        """Take from the queue the requests that are admitted now, with a free slot for each.

        While others run they wait for one prefill at most: only requests that share the first one's are admitted. No
        request overtakes one that waits for pages.
        """
        slots, room = self._room(steps)
        alone = not any(self.active)
        most = self.max_batch_size if alone else MAX_PREFILL_ROWS
        first_shape: _Shape | None = None
        chosen: list[tuple[int, ActiveRequest]] = []
        left: list[tuple[int, PreparedRequest]] = []
        while self.queue and len(chosen) < most:
            group = max((group for group in range(self.groups) if slots[group]), key=room.__getitem__, default=None)
            if group is None:
                break
            key, request = self.queue[0]
            active = self._to_admit(key, request)
            active.prefix = self.prefixes.find(request.prompt.history)
            shape = self._prefill_shape(request, active.prefix)
            if first_shape is None:
                first_shape = shape
                most = most if alone else self._prefill_sizes(shape, most)[1]
            if not alone and shape[1:] != first_shape[1:]:
                left.append(self.queue.popleft())
                continue
            needed = self._needed(active, active.reported + steps)
            if needed > room[group] and (chosen or not alone):
                break
            room[group] -= needed
            active.number, self._admitted = self._admitted, self._admitted + 1
            self.queue.popleft()
            chosen.append((slots[group].pop(0), active))
        self.queue.extendleft(reversed(left))
        return chosen

    def _room(self, steps: int) -> tuple[list[list[int]], list[int]]:
        """Free slots of each group, and its free pages without those that so many steps of its requests need.

        A request that is answered again keeps those of the steps before, and each row may need one page more: or a
        newcomer would soon take the place of those that run, or give its own up.
        """
        slots: list[list[int]] = [[] for _ in range(self.groups)]
        room = [self.pages.free(group) for group in range(self.groups)]
        for slot, active in enumerate(self.active):
            if active is None:
                slots[self._group_of(slot)].append(slot)
            else:
                ahead = max(steps, active.reported + steps - active.started)
                room[self._group_of(slot)] -= max(0, self._needed(active, ahead + self.page_len))
        return slots, room

    def _to_admit(self, key: int, request: PreparedRequest) -> ActiveRequest:
        reported = self._reported.get((key, request.of_question), 0)
        return ActiveRequest(key, request, reported, text_pending=request.task.outputs_text)

    def _prefill_shape(self, request: PreparedRequest, prefix: Prefix | None) -> _Shape:
        """How a request is prefilled.

        Without `mask_padding` the features depend on the window, which must not depend on the other requests.
        """
        known = 0 if prefix is None else prefix.length
        speech = request.parts[0].speech
        window = 0 if speech is None else self.runner.config.audio_encoder.window(len(speech))
        # The cache of a history is made for any turn, whatever this one outputs.
        task = self._prefilled_as(request.task, request.task.outputs_audio or len(request.prompt.history) > 0)
        return task, self._padded(len(request.prompt) - 1 - known), window, prefix is not None

    def _shape_of(self, group: Sequence[tuple[int, ActiveRequest]]) -> _Shape:
        """How requests are prefilled together: with the TTS adapter's cache if any needs it."""
        shapes = [self._prefill_shape(active.request, active.prefix) for _, active in group]
        return max(shapes, key=lambda shape: shape[0].outputs_audio)

    def _padded(self, length: int) -> int:
        return min(next(size for size in self.buckets if size >= length), self.max_len)

    def _prefill(self, shape: _Shape, rows: int, group: list[tuple[int, ActiveRequest]]) -> None:
        """Prefill requests of one shape, at most `rows`, and insert them into their slots."""
        task, length, _, after_prefix = shape
        requests = [active.request for _, active in group]
        known = [0 if active.prefix is None else active.prefix.length for _, active in group]
        tokens = np.tile(self.vocab.padding[:, None], (rows, 1, length))
        for row, (request, begin) in enumerate(zip(requests, known, strict=True)):
            prompt = request.prompt.tokens[:, begin:-1]
            tokens[row, :, : prompt.shape[1]] = prompt
        speech = positions = starts = prefix = lengths = None
        if task.takes_audio:
            speech = self._encode(requests, rows)
            positions = _column([request.prompt.speech_positions for request in requests], rows, np.int32)
            starts = _column([request.prompt.speech_start for request in requests], rows, np.int32)
        if after_prefix:
            prefix = self._load_prefixes([a.prefix for _, a in group if a.prefix is not None], rows)
            lengths = _column(known, rows, np.int32)
        histories = [(row, r.prompt.history) for row, r in enumerate(requests) if len(r.prompt.history) > known[row]]
        caches = self.runner.prefill(
            jnp.asarray(tokens),
            speech,
            positions,
            starts,
            prefix,
            lengths,
            audio=self.runner.config.tts_adapter_layers > 0 and task.outputs_audio,
        )
        if histories:
            self._to_keep.append((caches, histories))
        pages = [(slot, active.pages) for slot, active in group]
        companion_pages = [(slot, active.companion_pages) for slot, active in group]
        self.state = self.runner.insert(
            self.state,
            caches,
            _column([slot for slot, _ in group], rows, np.int32, self.max_batch_size),
            self._pages_of_all(pages, rows),
            self._pages_of_all(companion_pages, rows),
            self._arrivals(requests, rows),
        )

    def _pages_of_all(self, pages: Sequence[tuple[int, Sequence[int]]], rows: int) -> jax.Array:
        """Pages by slot, int32 [rows, M], as numbered over all groups."""
        table = np.full((rows, self.columns), self.pages.total, np.int32)
        for row, (slot, own) in enumerate(pages):
            table[row, : len(own)] = np.array(own, np.int32) + self._group_of(slot) * self._per_group
        return jnp.asarray(table)

    def _prefill_history(self, history: History) -> None:
        """Prefill a history for the prefix cache, in no batch slot."""
        prefix = self.prefixes.find(history)
        new = len(history) - (0 if prefix is None else prefix.length)
        if new:
            # Of a prompt, all but the last column is prefilled.
            tokens = np.concatenate([history.tokens, self.vocab.padding[:, None]], axis=1)
            request = PreparedRequest.of(Prompt(Task.T1T2, tokens, 0, history))
            entry = (self.max_batch_size, ActiveRequest(-1, request, prefix=prefix))
            self._prefill(*self._prefill_sizes(self._shape_of([entry]), 1), [entry])

    def _encode(self, requests: Sequence[PreparedRequest], rows: int) -> jax.Array:
        """The speech embeddings [rows, A, D] of the requests; a question and its transcription are encoded once."""
        recordings = [sound for request in requests if (sound := request.parts[0].speech) is not None]
        assert len(recordings) == len(requests)
        if self._encoded is not None:
            known, speech = self._encoded
            same = len(known) == len(recordings) and all(a is b for a, b in zip(known, recordings, strict=True))
            if same and speech.shape[0] == rows:
                return speech
        encoder = self.runner.config.audio_encoder
        samples = 320 * max(encoder.window(len(recording)) for recording in recordings)
        audio = np.zeros((rows, samples), np.float32)
        for row, recording in enumerate(recordings):
            audio[row] = pad(recording, samples)
        speech = self.runner.encode_audio(jnp.asarray(audio))
        again = any(request.transcription is not None for request in requests)
        self._encoded = (recordings, speech) if again else None
        return speech

    def _load_prefixes(self, prefixes: Sequence[Prefix], rows: int) -> dict[str, Cache]:
        """Caches of `rows` rows of `max_len` positions that hold these prefixes."""

        def load(like: jax.Array | jax.ShapeDtypeStruct, *kept: np.ndarray) -> jax.Array | jax.ShapeDtypeStruct:
            # A stacked cache has its layers in front of the rows.
            shape = (*like.shape[:-4], rows, like.shape[-3], self.max_len, like.shape[-1])
            if isinstance(like, jax.ShapeDtypeStruct):
                # Nothing is run.
                return jax.ShapeDtypeStruct(shape, like.dtype)
            array = np.zeros(shape, like.dtype)
            for row, (prefix, known) in enumerate(zip(prefixes, kept, strict=True)):
                array[..., row : row + 1, :, : prefix.length, :] = known[..., : prefix.length, :]
            # `jnp.asarray` would compile a program for the shape.
            return jax.device_put(array)

        return jax.tree.map(load, self.state.caches, *(prefix.caches for prefix in prefixes))

    def _keep_histories(self) -> None:
        """Put prefilled histories into the prefix cache; waits for their prefill, while a chunk may be running."""
        for caches, histories in self._to_keep:
            arrays = jax.tree.map(np.asarray, caches)
            for row, history in histories:
                self.prefixes.keep(history, arrays, row)
        self._to_keep.clear()

    def _arrivals(self, requests: Sequence[PreparedRequest], rows: int) -> DecodeState:
        """The state of requests that have just been prefilled, without caches, padded to `rows` rows."""
        last = np.zeros((rows, NUM_STREAMS), np.int32)
        last[: len(requests)] = [request.prompt.tokens[:, -1] for request in requests]
        tasks, configs = [request.task for request in requests], [request.config for request in requests]
        return DecodeState(
            tokens=jnp.asarray(last),
            positions=_column([len(request.prompt) - 1 for request in requests], rows, np.int32),
            step=jnp.zeros(rows, jnp.int32),
            running=jnp.ones(rows, bool),
            text_pending=_column([task.outputs_text for task in tasks], rows, bool),
            params=SlotParams(
                outputs_audio=_column([task.outputs_audio for task in tasks], rows, bool),
                max_steps=_column([request.max_steps(self.context) for request in requests], rows, np.int32),
                enforce_delay=_column([config.enforce_delay for config in configs], rows, bool),
                sampling=Sampling(
                    temperature=_column([config.sampling_temperature for config in configs], rows, np.float32),
                    top_k=_column([config.top_k for config in configs], rows, np.int32),
                    top_p=_column([config.top_p for config in configs], rows, np.float32, 1),
                    seed=_column([config.seed for config in configs], rows, np.uint32),
                ),
            ),
            caches={},
        )


def _age(entry: tuple[int, ActiveRequest]) -> int:
    return entry[1].number


def _no_tokens() -> np.ndarray:
    return np.zeros((NUM_STREAMS, 0), np.int32)


def _column(values: Sequence[float], rows: int, dtype: type, filler: float = 0) -> jax.Array:
    """One value per request, padded to `rows`."""
    return jnp.asarray(np.array([*values, *[filler] * (rows - len(values))], dtype))
