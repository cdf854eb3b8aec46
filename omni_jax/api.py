"""`Omni`: ask a model something, get text and speech. What users import; everything else serves it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from omni_jax.audio import wav
from omni_jax.codec.snac import DecodeFn, Snac, StreamDecoder, make_decoder
from omni_jax.config import PRESETS, ConfigError, ModelConfig
from omni_jax.delay import playable, undelay
from omni_jax.inference.decode import Programs
from omni_jax.inference.engine import Engine, Progress, Request
from omni_jax.prompts import Prompt, Task, speech_positions, speech_prompt, text_prompt
from omni_jax.vocab import TEXT, Vocab

if TYPE_CHECKING:
    from omni_jax.checkpoint import Release
    from omni_jax.model.omni import OmniModel

Audio = str | Path | BinaryIO | np.ndarray | jax.Array
"""A file in any common format, or samples: float within -1..1 or int16, [samples] or [samples, channels]."""

SHORTEST_DECODE = 8
"""Frames the codec decodes at least; longer answers are padded to 1, 1.5, 2, 3, 4, ... times as many."""


LONGEST_STREAM_CHUNK = 16
"""Steps after which a stream looks for news at the latest."""


class UntrainedWarning(UserWarning):
    """The model's weights are random: it runs as a trained one would, but what it says means nothing."""


class Options(TypedDict, total=False):
    """How to answer. All have defaults."""

    max_steps: int | None
    """Stop after so many steps; default: when the trunk's context is full."""
    temperature: float
    """0, the default, is greedy."""
    top_k: int
    top_p: float
    seed: int
    """The same request with the same seed gives the same tokens, whatever runs beside it."""
    enforce_delay: bool
    """Default True: an audio layer that is not yet due emits padding, whatever the model says."""
    batch_parallel: bool
    """Default True, only for A1A2: a second row writes the text and leads the speech."""


@dataclass(frozen=True)
class Ask:
    """One thing to ask: exactly one of `audio` and `text`.

    Without a task, the answer is text and speech (A1A2 or T1A2).
    """

    audio: Audio | None = None
    text: str | None = None
    task: str | None = None
    sample_rate: int | None = None
    """Samples per second, when `audio` is an array; a file says its own."""
    cut: bool = False
    """Hear only the beginning of a recording that is too long for the ear, instead of refusing it."""
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Timing:
    """Seconds from the start of decoding, prompt and codec included."""

    first_token: float
    first_sound: float | None
    """None if it did not speak. When the answer was not streamed, all sound comes at the end."""
    total: float
    steps_per_second: float
    real_time_factor: float | None
    """`total` over the duration of the sound: below 1 is faster than speech."""


@dataclass(frozen=True)
class Reply:
    """An answer."""

    task: Task
    text: str
    """What the model wrote; nothing for T1A1."""
    audio: np.ndarray | None
    """float32 [samples]; None for tasks that answer in text only."""
    sample_rate: int
    """Samples per second of `audio`."""
    tokens: np.ndarray
    """int32 [8, steps], the streams as decoded (delayed), text last."""
    finish_reason: str
    """`stop`: said its end; `length`: max_steps reached; `context`: the trunk's context is full."""
    repaired_codes: int
    """Tokens that stood where a code belongs but are none; each played as the code before it."""
    timing: Timing

    @property
    def seconds(self) -> float:
        """Duration of the sound."""
        return 0.0 if self.audio is None else len(self.audio) / self.sample_rate

    def save(self, path: str | Path) -> None:
        """Write the sound as a 16-bit wav file.

        Raises:
            ValueError: the task does not speak.
            AudioError: the file cannot be written.
        """
        if self.audio is None:
            raise ValueError(f"task {self.task} answers in text only: there is no sound to save")
        wav.write(path, self.audio, self.sample_rate)


@dataclass(frozen=True)
class Part:
    """A piece of an answer while it is being made: new text, new sound, or both."""

    text: str
    audio: np.ndarray
    """float32 [samples], joined over the parts the whole answer's sound; empty for tasks that write only."""
    reply: Reply | None = None
    """The whole answer, in the last part."""


class Omni:
    """A model that hears, thinks and talks.

    Make one with `Omni.load`. Methods accept `Options` by name.

    Attributes:
        config: the model's shape.
        trained: False while the weights are random.
    """

    def __init__(
        self,
        model: OmniModel,
        codec: DecodeFn,
        tokenizer: tokenizers.Tokenizer,
        *,
        trained: bool = True,
        int8: bool = False,
    ):
        self.config: ModelConfig = model.config
        self.vocab = Vocab(self.config.vocab)
        self.programs = Programs(model, int8=int8)
        self.codec = codec
        self.tokenizer = tokenizer
        self.trained = trained

    @classmethod
    def load(
        cls,
        name: str | Path = "nano",
        *,
        codec: Literal["jax", "torch"] = "jax",
        int8: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Omni:
        """Load a model.

        Args:
            name: `nano`, the model that comes with the package; a release folder, the folder of a finished training
                run, or a hub id. The other presets' names are understood too, and give untrained models. A folder of
                such a name comes first.
            codec: decode sound by the native codec, or by the torch one in a host callback.
            int8: decode with weights rounded to eight bits; see `omni_jax.inference.decode.Programs`.
            mesh: spread the model over devices; see `omni_jax.sharding.make_mesh`.

        Raises:
            ConfigError: there is no such model, or a file of it cannot be used; names the file.
        """
        _check_codec(codec)
        release = find_release(name)
        if release is None:
            return cls._untrained(str(name), 0, codec, mesh, int8=int8)
        stacked, dtype = default_layout()
        model = release.load_model(stacked=stacked, dtype=dtype, param_dtype=dtype, mesh=mesh)
        return cls(model, _decoder(release.load_codec(), codec), release.tokenizer(), int8=int8)

    @classmethod
    def untrained(
        cls,
        preset: str,
        *,
        seed: int = 0,
        codec: Literal["jax", "torch"] = "jax",
        int8: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Omni:
        """A model with random weights and one token per byte: runs like a trained one, says nothing sensible."""
        return cls._untrained(preset, seed, codec, mesh, int8=int8)

    @classmethod
    def _untrained(
        cls, preset: str, seed: int, codec: str, mesh: jax.sharding.Mesh | None, *, int8: bool = False
    ) -> Omni:
        from omni_jax.checkpoint import init_model

        _check_codec(codec)
        if preset not in PRESETS:
            raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
        warnings.warn(
            f"the model {preset!r} is untrained: its weights are random (seed {seed}), its answers mean nothing",
            UntrainedWarning,
            stacklevel=3,
        )
        config = PRESETS[preset]
        stacked, dtype = default_layout()
        model = init_model(config, stacked=stacked, dtype=dtype, seed=seed, mesh=mesh)
        sound = _decoder(Snac(config.codec, rngs=nnx.Rngs(seed)), codec)
        return cls(model, sound, byte_tokenizer(), trained=False, int8=int8)

    def reply(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        sample_rate: int | None = None,
        cut: bool = False,
        **options: Unpack[Options],
    ) -> Reply:
        """Answer a recording (A1A2) or a text (T1A2) in text and speech."""
        return self._one(Ask(audio, text, None, sample_rate, cut, options))

    def answer(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        sample_rate: int | None = None,
        cut: bool = False,
        **options: Unpack[Options],
    ) -> Reply:
        """Answer a recording (A1T2) or a text (T1T2) in text only."""
        task = Task.T1T2 if audio is None else Task.A1T2
        return self._one(Ask(audio, text, task, sample_rate, cut, options))

    def transcribe(
        self, audio: Audio, *, sample_rate: int | None = None, cut: bool = False, **options: Unpack[Options]
    ) -> Reply:
        """Write down what a recording says (A1T1)."""
        return self._one(Ask(audio, None, Task.A1T1, sample_rate, cut, options))

    def read_aloud(self, text: str, **options: Unpack[Options]) -> Reply:
        """Speak a text (T1A1)."""
        return self._one(Ask(None, text, Task.T1A1, options=options))

    def batch(self, asks: Iterable[Ask | Mapping[str, Any] | str | Path], **options: Unpack[Options]) -> list[Reply]:
        """Answer many at once, in any mixture of tasks.

        Args:
            asks: each an `Ask`, a dict of its fields, or the path of a recording.
            **options: for all of them; an ask's own options come first.

        Returns:
            The replies, in the order asked.

        Raises:
            AudioError, ConfigError: one of them cannot be asked, says which and why; none is, then.
        """
        requests = []
        for number, ask in enumerate(asks):
            try:
                requests.append(self.prepare(ask, **options))
            except (wav.AudioError, ConfigError) as error:
                raise type(error)(f"asks[{number}]: {error}") from None
        return self.run(requests)

    def stream(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        task: str | None = None,
        sample_rate: int | None = None,
        cut: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Part]:
        """Answer while it is being made: text as soon as it is decided, sound as soon as it is final.

        Joined, the parts are the answer of the other methods; the last part carries it whole.
        """
        request = self.prepare(Ask(audio, text, task, sample_rate, cut, options))
        return self._stream(request)

    def prepare(self, ask: Ask | Mapping[str, Any] | str | Path, **options: Unpack[Options]) -> Request:
        """Check one ask and make it ready to run: reads the file, tokenizes the text.

        Raises:
            AudioError: the recording cannot be used.
            ConfigError: the task does not fit the input, an option is out of range, or the text is too long.
        """
        if isinstance(ask, (str, Path)):
            ask = Ask(audio=ask)
        elif isinstance(ask, Mapping):
            unknown = set(ask) - set(Ask.__dataclass_fields__)
            if unknown:
                known = ", ".join(Ask.__dataclass_fields__)
                raise ConfigError(f"ask: expected some of {known}, found {', '.join(map(str, unknown))}")
            ask = Ask(**ask)
        elif not isinstance(ask, Ask):
            raise ConfigError(f"ask: expected an Ask, a dict of its fields or a path, found {type(ask).__name__}")
        if not isinstance(ask.options, Mapping):
            raise ConfigError(f"options: expected names and values, found {type(ask.options).__name__}")
        if (ask.audio is None) == (ask.text is None):
            raise ConfigError(f"ask: expected either audio or text, found {'neither' if ask.text is None else 'both'}")
        default = Task.T1A2 if ask.audio is None else Task.A1A2
        try:
            task = Task(ask.task or default)
        except ValueError:
            raise ConfigError(f"task: expected one of {', '.join(Task)}, found {ask.task!r}") from None
        if task.hears != (ask.audio is not None):
            takes, found = ("audio", "text") if task.hears else ("text", "audio")
            raise ConfigError(f"task {task}: expected {takes}, found {found}")
        settings: Any = {**options, **ask.options}
        unknown = set(settings) - set(Options.__annotations__)
        if unknown:
            raise ConfigError(f"options: expected some of {sorted(Options.__annotations__)}, found {sorted(unknown)}")
        prompt, sound = self._prompt(task, ask)
        context = self.config.trunk.context
        if len(prompt) > context:
            raise ConfigError(f"the prompt takes {len(prompt)} positions; expected at most the context of {context}")
        return Request(prompt, sound, **settings)

    def run(self, requests: Sequence[Request], slots: int = 8) -> list[Reply]:
        """Answer prepared requests, up to `slots` at a time in one running batch; in their order."""
        if not requests:
            return []
        slots = min(slots, 1 << (len(requests) - 1).bit_length())
        engine = self._engine(requests, slots)
        for key, request in enumerate(requests):
            engine.submit(key, request)
        clocks = [_Clock() for _ in requests]
        said: list[list[np.ndarray]] = [[] for _ in requests]
        replies: dict[int, Reply] = {}
        while engine.busy:
            done = []
            for progress in engine.advance():
                clocks[progress.key].hear(progress)
                said[progress.key].append(progress.tokens)
                if progress.finish:
                    done.append(progress)
            tokens = [np.concatenate(said[progress.key], axis=1) for progress in done]
            sounds = self._sound([t for p, t in zip(done, tokens, strict=True) if requests[p.key].prompt.task.speaks])
            for progress, decoded in zip(done, tokens, strict=True):
                request, clock = requests[progress.key], clocks[progress.key]
                audio = next(sounds) if request.prompt.task.speaks else None
                clock.sound(audio)
                assert progress.finish is not None
                replies[progress.key] = self._reply(request, decoded, audio, progress.finish, clock)
        return [replies[key] for key in range(len(requests))]

    def _one(self, ask: Ask) -> Reply:
        return self.run([self.prepare(ask)])[0]

    def _prompt(self, task: Task, ask: Ask) -> tuple[Prompt, np.ndarray | None]:
        if ask.text is not None:
            if not isinstance(ask.text, str):
                raise ConfigError(f"text: expected a string, found {type(ask.text).__name__}")
            try:
                ask.text.encode()
            except UnicodeEncodeError as error:
                # JSON and the shell can make one; tokenizers stumble over it.
                raise ConfigError(f"text: expected whole characters, found half of one at {error.start}") from None
            ids = self.tokenizer.encode(ask.text, add_special_tokens=False).ids
            if not ids:
                raise ConfigError("text: expected some text, found none")
            if max(ids) >= self.config.vocab.text:
                raise ConfigError(
                    f"text: the tokenizer gives id {max(ids)}; expected ids below the model's vocabulary of "
                    f"{self.config.vocab.text}"
                )
            return text_prompt(task, ids, self.vocab), None
        source: Any = ask.audio
        if isinstance(source, (str, Path)) or hasattr(source, "read"):
            name = wav.name_of(source)
            if ask.sample_rate is not None:
                raise ConfigError(f"sample_rate: expected none, as {name} says its own, found {ask.sample_rate}")
            sound = wav.read(source)
        else:
            name = "array"
            if ask.sample_rate is None:
                raise ConfigError("sample_rate: expected the samples per second of the array, found none")
            sound = wav.as_mono(source, ask.sample_rate)
        ear = self.config.ear
        sound = wav.check_length(sound, ear.samples, cut=ask.cut, name=name)
        positions = speech_positions(len(sound), ear.positions, self.config.adapter.stack)
        return speech_prompt(task, positions, self.vocab), sound

    def _engine(self, requests: Sequence[Request], slots: int) -> Engine:
        length = max(request.cache_length(self.config.trunk.context) for request in requests)
        return Engine(self.programs, slots, length)

    def _sound(self, tokens: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The sound of each answer, float32 [F * frame]."""
        frames = [playable(undelay(t[:TEXT], self.vocab), self.vocab) for t in tokens]
        longest = max((len(f) for f in frames), default=0)
        if not longest:
            return iter([np.zeros(0, np.float32)] * len(frames))
        size = SHORTEST_DECODE
        while size < longest:
            size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
        rows = 1 << (len(frames) - 1).bit_length()
        codes = np.zeros((rows, size, TEXT), np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, f in enumerate(frames):
            codes[row, : len(f)], lengths[row] = f, len(f)
        audio = np.asarray(self.codec(codes, lengths=lengths))
        return iter([audio[row, : len(f) * self.config.codec.frame] for row, f in enumerate(frames)])

    def _reply(
        self, request: Request, tokens: np.ndarray, audio: np.ndarray | None, finish: str, clock: _Clock
    ) -> Reply:
        frames = undelay(tokens[:TEXT], self.vocab) if audio is not None else np.zeros((0, TEXT), np.int32)
        return Reply(
            task=request.prompt.task,
            text=self.written(tokens[TEXT]),
            audio=audio,
            sample_rate=self.config.codec.sample_rate,
            tokens=tokens,
            finish_reason=finish,
            repaired_codes=int((frames >= self.config.vocab.audio).sum()),
            timing=clock.timing(tokens.shape[1], audio, self.config.codec.sample_rate),
        )

    def written(self, tokens: np.ndarray) -> str:
        """The text of a text stream int [steps], up to its end; specials are no text."""
        ends = np.flatnonzero(tokens == self.vocab.eot)
        ids = tokens[: ends[0]] if len(ends) else tokens
        return self.tokenizer.decode([int(i) for i in ids if i < self.config.vocab.text], skip_special_tokens=False)

    def _stream(self, request: Request) -> Iterator[Part]:
        answer = Answer(self, request)
        engine = self._engine([request], slots=1)
        engine.submit(0, request)
        while engine.busy:
            for progress in engine.advance(answer.next_steps):
                part = answer.hear(progress)
                if part is not None:
                    yield part


class Answer:
    """One request's answer while it is being made: turns what the engine reports into parts.

    Attributes:
        next_steps: how many steps the next chunk should take, for this answer's sake: few until its first sound is
            out, so that nothing waits, more and more later, which costs less.
    """

    def __init__(self, omni: Omni, request: Request):
        self.omni = omni
        self.request = request
        self.next_steps = 2
        self._clock = _Clock()
        speaks = request.prompt.task.speaks
        self._voice = StreamDecoder(omni.codec, omni.config.codec) if speaks else None
        self._tokens = np.zeros((TEXT + 1, 0), np.int32)
        self._sound: list[np.ndarray] = []
        self._text = ""
        self._frames = 0

    def hear(self, progress: Progress) -> Part | None:
        """What is new of the answer; None if that is nothing yet."""
        omni, clock, voice = self.omni, self._clock, self._voice
        if voice is None or clock.first_sound is not None:
            self.next_steps = min(self.next_steps * 2, LONGEST_STREAM_CHUNK)
        clock.hear(progress)
        self._tokens = np.concatenate([self._tokens, progress.tokens], axis=1)
        whole = omni.written(self._tokens[TEXT])
        # An unfinished character decodes to U+FFFD: hold it back until its last byte is there.
        ready = whole if progress.finish else whole.rstrip("\ufffd")
        new_text, self._text = ready[len(self._text) :], ready
        audio = np.zeros(0, np.float32)
        if voice is not None:
            codes = playable(undelay(self._tokens[:TEXT], omni.vocab), omni.vocab)
            audio = voice.push(codes[self._frames :], last=progress.finish is not None)
            self._frames = len(codes)
            clock.sound(audio)
            self._sound.append(audio)
        reply = None
        if progress.finish:
            heard = np.concatenate(self._sound) if voice is not None else None
            reply = omni._reply(self.request, self._tokens, heard, progress.finish, clock)
        return Part(new_text, audio, reply) if new_text or len(audio) or reply else None


@dataclass
class _Clock:
    start: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    first_sound: float | None = None

    def _now(self) -> float:
        return time.perf_counter() - self.start

    def hear(self, progress: Progress) -> None:
        if self.first_token is None and progress.tokens.shape[1]:
            self.first_token = self._now()

    def sound(self, audio: np.ndarray | None) -> None:
        if self.first_sound is None and audio is not None and len(audio):
            self.first_sound = self._now()

    def timing(self, steps: int, audio: np.ndarray | None, rate: int) -> Timing:
        total = self._now()
        seconds = len(audio) / rate if audio is not None else 0.0
        return Timing(
            first_token=self.first_token or total,
            first_sound=self.first_sound,
            total=total,
            steps_per_second=steps / total,
            real_time_factor=total / seconds if seconds else None,
        )


def find_release(name: str | Path) -> Release | None:
    """What `Omni.load` loads under a name; None if that is a preset's of which there are no trained weights.

    Raises:
        ConfigError, CheckpointError: there is neither such a preset nor such a release.
    """
    from omni_jax.checkpoint import is_release, open_release

    return None if str(name) in PRESETS and not is_release(name) else open_release(name)


def default_layout(platform: str | None = None) -> tuple[bool, Any]:
    """How weights are kept on a platform, by default this backend: (stacked layers, dtype). The one place to decide it.

    CPU: one array per layer, float32 (bfloat16 is ten times slower there). Elsewhere: stacked, bfloat16.
    """
    return (False, jnp.float32) if (platform or jax.default_backend()) == "cpu" else (True, jnp.bfloat16)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, ids 0..255; stands in where no trained tokenizer is."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _check_codec(name: str) -> None:
    if name not in ("jax", "torch"):
        raise ConfigError(f"codec: expected jax or torch, found {name!r}")


def _decoder(codec: Snac, name: str) -> DecodeFn:
    if name == "jax":
        return make_decoder(codec)
    from omni_jax.codec.torch_snac import TorchSnac

    return TorchSnac.from_params(codec.config, codec.params()).decode
