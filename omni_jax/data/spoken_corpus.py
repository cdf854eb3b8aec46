"""A corpus of text made into one of speech: questions in many voices, answers in one.

This is how the data of Mini-Omni was made. `SpokenCorpus` wraps a `Source` of text and is a `Source` itself, so that
`omni_jax.data.prepare` writes it shard by shard.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import numpy as np

from omni_jax.audio import augment
from omni_jax.audio import io as audio_io
from omni_jax.data.sources import PendingExchange, RejectedRow, Row, Source, SourceShard
from omni_jax.data.synthesizers import SpeechSynthesizer, VoiceSpec
from omni_jax.errors import SynthesisError

MAX_ATTEMPTS = 3
"""Attempts at a text, questions each time in another voice and at another speed, before its row is rejected."""
QUESTION_SPEED = (0.85, 1.2)
"""Range of the speed of questions, relative to the voice's own."""
QUESTION_PITCH = (-2.0, 2.0)
"""Range of the pitch of questions, in semitones relative to the voice's own."""
QUESTION_SILENCE = (0.1, 0.3)
"""Range of the silence on each side of a question, in seconds."""
ANSWER_SILENCE = 0.1
"""Silence on each side of an answer, in seconds."""
ANSWER_LEVEL_DB = -20.0
"""RMS level of answers, relative to full scale."""


@dataclass(frozen=True)
class SpokenCorpus:
    """A source of text whose questions and answers are synthesized as they are read.

    A row without a question, or without an answer, is synthesized as far as it goes.
    """

    source: Source
    question_voices: tuple[VoiceSpec, ...]
    """One is drawn for each question. Empty: questions stay text."""
    answer_voice: VoiceSpec
    """Its first voice speaks all answers."""
    answer_sample_rate: int = 24_000
    """The codec's sample rate."""
    seed: int = 0
    """Decides voice, speed, pitch, room and noise of each question."""
    augment_questions: bool = True
    """Whether to add room, noise and a microphone's band to questions; see `omni_jax.audio.augment.augment`."""
    augmentation: augment.Augmentation | None = None
    """Settings of these; None: the defaults."""
    max_question_seconds: float = 30.0
    max_answer_seconds: float = 60.0
    max_answer_shift: float = 0.0
    """Longest additional silence before an answer, in seconds, drawn for each row. With the length of a codec frame,
    answers of equal text have different codes."""
    answer_speed: float = 1.0
    """Of answers, relative to the voice's own."""

    @property
    def name(self) -> str:
        """That of the source of text."""
        return self.source.name

    @property
    def license(self) -> str:
        """That of the source of text."""
        return self.source.license

    def shards(self) -> list[SourceShard]:
        """Those of the source of text."""
        return self.source.shards()

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        """The rows of a shard.

        Raises:
            MissingExtraError: a package that a voice needs is not installed.
        """
        seen = Counter[tuple[str, str]]()
        for location, load in self.source.rows(shard):
            yield Row(location, partial(self._load, load, seen))

    def _load(self, load: Callable[[], PendingExchange], seen: Counter[tuple[str, str]]) -> PendingExchange:
        exchange = load().exchange
        texts = exchange.question_text, exchange.answer_text
        # From the text, not from the row's location: rows that move in the source are synthesized as before. But rows
        # of equal text in a shard have different voices.
        repetition = f" {seen[texts]}" if seen[texts] else ""
        seen[texts] += 1
        seed = zlib.crc32(f"{self.seed} {' '.join(texts)}{repetition}".encode())
        if self.question_voices and exchange.question_text:
            exchange = replace(exchange, question_audio=self._speak_question(exchange.question_text, seed))
        if not exchange.answer_text:
            return PendingExchange(exchange)
        voice, audio = self._speak_answer(exchange.answer_text, seed)
        return PendingExchange(replace(exchange, voice=voice), audio)

    def _speak_question(self, text: str, seed: int) -> np.ndarray:
        """A question as int16 [samples] at 16 kHz."""
        rng, problems = random.Random(seed), []
        for _ in range(MAX_ATTEMPTS):
            spec = rng.choice(self.question_voices)
            synthesizer = open_synthesizer(spec)
            voice = rng.choice(spec.voices or synthesizer.voices())
            try:
                speed = rng.uniform(*(spec.speed or QUESTION_SPEED))
                samples, rate = synthesizer.speak(text, voice, speed, rng.uniform(*(spec.pitch or QUESTION_PITCH)))
            except SynthesisError as error:
                problems.append(str(error))
                continue
            before, after = rng.uniform(*QUESTION_SILENCE), rng.uniform(*QUESTION_SILENCE)
            audio = augment.pad_silence(samples, rate, audio_io.SAMPLE_RATE, before, after)
            if self.augment_questions:
                audio, _ = augment.augment(audio, audio_io.SAMPLE_RATE, seed, self.augmentation)
            _check_length(audio, audio_io.SAMPLE_RATE, self.max_question_seconds, "question")
            return audio_io.to_pcm16(audio)
        raise RejectedRow("question synthesis failed", problems[-1])

    def _speak_answer(self, text: str, seed: int) -> tuple[str, np.ndarray]:
        """Name of the voice, and the answer as f32 [samples] at `answer_sample_rate`."""
        voice, samples, rate = _synthesize_answer(self.answer_voice, text, self.answer_speed)
        before = ANSWER_SILENCE + random.Random(seed).uniform(0, self.max_answer_shift)
        audio = augment.pad_silence(samples, rate, self.answer_sample_rate, before, ANSWER_SILENCE)
        _check_length(audio, self.answer_sample_rate, self.max_answer_seconds, "answer")
        return voice, augment.set_level(audio, ANSWER_LEVEL_DB)


@cache
def open_synthesizer(spec: VoiceSpec) -> SpeechSynthesizer:
    """Open a synthesizer once per process: some load a model."""
    return spec.open()


@lru_cache(maxsize=8)
def _synthesize_answer(spec: VoiceSpec, text: str, speed: float) -> tuple[str, np.ndarray, int]:
    """Name of the voice, f32 [samples] and sample rate. Rows with the same answer one after the other cost one.

    Raises:
        RejectedRow: the synthesizer failed.
    """
    synthesizer = open_synthesizer(spec)
    voice = (spec.voices or tuple(synthesizer.voices()))[0]
    problem = ""
    for _ in range(MAX_ATTEMPTS):
        try:
            return f"{synthesizer.name} {voice}", *synthesizer.speak(text, voice, speed)
        except SynthesisError as error:
            problem = str(error)
    raise RejectedRow("answer synthesis failed", problem)


def _check_length(audio: np.ndarray, sample_rate: int, max_seconds: float, kind: str) -> None:
    if len(audio) > max_seconds * sample_rate:
        found = f"expected at most {max_seconds:g} s, found {len(audio) / sample_rate:.1f} s"
        raise RejectedRow(f"spoken {kind} too long", found)
