"""Gives a corpus in writing its voices: questions in many, answers in one, as Mini-Omni's own data was made.

A text corpus goes in, one of spoken exchanges comes out; `omni_jax.data.prepare` writes it, part by part.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from omni_jax.audio import augment
from omni_jax.audio import io as audio_io
from omni_jax.data.sources import PendingExchange, RejectedRow, Row, Source, SourceShard
from omni_jax.data.synthesizers import SpeechSynthesizer, VoiceSpec
from omni_jax.errors import SynthesisError

TRIES = 3
"""How often an engine is asked, each time in another of its voices and at another pace, before a row is given up."""
SPEED = (0.85, 1.2)
PITCH = (-2.0, 2.0)
"""Ranges of questions."""
SILENCE = (0.1, 0.3)
"""Seconds on each side of a question."""
ANSWER_SILENCE = 0.1
ANSWER_LEVEL = -20.0
"""RMS of every answer, in dB of full scale."""


@dataclass(frozen=True)
class SpokenCorpus:
    """A corpus whose questions and answers are spoken."""

    source: Source
    questions: tuple[VoiceSpec, ...]
    """Of which one is drawn for each question; empty: questions stay in writing."""
    answer: VoiceSpec
    """The first of its voices says all answers."""
    rate: int = 24_000
    """Samples per second of answers, the codec's."""
    seed: int = 0
    """Of voices, pace, pitch, rooms and noise."""
    augment: bool = True
    """Whether questions sound as if recorded somewhere."""
    max_question_seconds: float = 30.0
    max_answer_seconds: float = 60.0

    @property
    def name(self) -> str:
        """As the corpus it is made of."""
        return self.source.name

    @property
    def license(self) -> str:
        """As the corpus it is made of."""
        return self.source.license

    def units(self) -> list[SourceShard]:
        """See `Source.units`."""
        return self.source.units()

    def rows(self, unit: SourceShard) -> Iterator[Row]:
        """See `Source.rows`."""
        for place, make in self.source.rows(unit):
            yield place, partial(self._draft, make)

    def _draft(self, make: Callable[[], PendingExchange]) -> PendingExchange:
        exchange = make().exchange
        # By the text too: a row that stands elsewhere tomorrow sounds as it does today.
        seed = zlib.crc32(f"{self.seed} {exchange.question_text} {exchange.answer_text}".encode())
        if self.questions:
            exchange = replace(exchange, question_audio=self._question(exchange.question_text, seed))
        voice, audio = self._answer(exchange.answer_text)
        return PendingExchange(replace(exchange, voice=voice), audio)

    def _question(self, text: str, seed: int) -> np.ndarray:
        """int16 [samples] at 16 kHz."""
        rng, problems = random.Random(seed), []
        for _ in range(TRIES):
            voices = rng.choice(self.questions)
            engine = _open(voices)
            voice = rng.choice(voices.only or engine.voices())
            try:
                samples, rate = engine.speak(text, voice, rng.uniform(*SPEED), rng.uniform(*PITCH))
            except SynthesisError as error:
                problems.append(str(error))
                continue
            before, after = rng.uniform(*SILENCE), rng.uniform(*SILENCE)
            sound = augment.pad_silence(samples, rate, audio_io.SAMPLE_RATE, before, after)
            if self.augment:
                sound, _ = augment.augment(sound, audio_io.SAMPLE_RATE, seed)
            return audio_io.to_pcm16(_not_longer(sound, audio_io.SAMPLE_RATE, self.max_question_seconds, "question"))
        raise RejectedRow("no voice for the question", problems[-1])

    def _answer(self, text: str) -> tuple[str, np.ndarray]:
        """Who says it, and f32 [samples] at `rate`."""
        engine = _open(self.answer)
        voice = (self.answer.only or tuple(engine.voices()))[0]
        problem = ""
        for _ in range(TRIES):
            try:
                samples, rate = engine.speak(text, voice)
            except SynthesisError as error:
                problem = str(error)
                continue
            sound = augment.pad_silence(samples, rate, self.rate, ANSWER_SILENCE, ANSWER_SILENCE)
            sound = _not_longer(sound, self.rate, self.max_answer_seconds, "answer")
            return f"{engine.name} {voice}", augment.set_level(sound, ANSWER_LEVEL)
        raise RejectedRow("no voice for the answer", problem)


@cache
def _open(voices: VoiceSpec) -> SpeechSynthesizer:
    """Once in each process: some engines load a model."""
    return voices.open()


def _not_longer(sound: np.ndarray, rate: int, seconds: float, what: str) -> np.ndarray:
    if len(sound) > seconds * rate:
        found = f"expected at most {seconds:g} s, found {len(sound) / rate:.1f} s"
        raise RejectedRow(f"spoken {what} too long", found)
    return sound
