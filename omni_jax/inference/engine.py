"""Continuous batching: slot assignment, what each chunk computes, and which requests have finished.

The host's side of `omni_jax.inference.decode`. It reads a chunk's tokens while the next chunk runs, so its knowledge
is one chunk old; that costs at most a chunk that does nothing, never a token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from omni_jax.inference.runner import ModelRunner
from omni_jax.inference.sampling import Sampling
from omni_jax.prompts import Prompt, max_speech_positions, speech_positions, speech_prompt, text_prompt
from omni_jax.tasks import Task
from omni_jax.vocab import NUM_STREAMS, TEXT_STREAM, Vocab

PROMPT_BUCKETS = tuple(sorted({int(base * 2**power) for base in (16, 20, 24, 28) for power in range(12)}))
"""Lengths prompts are padded to: 16, 20, 24, 28, 32, 40, ..., so that at most a fifth is padding."""
COARSE_PROMPT_BUCKETS = tuple(2**power for power in range(4, 16))
"""For engines that compile everything beforehand: 16, 32, 64, ..., a quarter as many programs."""
CACHE_LEN_STEP = 256
"""Cache lengths are multiples of this, up to the trunk's context."""
MAX_PREFILL_ROWS = 8
"""Prompts prefilled at once; more are taken in turns."""

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


@dataclass
class ActiveRequest:
    """A request in a batch slot, as far as the host has read."""

    key: int
    request: PreparedRequest
    step: int = 0
    running: bool = True
    text_pending: bool = True
    companion: int | None = None
    """Its companion row."""


_Program = tuple[Callable[..., None], tuple[Any, ...]]
"""A method of `Engine` that compiles programs, and its arguments."""


class Engine:
    """A running batch.

    Attributes:
        max_batch_size: requests decoded at once.
        max_len: positions of each slot's cache.
        queue: submitted requests that have no slot yet, with their keys.
        active: the request of each batch slot.
    """

    def __init__(self, runner: ModelRunner, max_batch_size: int, max_len: int, buckets: Sequence[int] = PROMPT_BUCKETS):
        """Allocate the batch.

        Args:
            runner: the model.
            max_batch_size: requests decoded at once.
            max_len: positions of each slot's cache.
            buckets: lengths that prompts are padded to.
        """
        self.runner, self.max_batch_size, self.max_len, self.buckets = runner, max_batch_size, max_len, buckets
        self.vocab = Vocab(runner.config.vocab)
        self.context = runner.config.trunk.max_position
        self.queue: deque[tuple[int, PreparedRequest]] = deque()
        self._nothing_to_do: list[int] = []
        self._init_batch()

    def _init_batch(self) -> None:
        self.state: DecodeState = self.runner.init_state(self.max_batch_size, self.max_len)
        self.active: list[ActiveRequest | None] = [None] * self.max_batch_size
        self.companion_rows = 0
        self.in_flight: tuple[list[ActiveRequest | None], jax.Array, jax.Array] | None = None

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
            self.queue.append((key, request))
        else:
            self._nothing_to_do.append(key)

    @property
    def busy(self) -> bool:
        """Whether anything is queued, active or in flight."""
        return bool(self.queue or self._nothing_to_do) or self.in_flight is not None or any(self.active)

    def advance(self, steps: int = MAX_CHUNK_STEPS) -> list[Progress]:
        """Admit queued requests, start a chunk of up to `steps` steps, and return the tokens of the chunk before."""
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        self._admit()
        previous, self.in_flight = self.in_flight, None
        if any(active is not None and active.running for active in self.active):
            routing = self._route()
            self.state, tokens, status = self.runner.decode_chunk(
                self.state, routing, jnp.int32(min(steps, MAX_CHUNK_STEPS))
            )
            self.in_flight = (list(self.active), tokens, status)
        empty, self._nothing_to_do = self._nothing_to_do, []
        progress = [Progress(key, np.zeros((NUM_STREAMS, 0), np.int32), "stop") for key in empty]
        return progress + self._read(*previous) if previous else progress

    def cancel(self, key: int) -> bool:
        """Drop a request, queued or active; its slot is free at once, and no more progress is returned for it.

        Returns:
            Whether it was still there.
        """
        if key in self._nothing_to_do:
            self._nothing_to_do.remove(key)
            return True
        for index, (queued, _) in enumerate(self.queue):
            if queued == key:
                del self.queue[index]
                return True
        for slot, active in enumerate(self.active):
            if active is not None and active.key == key:
                # The chunk in flight may have tokens for it: `_read` skips requests that do not run.
                active.running = False
                self.active[slot] = None
                self.state = self.runner.stop(self.state, jnp.int32(slot))
                return True
        return False

    def reset(self) -> None:
        """Drop active requests and keep queued ones: after a fault, when a program may have consumed the state."""
        # The old state is freed before the new one is allocated.
        del self.state, self.in_flight
        self._init_batch()

    def warm_up(self) -> None:
        """Compile the programs of one spoken question of 3 s, by running them on nothing.

        They are what the first request most likely needs, and a small part of all; see `warm_up_rest`.

        Raises:
            RuntimeError: something is queued or active.
        """
        for compile_program, sizes in self._first_programs():
            self._compile(compile_program, sizes)

    def warm_up_rest(self) -> Iterator[None]:
        """Compile every other program that any request can need here, one for each item.

        The likeliest come first: those of one request alone. Between two items, requests may be answered.

        Raises:
            RuntimeError: something is queued or active.
        """
        first = self._first_programs()
        for program in sorted(dict.fromkeys(self._other_programs()), key=lambda program: self._num_requests(*program)):
            if program not in first:
                self._compile(*program)
                yield

    def _compile(self, compile_program: Callable[..., None], sizes: tuple[Any, ...]) -> None:
        if self.busy:
            raise RuntimeError("a busy engine cannot be warmed up")
        compile_program(*sizes)

    def _first_programs(self) -> list[_Program]:
        encoder, few = self.runner.config.audio_encoder, self._bucket_rows(1)
        samples = min(3 * SAMPLE_RATE, encoder.max_samples)
        positions = speech_positions(samples, encoder.max_position, self.runner.config.adapter.stack)
        length = self._padded(len(speech_prompt(Task.A1A2, positions, self.vocab)) - 1)
        return [
            (self._compile_prefill, (Task.A1A2, length, encoder.window(samples), 1, few)),
            (self._compile_decode, (few, few, few)),
            (self._compile_decode, (0, 0, few)),
            (self._compile_stop, (0,)),
        ]

    def _other_programs(self) -> Iterator[_Program]:
        config = self.runner.config
        sizes = sorted({self._bucket_rows(count) for count in range(self.max_batch_size + 1)})
        for companions, texts, audios in itertools.product(sizes, sizes, sizes):
            # A request with a companion row outputs text and audio.
            if min(texts, audios) >= companions and texts + audios:
                yield self._compile_decode, (companions, texts, audios)
        max_rows = min(self.max_batch_size, MAX_PREFILL_ROWS)
        rows = sorted({next_power_of_2(count) for count in range(1, max_rows + 1)})
        # Without a TTS adapter prefill does not depend on what is output.
        tasks = (Task.A1A2, Task.T1A1, Task.A1T1, Task.T1T2) if config.tts_adapter_layers else (Task.A1A2, Task.T1A1)
        for task in tasks:
            max_prompt = min(max_speech_positions(config) + 2, self.max_len) if task.takes_audio else self.max_len
            lengths = sorted({self._padded(length) for length in range(1, max_prompt + 1)})
            windows = config.audio_encoder.windows if task.takes_audio else (0,)
            for companions, count in itertools.product(sizes, rows):
                for length in lengths:
                    yield self._compile_prefill, (task, length, windows[0], count, companions)
                # The longer windows of the audio encoder, whatever the prompt is padded to.
                for window in windows[1:]:
                    yield self._compile_prefill, (task, lengths[0], window, count, companions)
        for companions, other in itertools.product(sizes, sizes):
            yield self._compile_stop, (companions,)
            yield self._compile_resize, (companions, other)

    def _num_requests(self, compile_program: Callable[..., None], sizes: tuple[Any, ...]) -> int:
        """How many requests there must be at once for a program to be needed."""
        few = self._bucket_rows(1)
        if compile_program == self._compile_prefill:
            *_, rows, companions = sizes
            return max(rows // 2 + 1, 1 if companions <= few else few + 1)
        return max(1 if size <= few else few + 1 for size in sizes)

    def _compile_decode(self, companions: int, texts: int, audios: int) -> None:
        self._set_companions(companions)
        # From the host, as `_route` sends them: that is compiled, too.
        unused = [
            jnp.asarray(np.full(size, self.max_batch_size, np.int32)) for size in (companions, texts, texts, audios)
        ]
        self.state, *_ = self.runner.decode_chunk(self.state, Routing(*unused), jnp.int32(1))

    def _compile_prefill(self, task: Task, length: int, window: int, rows: int, companions: int) -> None:
        self._set_companions(companions)
        if task.takes_audio:
            prompt, speech = speech_prompt(task, 1, self.vocab), np.zeros(320 * (window - 2), np.float32)
            request = PreparedRequest.of(prompt, speech)
        else:
            request = PreparedRequest.of(text_prompt(task, [0], self.vocab))
        self._prefill(length, [(self.max_batch_size, ActiveRequest(-1, request))] * rows)

    def _compile_stop(self, companions: int) -> None:
        self._set_companions(companions)
        self.state = self.runner.stop(self.state, jnp.int32(0))

    def _compile_resize(self, companions: int, other: int) -> None:
        self._set_companions(companions)
        self._resize_companions([], other)

    def _set_companions(self, size: int) -> None:
        """Empty companion rows, as many as `size`."""
        if size != self.companion_rows:
            self._resize_companions([], 0)
            self._resize_companions([], size)

    def run(self, steps: int = MAX_CHUNK_STEPS) -> Iterator[Progress]:
        """Advance until nothing is left."""
        while self.busy:
            yield from self.advance(steps)

    def _read(self, slots: list[ActiveRequest | None], tokens: jax.Array, status: jax.Array) -> list[Progress]:
        chunk, (steps, running, text_pending) = np.asarray(tokens), np.asarray(status)
        progress = []
        for slot, active in enumerate(slots):
            if active is None or not active.running:
                continue
            new = chunk[: steps[slot] - active.step, slot].T
            active.step, active.running = int(steps[slot]), bool(running[slot])
            active.text_pending = bool(text_pending[slot])
            if active.running:
                progress.append(Progress(active.key, new, None))
                continue
            self.active[slot] = None
            progress.append(self._end_part(active, new))
        return progress

    def _end_part(self, active: ActiveRequest, new: np.ndarray) -> Progress:
        """The last tokens of a part; the next one, if any, is queued."""
        finish = self._finish_reason(active, new)
        if len(active.request.parts) == 1:
            return Progress(active.key, new, finish)
        if active.step == active.request.config.max_steps:
            return Progress(active.key, new, "length")
        # In front of the queue, so that the next part follows at once.
        self.queue.appendleft((active.key, active.request.after_first(active.step)))
        return Progress(active.key, new, None, finish)

    def _finish_reason(self, active: ActiveRequest, new: np.ndarray) -> FinishReason:
        if active.request.task.outputs_audio:
            last, end = new[TEXT_STREAM - 1, -1], self.vocab.eoa
        else:
            last, end = new[TEXT_STREAM, -1], self.vocab.eot
        if last == end:
            return "stop"
        return "length" if active.step == active.request.config.max_steps else "context"

    def _bucket_rows(self, count: int) -> int:
        """Round a number of rows up to none, a quarter or all of the slots: few shapes, little idle work."""
        if not count:
            return 0
        quarter = self.max_batch_size // 4
        return quarter if count <= quarter else self.max_batch_size

    def _route(self) -> Routing:
        running = [(slot, active) for slot, active in enumerate(self.active) if active is not None and active.running]
        text = [(slot, active) for slot, active in running if active.text_pending]
        audio = [slot for slot, active in running if active.request.task.outputs_audio]
        paired = [(slot, active) for slot, active in text if active.companion is not None]
        self._resize_companions([active for _, active in paired], self._bucket_rows(len(paired)))

        texts, audios = self._bucket_rows(len(text)), self._bucket_rows(len(audio))
        companion_slot = np.full(self.companion_rows, self.max_batch_size, np.int32)
        for slot, active in paired:
            companion_slot[active.companion] = slot
        rows = [slot if active.companion is None else self.max_batch_size + active.companion for slot, active in text]
        return Routing(
            companion_slot=jnp.asarray(companion_slot),
            text_slot=_column([slot for slot, _ in text], texts, np.int32, self.max_batch_size),
            text_row=_column(rows, texts, np.int32, self.max_batch_size),
            audio_slot=_column(audio, audios, np.int32, self.max_batch_size),
        )

    def _resize_companions(self, kept: Sequence[ActiveRequest], size: int) -> None:
        """Keep the companion rows of these requests alone, in a cache of `size` rows."""
        if size == self.companion_rows:
            return
        companions = self.state.companions
        if not size:
            companions = None
        elif companions is None:
            companions = self.runner.init_companions(size, self.max_len)
        else:
            rows = [active.companion for active in kept if active.companion is not None]
            rows += [0] * (size - len(rows))
            companions = self.runner.keep_companions(companions, jnp.asarray(np.array(rows, np.int32)))
            for index, active in enumerate(kept):
                active.companion = index
        self.state = dataclasses.replace(self.state, companions=companions)
        self.companion_rows = size

    def _admit(self) -> None:
        """Give free slots to queued requests and prefill them."""
        free = [slot for slot, active in enumerate(self.active) if active is None]
        arrivals = []
        for key, request in self._take_from_queue(len(free)):
            active = ActiveRequest(key, request, text_pending=request.task.outputs_text)
            slot = free.pop(0)
            self.active[slot] = active
            arrivals.append((slot, active))
        if not arrivals:
            return
        # Companion rows for the newcomers, next to those in use.
        newcomers = [active for _, active in arrivals if active.request.has_companion]
        if newcomers:
            kept = [
                a for a in self.active if a is not None and a.running and a.text_pending and a.companion is not None
            ]
            self._resize_companions(kept, self._bucket_rows(len(kept) + len(newcomers)))
            used = {active.companion for active in kept}
            unused = (row for row in range(self.companion_rows) if row not in used)
            for active in newcomers:
                active.companion = next(unused)
        groups: dict[tuple[int, bool], list[tuple[int, ActiveRequest]]] = {}
        for slot, active in arrivals:
            groups.setdefault(self._prefill_shape(active.request), []).append((slot, active))
        for (length, _), group in groups.items():
            for start in range(0, len(group), MAX_PREFILL_ROWS):
                self._prefill(length, group[start : start + MAX_PREFILL_ROWS])

    def _take_from_queue(self, free: int) -> list[tuple[int, PreparedRequest]]:
        """Take from the queue the requests that are admitted now, at most `free`.

        While others run they wait for one prefill at most: only requests that share the first one's are admitted.
        """
        if not any(self.active):
            return [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        if not free or not self.queue:
            return []
        shape, rows = self._prefill_shape(self.queue[0][1]), min(free, MAX_PREFILL_ROWS)
        chosen: list[tuple[int, PreparedRequest]] = []
        left: deque[tuple[int, PreparedRequest]] = deque()
        for entry in self.queue:
            together = len(chosen) < rows and self._prefill_shape(entry[1]) == shape
            (chosen if together else left).append(entry)
        self.queue = left
        return chosen

    def _prefill_shape(self, request: PreparedRequest) -> tuple[int, bool]:
        """Padded length, and whether there is speech: prompts alike in this are prefilled together."""
        return self._padded(len(request.prompt) - 1), request.task.takes_audio

    def _padded(self, length: int) -> int:
        return min(next(size for size in self.buckets if size >= length), self.max_len)

    def _prefill(self, length: int, group: list[tuple[int, ActiveRequest]]) -> None:
        """Prefill requests of one shape and insert them into their slots."""
        count = len(group)
        rows = next_power_of_2(count)
        requests = [active.request for _, active in group]
        tokens = np.tile(self.vocab.padding[:, None], (rows, 1, length))
        for row, request in enumerate(requests):
            prompt = request.prompt.tokens[:, :-1]
            tokens[row, :, : prompt.shape[1]] = prompt
        speech = positions = None
        if requests[0].task.takes_audio:
            encoder = self.runner.config.audio_encoder
            recordings = [sound for request in requests if (sound := request.parts[0].speech) is not None]
            assert len(recordings) == count
            samples = 320 * max(encoder.window(len(recording)) for recording in recordings)
            audio = np.zeros((rows, samples), np.float32)
            for row, recording in enumerate(recordings):
                audio[row] = pad(recording, samples)
            speech = self.runner.encode_audio(jnp.asarray(audio))
            positions = _column([request.prompt.speech_positions for request in requests], rows, np.int32)
        # Only a TTS adapter's cache depends on what is output: without one there is one program less per shape.
        outputs_audio = any(request.task.outputs_audio for request in requests)
        caches = self.runner.prefill(
            jnp.asarray(tokens),
            speech,
            positions,
            audio=self.runner.config.tts_adapter_layers > 0 and outputs_audio,
        )
        nowhere = self.max_batch_size
        companions = [nowhere if active.companion is None else active.companion for _, active in group]
        self.state = self.runner.insert(
            self.state,
            caches,
            _column([slot for slot, _ in group], rows, np.int32, nowhere),
            _column(companions, rows, np.int32, nowhere),
            self._arrivals(requests, rows),
        )

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
                    temperature=_column([config.temperature for config in configs], rows, np.float32),
                    top_k=_column([config.top_k for config in configs], rows, np.int32),
                    top_p=_column([config.top_p for config in configs], rows, np.float32, 1),
                    seed=_column([config.seed for config in configs], rows, np.uint32),
                ),
            ),
            caches={},
            companions=None,
        )


def _column(values: Sequence[float], rows: int, dtype: type, filler: float = 0) -> jax.Array:
    """One value per request, padded to `rows`."""
    return jnp.asarray(np.array([*values, *[filler] * (rows - len(values))], dtype))
