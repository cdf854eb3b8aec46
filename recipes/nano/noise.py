"""Recordings that are no question: noise, hum, music, knocks, other languages.

A row's text is a kind and numbers, which are the seed: `music 0 17`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from omni_jax.audio import augment
from omni_jax.audio import io as audio_io
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.data.sources import PendingExchange
from omni_jax.data.spoken_corpus import SpokenCorpus
from omni_jax.data.synthesizers import Command
from recipes.nano.questions import read_facts

SECONDS = (0.8, 4.0)
LEVEL_DB = (-40.0, -15.0)
ESPEAK = "espeak-ng -v {voice} -w {out} {text}"
LANGUAGES: Mapping[str, list[str]] = {
    language: text.splitlines() for language, text in read_facts("languages.yaml").items()
}
"""Sentences by espeak-ng's name of the language."""


class NoiseCorpus(SpokenCorpus):
    """A source of text whose questions name recordings to make; they have no question in words."""

    def _load(self, load: Callable[[], PendingExchange], seen: Counter[tuple[str, str]]) -> PendingExchange:
        exchange = load().exchange
        recording = audio_io.to_pcm16(make_noise(exchange.question_text))
        voice, audio = self._speak_answer(exchange.answer_text, zlib.crc32(exchange.question_text.encode()))
        return PendingExchange(replace(exchange, question_text="", question_audio=recording, voice=voice), audio)


def make_noise(text: str) -> np.ndarray:
    """The recording that a row names, f32 [samples] at 16 kHz."""
    kind = text.split()[0]
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    samples = round(rng.uniform(*SECONDS) * SAMPLE_RATE)
    return augment.set_level(KINDS[kind](rng, samples), rng.uniform(*LEVEL_DB))


def noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Steady, or louder and softer, as of rain, wind, a street."""
    sound = augment.colored_noise(rng, samples, SAMPLE_RATE, float(rng.uniform(-1, 2)))
    return augment.swell(rng, sound, SAMPLE_RATE) if rng.random() < 0.6 else sound


def hum(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A machine: harmonics of a low tone, whose speed may change, in noise."""
    speed = np.interp(np.linspace(0, 1, samples), np.linspace(0, 1, 4), rng.uniform(0.8, 1.25, 4))
    phase = 2 * np.pi * np.cumsum(rng.uniform(40, 240) * (speed if rng.random() < 0.5 else 1 + 0 * speed)) / SAMPLE_RATE
    parts = [rng.uniform(0.1, 1) / (1 + 0.3 * n) * np.sin(n * phase + rng.uniform(0, 6)) for n in range(1, 16)]
    return (np.sum(parts, axis=0) + rng.uniform(0, 1) * noise(rng, samples)).astype(np.float32)


def music(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A melody with chords: tones of a scale with overtones, plucked or held, maybe with a drum."""
    sound = np.zeros(samples + SAMPLE_RATE, np.float64)
    beat = round(rng.uniform(0.12, 0.5) * SAMPLE_RATE)
    scale = np.array(((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))[int(rng.integers(2))])
    key, decay, overtones = rng.uniform(110, 330), rng.uniform(1, 8), rng.uniform(0.5, 2.5)
    drum = rng.random() < 0.4
    for start in range(0, samples, beat):
        length = min(beat * int(rng.integers(1, 4)), SAMPLE_RATE)
        time = np.arange(length) / SAMPLE_RATE
        envelope = np.minimum(1, time * 60) * np.exp(-decay * time) * np.minimum(1, (length - np.arange(length)) / 200)
        for octave in rng.choice((0.5, 1, 2), int(rng.integers(1, 4))):
            tone = key * octave * 2 ** (rng.choice(scale) / 12)
            waves = [np.sin(2 * np.pi * n * tone * time) / n**overtones for n in range(1, 7) if n * tone < 7000]
            sound[start : start + length] += envelope * np.sum(waves, axis=0)
        if drum:
            hit = rng.standard_normal(1600) * np.exp(-np.arange(1600) / 200)
            sound[start : start + 1600] += hit
    return (sound[:samples] + 0.01 * noise(rng, samples)).astype(np.float32)


def knocks(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Knocking, typing, clapping: short bursts, regular or not, in a room."""
    sound = 0.003 * rng.uniform(0.3, 3) * noise(rng, samples)
    length = round(rng.uniform(0.01, 0.08) * SAMPLE_RATE)
    gap = rng.uniform(0.1, 0.7)
    at = rng.uniform(0.05, gap)
    color = float(rng.uniform(-1, 2))
    while (start := round(at * SAMPLE_RATE)) < samples - length:
        burst = augment.colored_noise(rng, length, SAMPLE_RATE, color) * np.exp(-5 * np.arange(length) / length)
        sound[start : start + length] += (rng.uniform(0.3, 1) * burst).astype(np.float32)
        at += gap * rng.uniform(0.6, 1.4)
    return sound


def language(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A sentence in another language, by espeak-ng; as long as it is."""
    voice = str(rng.choice(list(LANGUAGES)))
    variant = str(rng.choice(("", "+f2", "+f4", "+m3", "+m7", "+Andrea", "+max")))
    text = str(rng.choice(LANGUAGES[voice]))
    speaker = Command(ESPEAK, (voice + variant,))
    sound, rate = speaker.speak(text, voice + variant, float(rng.uniform(0.9, 1.15)))
    return augment.pad_silence(sound, rate, SAMPLE_RATE, 0.2, 0.2)


KINDS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    function.__name__: function for function in (noise, hum, music, knocks, language)
}
"""By name."""
