"""`Omni`: the interface that users import. Recordings or text in, text and speech out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tokenizers
from flax import nnx

from omni_jax import sharding
from omni_jax.audio import io as audio_io
from omni_jax.audio import vad
from omni_jax.checkpoint import release as releases
from omni_jax.checkpoint import tensors
from omni_jax.codec.snac import DecodeFn, Snac, make_decoder
from omni_jax.codec.stream import StreamDecoder
from omni_jax.config.model import PRESETS, ModelConfig
from omni_jax.errors import AudioError, CheckpointError, ConfigError, NoSpeechError, UntrainedWarning
from omni_jax.inference.answer import AnswerBuilder, Chunk, OutputDecoder, Reply
from omni_jax.inference.conversation import Conversation, load_conversation
from omni_jax.inference.engine import Engine, Part, PreparedRequest, next_power_of_2
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.prefix_cache import PrefixCache
from omni_jax.inference.request import Audio, Request, Turn
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.omni import OmniModel
from omni_jax.model.pages import PAGE_LEN, pages_for
from omni_jax.prompts import (
    History,
    after_history,
    history_room,
    make_history,
    speech_positions,
    speech_prompt,
    text_prompt,
)
from omni_jax.tasks import Task
from omni_jax.text.normalize import normalize_text
from omni_jax.text.sentences import split_sentences
from omni_jax.tokenizer import byte_tokenizer, encode_text
from omni_jax.vocab import Vocab

CodecName = Literal["jax", "torch"]

MAX_TRANSCRIBED_SECONDS = 4 * 3600
"""Longest recording that is transcribed: all of it is in memory, 230 MB an hour."""
MAX_ROOM_SECONDS = 60
"""Most room before and after a spoken question, together."""


class Omni:
    """A speech-to-speech language model.

    Make one with `Omni.from_pretrained`. Methods accept the options of `GenerationConfig` by name.

    Attributes:
        config: the model's shape.
        runner: the model's weights and compiled programs.
        outputs: what decodes its tokens.
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
        release: releases.Release | None = None,
    ):
        """Take the parts of a model.

        Args:
            model: with its weights.
            codec: decodes codes; see `omni_jax.codec.snac.make_decoder`.
            tokenizer: of the text.
            trained: False if the weights are random.
            int8: see `omni_jax.inference.runner.ModelRunner`.
            release: what it was loaded from; `save_pretrained` takes codec and tokenizer from there.
        """
        self.config: ModelConfig = model.config
        self.runner = ModelRunner(model, int8=int8)
        self.outputs = OutputDecoder(model.config, tokenizer, codec)
        self.trained = trained
        self._vocab = Vocab(self.config.vocab)
        self._release, self._int8 = release, int8
        self._prefixes = PrefixCache()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "nano",
        *,
        revision: str | None = None,
        dtype: Any = None,
        codec: CodecName = "jax",
        int8: bool = False,
        short_windows: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        cache_dir: str | Path | None = None,
    ) -> Omni:
        """Load a model.

        Args:
            name_or_path: `nano`, the model that ships with the package; a release folder, the folder of a finished
                training run, or a hub id. The other presets' names are understood too, and give untrained models. A
                folder of such a name comes first.
            revision: branch, tag or commit of a hub repository.
            dtype: of weights and matrix products; None: float32 on a CPU, bfloat16 elsewhere.
            codec: decode audio by the native codec, or by the torch one in a host callback.
            int8: decode with weights quantized to eight bits; see `omni_jax.inference.runner.ModelRunner`.
            short_windows: encode short recordings in a quarter or a half of the audio encoder's window, whatever the
                release says; see `omni_jax.config.model.AudioEncoderConfig`.
            mesh: shard the model over devices; see `omni_jax.sharding.make_mesh`.
            cache_dir: where hub downloads are kept.

        Raises:
            ConfigError, CheckpointError: there is no such model, a file of it cannot be used, or the mesh does not
                divide its heads; names the file or field.
        """
        _check_codec(codec)
        release = releases.find_release(name_or_path, revision=revision, cache_dir=cache_dir)
        if release is None:
            return cls._untrained(
                str(name_or_path), 0, codec, mesh, int8=int8, short_windows=short_windows, dtype=dtype
            )
        if short_windows:
            release = replace(release, config=release.config.with_short_windows())
        _check_heads(release.config, mesh)
        stacked, default = sharding.default_layout()
        dtype = default if dtype is None else dtype
        model = release.load_model(stacked=stacked, dtype=dtype, param_dtype=dtype, mesh=mesh)
        decode = _decoder(release.load_codec(), codec)
        return cls(model, decode, release.tokenizer(), int8=int8, release=release)

    @classmethod
    def untrained(
        cls,
        preset: str,
        *,
        seed: int = 0,
        dtype: Any = None,
        codec: CodecName = "jax",
        int8: bool = False,
        short_windows: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Omni:
        """A model with random weights and one token per byte: runs like a trained one, its answers mean nothing."""
        return cls._untrained(preset, seed, codec, mesh, int8=int8, short_windows=short_windows, dtype=dtype)

    @classmethod
    def _untrained(
        cls,
        preset: str,
        seed: int,
        codec: str,
        mesh: jax.sharding.Mesh | None,
        *,
        int8: bool,
        short_windows: bool,
        dtype: Any,
    ) -> Omni:
        _check_codec(codec)
        if preset not in PRESETS:
            raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
        config = PRESETS[preset].with_short_windows() if short_windows else PRESETS[preset]
        _check_heads(config, mesh)
        warnings.warn(
            f"the model {preset!r} is untrained: its weights are random (seed {seed}), its answers mean nothing",
            UntrainedWarning,
            stacklevel=3,
        )
        stacked, default = sharding.default_layout()
        dtype = default if dtype is None else dtype
        model = tensors.init_model(config, stacked=stacked, dtype=dtype, seed=seed, mesh=mesh)
        decode = _decoder(Snac(config.codec, rngs=nnx.Rngs(seed)), codec)
        return cls(model, decode, byte_tokenizer(), trained=False, int8=int8)

    def save_pretrained(self, folder: str | Path, *, int8: bool = False) -> None:
        """Write a release folder that `from_pretrained` reads.

        Args:
            folder: new or empty.
            int8: keep the model's matrices in eight bits, a quarter of float32.

        Raises:
            CheckpointError: `folder` has something in it, or the model was not loaded from a release, whose codec and
                tokenizer belong to it.
        """
        if self._release is None or self._int8:
            found = "one loaded with int8" if self._int8 else "one made of parts"
            raise CheckpointError(f"{folder}: expected a model loaded from a release in full precision, found {found}")
        releases.save_release(
            folder,
            self.config,
            tensors.model_tensors(self.model),
            self._release.codec_tensors(),
            self._release.files_to_keep(),
            int8=int8,
        )

    @cached_property
    def model(self) -> OmniModel:
        """The bare module, over the same arrays; quantized ones if loaded with `int8`."""
        return self.runner.module()

    @property
    def sample_rate(self) -> int:
        """Samples per second of the audio it outputs."""
        return self.outputs.sample_rate

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Of the text."""
        return self.outputs.tokenizer

    def __repr__(self) -> str:
        """Short: the shape in a few numbers."""
        trunk = self.config.trunk
        return (
            f"<Omni, trunk of {trunk.num_layers} layers x {trunk.hidden_size}, "
            f"{self.config.audio_encoder.max_samples / audio_io.SAMPLE_RATE:g} s in, {self.sample_rate} Hz out"
            f"{'' if self.trained else ', untrained'}>"
        )

    def reply(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        sample_rate: int | None = None,
        truncate: bool = False,
        **options: Any,
    ) -> Reply:
        """Answer a recording (A1A2) or a text (T1A2) in text and speech."""
        return self.generate(Request(audio, text, None, sample_rate, truncate), **options)

    def answer(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        sample_rate: int | None = None,
        truncate: bool = False,
        **options: Any,
    ) -> Reply:
        """Answer a recording (A1T2) or a text (T1T2) in text only."""
        task = Task.T1T2 if audio is None else Task.A1T2
        return self.generate(Request(audio, text, task, sample_rate, truncate), **options)

    def transcribe(
        self, audio: Audio, *, sample_rate: int | None = None, truncate: bool = False, **options: Any
    ) -> Reply:
        """Transcribe a recording (A1T1) of up to `MAX_TRANSCRIBED_SECONDS`; an empty one without speech."""
        return self.generate(Request(audio, None, Task.A1T1, sample_rate, truncate), **options)

    def read_aloud(self, text: str, **options: Any) -> Reply:
        """Speak a text (T1A1); what is too long for the model is spoken sentence by sentence."""
        return self.generate(Request(None, text, Task.T1A1), **options)

    def generate(
        self,
        inputs: Request | Mapping[str, Any] | str | Path,
        *,
        task: Task | str | None = None,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> Reply:
        """Answer one request.

        Args:
            inputs: a `Request`, a dict of its fields, or the path of a recording.
            task: overrides that of the request.
            config: how to answer, where the request does not say.
            **options: fields of `GenerationConfig` that override those of `config`.

        Raises:
            AudioError: the recording cannot be used.
            ConfigError: the task does not fit the input, an option is out of range, or the text is too long or has no
                letter or digit.
        """
        return self.run([self.prepare(inputs, task=task, config=config, **options)])[0]

    def batch(
        self,
        inputs: Iterable[Request | Mapping[str, Any] | str | Path],
        *,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> list[Reply]:
        """Answer many requests at once, in any mixture of tasks.

        Args:
            inputs: each a `Request`, a dict of its fields, or the path of a recording.
            config: how to answer those that do not say.
            **options: fields of `GenerationConfig` that override those of `config`.

        Returns:
            The replies, in order.

        Raises:
            AudioError, ConfigError: one of them cannot be used, says which and why; none is answered then.
        """
        requests = []
        for index, request in enumerate(inputs):
            try:
                requests.append(self.prepare(request, config=config, **options))
            except (AudioError, ConfigError) as error:
                raise error.prefixed(f"inputs[{index}]") from None
        return self.run(requests)

    def stream(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        task: Task | str | None = None,
        sample_rate: int | None = None,
        truncate: bool = False,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Answer while decoding: text as soon as it is decided, audio as soon as it is final.

        Joined, the chunks are the answer of the other methods; the last one carries it whole.
        """
        return self.stream_prepared(self.prepare(Request(audio, text, task, sample_rate, truncate), **options))

    def conversation(
        self, load: str | Path | None = None, *, system: str = "", history: Iterable[Turn | Sequence[str]] = ()
    ) -> Conversation:
        """Begin a conversation, or go on with one.

        Args:
            load: a file of `Conversation.save`, which has system text and history.
            system: text that it begins with, such as a name or a manner.
            history: turns that were before: a `Turn` each, or a question and an answer.

        Raises:
            ConfigError: the model was not trained on conversations, the file cannot be used, or it is given together
                with a system text or a history.
        """
        if not self.config.conversation:
            raise ConfigError(
                "conversation: expected a model that was trained on conversations, found one that was not "
                "(conversation of its config)"
            )
        if load is not None:
            if system or history:
                raise ConfigError("load: expected no system text and history besides, found some", field="load")
            system, history = load_conversation(load)
        return Conversation(self, system, history)

    def prepare(
        self,
        inputs: Request | Mapping[str, Any] | str | Path,
        *,
        task: Task | str | None = None,
        config: GenerationConfig | None = None,
        max_samples: int | None = None,
        **options: Any,
    ) -> PreparedRequest:
        """Validate a request and make it ready to run: reads the file, prepares the text.

        Args:
            inputs: see `generate`, like what follows.
            task: overrides that of the request.
            config: how to answer, where the request does not say.
            max_samples: refuse a longer recording before it is decoded, in samples at 16 kHz; at most, and by default,
                that of `max_samples`.
            **options: fields of `GenerationConfig`.
        """
        request = Request.of(inputs)
        if task is not None:
            request = replace(request, task=task)
        task = request.resolve_task()
        settings = (request.config or config or GenerationConfig()).replace(**options)
        if request.text is None:
            prepared = self._prepare_audio(task, request, max_samples)
        else:
            prepared = self._prepare_text(task, request)
        if request.transcribe_question:
            prepared = replace(prepared, transcription=replace(self.to_transcription(prepared), of_question=True))
        if request.system or request.history:
            prepared = self._follow_history(prepared, request.system or "", request.history)
        context = self.config.trunk.max_position
        if (longest := prepared.longest_prompt) > context:
            raise ConfigError(f"the prompt takes {longest} positions; expected at most the context of {context}")
        return replace(prepared, config=settings)

    def prepare_history(self, system: str, turns: Sequence[Turn], *, present: int = 1) -> History:
        """A system text and past turns as a prompt begins with them, for `AsyncEngine.remember`.

        Args:
            system: may be empty.
            turns: the oldest first.
            present: positions of the prompt that follows; of another prompt the history is the same, unless one of
                them takes more than a quarter of the context.
        """
        ids = [(self._past_text(turn.question), self._past_text(turn.answer)) for turn in turns]
        room = history_room(self.config.trunk.max_position, present)
        return make_history(self._past_text(system), ids, room, self._vocab)

    def run(self, requests: Sequence[PreparedRequest], max_batch_size: int = 8) -> list[Reply]:
        """Answer prepared requests, up to `max_batch_size` at a time in one running batch; in their order."""
        if not requests:
            return []
        rows = len(requests) + sum(request.transcription is not None for request in requests)
        engine = self._engine(requests, min(max_batch_size, next_power_of_2(rows)))
        for key, request in enumerate(requests):
            engine.submit(key, request)
        answers = [AnswerBuilder(self.outputs, request, streaming=False) for request in requests]
        replies: dict[int, Reply] = {}
        while engine.busy:
            ended, finished = [], []
            for progress in engine.advance():
                if progress.error is not None:
                    raise progress.error
                answers[progress.key].add(progress)
                if (progress.finish or progress.part_finish) and not progress.of_question:
                    ended.append(progress.key)
                if progress.done:
                    finished.append(progress.key)
            # The audio of all that ended in this chunk, in one call of the codec.
            speaking = [answers[key] for key in ended if requests[key].task.outputs_audio]
            audio = self.outputs.decode_audio([answer.part_tokens for answer in speaking])
            for answer, samples in zip(speaking, audio, strict=True):
                answer.add_audio(samples)
            replies |= {key: answers[key].reply() for key in finished}
        return [replies[key] for key in range(len(requests))]

    def stream_prepared(self, request: PreparedRequest) -> Iterator[Chunk]:
        """Answer a prepared request while decoding; see `stream`."""
        answer = AnswerBuilder(self.outputs, request, streaming=True)
        engine = self._engine([request], max_batch_size=1 if request.transcription is None else 2)
        engine.submit(0, request)
        while engine.busy:
            for progress in engine.advance(answer.next_steps):
                if progress.error is not None:
                    raise progress.error
                chunk = answer.add(progress)
                if chunk is not None:
                    yield chunk

    def warm_up(self, max_batch_size: int = 1) -> None:
        """Compile every program that requests can need, so that none waits for the compiler.

        Compiles for a running batch of `max_batch_size` with memory for requests that are as long as the context and
        for their companion rows, as `AsyncEngine` has it without `cache_bytes`, and for streaming.
        """
        engine = Engine(self.runner, max_batch_size, self.config.trunk.max_position)
        engine.warm_up()
        for _ in engine.warm_up_rest():
            pass
        StreamDecoder(self.outputs.codec, self.config.codec).warm_up()

    def _follow_history(self, prepared: PreparedRequest, system: str, turns: Sequence[Turn]) -> PreparedRequest:
        """The request as a turn of a conversation."""
        if not self.config.conversation:
            field = "system" if system else "history"
            raise ConfigError(
                f"{field}: expected none: this model was not trained on conversations (conversation of its config)",
                field=field,
            )
        (part,) = prepared.parts
        history = self.prepare_history(system, turns, present=len(part.prompt))
        return replace(prepared, parts=(replace(part, prompt=after_history(history, part.prompt)),))

    def _past_text(self, text: str) -> list[int]:
        """Token ids of what was said before; none if there is no letter or digit in it."""
        text = normalize_text(text, self.config.text, may_be_empty=True)
        return self._tokenize(text) if text else []

    def _prepare_text(self, task: Task, request: Request) -> PreparedRequest:
        settings = self.config.text
        text = normalize_text(request.text, settings)
        if task is not Task.T1A1:
            return PreparedRequest.of(text_prompt(task, self._tokenize(text), self._vocab))
        sentences = [text] if settings.max_words is None else split_sentences(text, settings.max_words)
        parts = [Part(text_prompt(task, self._tokenize(text), self._vocab), text=text) for text in sentences]
        return PreparedRequest(task, tuple(parts))

    def _prepare_audio(self, task: Task, request: Request, max_samples: int | None) -> PreparedRequest:
        limit = self.max_samples(task, truncate=request.truncate)
        try:
            audio = request.samples(limit if max_samples is None else min(limit, max_samples))
            spans = self._spans_to_hear(task, audio, request)
        except NoSpeechError as error:
            if task is not Task.A1T1:
                raise
            return PreparedRequest(task, (), duration=error.seconds)
        parts = [self._speech_part(task, audio, span) for span in spans]
        return PreparedRequest(task, tuple(parts), duration=len(audio) / audio_io.SAMPLE_RATE)

    def max_samples(self, task: Task, *, truncate: bool = False) -> int:
        """The longest recording that is read for a task, in samples at 16 kHz.

        The audio encoder takes one window at a time. To transcribe, a longer recording is cut into several; and where
        the release finds the speech in it, there may be room around a question.
        """
        if task is Task.A1T1 and not truncate:
            return MAX_TRANSCRIBED_SECONDS * audio_io.SAMPLE_RATE
        room = MAX_ROOM_SECONDS if self.config.audio.find_speech else 0
        return self.config.audio_encoder.max_samples + room * audio_io.SAMPLE_RATE

    def to_transcription(self, request: PreparedRequest) -> PreparedRequest:
        """The request to transcribe a recording that has been prepared for another task."""

        def part_of(part: Part) -> Part:
            return replace(part, prompt=speech_prompt(Task.A1T1, part.prompt.speech_positions, self._vocab))

        parts = tuple(map(part_of, request.parts))
        return replace(request, task=Task.A1T1, parts=parts, config=GenerationConfig(), transcription=None)

    def _spans_to_hear(self, task: Task, audio: np.ndarray, request: Request) -> list[vad.Span]:
        """What of a recording the model takes, each span at most as long as its audio encoder takes at once."""
        max_samples = self.config.audio_encoder.max_samples
        name = request.source_name
        start, end = 0, len(audio)
        if task is Task.A1T1 and not request.truncate and (end > max_samples or self.config.audio.find_speech):
            return vad.find_windows(audio, max_samples, name=name)
        if self.config.audio.find_speech:
            start, end = vad.find_speech(audio, name=name)
        speech = audio_io.check_duration(audio[start:end], max_samples, truncate=request.truncate, name=name)
        return [(start, start + len(speech))]

    def _speech_part(self, task: Task, audio: np.ndarray, span: vad.Span) -> Part:
        start, end = span
        speech, level = audio[start:end], self.config.audio.level
        if level is not None:
            speech = vad.to_level(speech, level)
        positions = speech_positions(len(speech), self.config.audio_encoder.max_position, self.config.adapter.stack)
        return Part(speech_prompt(task, positions, self._vocab), speech, start=start)

    def _tokenize(self, text: str) -> list[int]:
        ids = encode_text(self.tokenizer, text)
        if not ids:
            raise ConfigError("text: expected some text, found none", field="text")
        if max(ids) >= self.config.vocab.text:
            raise ConfigError(
                f"text: the tokenizer gives id {max(ids)}; expected ids below the model's vocabulary of "
                f"{self.config.vocab.text}",
                field="text",
            )
        return ids

    def _engine(self, requests: Sequence[PreparedRequest], max_batch_size: int) -> Engine:
        """One that is never short of pages for these requests, with those of companion rows only if there are any."""
        max_len = max(request.cache_len(self.config.trunk.max_position) for request in requests)
        companions, groups = sum(request.has_companion for request in requests), self.runner.row_groups(max_batch_size)
        slots = max_batch_size // groups
        # Rounded up, as each size is compiled; any group may have all of them.
        rows = slots + min(slots, next_power_of_2(companions)) if companions else slots
        pages = groups * max(2, rows) * pages_for(max_len, min(PAGE_LEN, max_len))
        return Engine(self.runner, max_batch_size, max_len, prefixes=self._prefixes, num_pages=pages)


def _check_codec(name: str) -> None:
    if name not in ("jax", "torch"):
        raise ConfigError(f"codec: expected jax or torch, found {name!r}", field="codec")


def _check_heads(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> None:
    """Refuse a mesh over whose tensor axis the trunk cannot be split: every device would compute all heads."""
    if mesh is None:
        return
    for field, axis in (("num_heads", "heads"), ("num_kv_heads", "kv_heads")):
        heads, shards = getattr(config.trunk, field), sharding.num_shards(axis, mesh)
        if heads % shards:
            raise ConfigError(f"tensor: expected a divisor of trunk.{field}, {heads}, found {shards}", field="tensor")


def _decoder(codec: Snac, name: str) -> DecodeFn:
    if name == "jax":
        return make_decoder(codec)
    from omni_jax.codec.torch_snac import TorchSnac
    from omni_jax.convert.snac import to_torch_module

    return TorchSnac(to_torch_module(codec.config, codec.params()), codec.config).decode
