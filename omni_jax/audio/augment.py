"""TODO: omni_jax/audio/augment.py"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr

from omni_jax.errors import SynthesisError


def change_speed(audio: np.ndarray, ratio: float) -> np.ndarray:
    """Play samples faster by a ratio: everything `ratio` times as high and as short.

    Args:
        audio: f32 [samples].
        ratio: 1 changes nothing.
    """
    if abs(ratio - 1) < 1e-4:
        return audio
    # soxr wants rates as numbers of like size; only their quotient counts.
    return np.asarray(soxr.resample(audio, 10_000 * ratio, 10_000.0, quality="HQ"), np.float32)


def trim_silence(audio: np.ndarray, rate: int, *, pause: float = 0.3) -> np.ndarray:
    """Cut the silence off both ends and shorten long pauses inside.

    Silence is what lies 45 dB below the loudest 10 ms, and not within 40 ms of anything louder, so that soft
    beginnings and ends of words stay.

    Args:
        audio: f32 [samples].
        rate: samples per second.
        pause: longest pause that stays, in seconds.

    Returns:
        f32 [samples], empty if there is no sound at all.
    """
    step = rate // 100
    frames = -(-len(audio) // step)
    padded = np.zeros(frames * step, np.float32)
    padded[: len(audio)] = audio
    power = np.mean(np.square(padded.reshape(frames, step)), axis=1)
    if frames == 0 or power.max() <= 0:
        return np.zeros(0, np.float32)
    loud = power > power.max() * 10**-4.5
    # Four frames on each side. numpy's "same" would be longer than a recording of fewer than nine.
    near = np.convolve(loud, np.ones(9))[4:-4] > 0
    keep = np.zeros(frames, bool)
    first, last = np.flatnonzero(near)[[0, -1]]
    longest, silent = round(pause * 100), 0
    for frame in range(first, last + 1):
        silent = 0 if near[frame] else silent + 1
        keep[frame] = silent <= longest
    parts = np.split(padded, np.flatnonzero(np.diff(keep)) * step + step)
    kept = parts[0 if keep[0] else 1 :: 2]
    joined = kept[0]
    for part in kept[1:]:
        joined = _join(joined, part, step)
    return joined


def pad_silence(
    audio: np.ndarray, rate: int, wanted: int, before: float, after: float, *, decibels: float | None = None
) -> np.ndarray:
    """Speech as an engine gives it, trimmed, at another rate, with silences of known length around it.

    Args:
        audio: f32 [samples].
        rate: samples per second.
        wanted: of the result.
        before: seconds.
        after: seconds.
        decibels: RMS of the speech in the result, of full scale; None leaves it as loud as it is.
    """
    audio = trim_silence(audio, rate)
    if rate != wanted:
        audio = soxr.resample(audio, rate, wanted, quality="HQ")
    if decibels is not None:
        audio = set_level(audio, decibels)
    silences = [np.zeros(round(seconds * wanted), np.float32) for seconds in (before, after)]
    return np.concatenate([silences[0], audio, silences[1]])


@dataclass(frozen=True)
class Augmentation:
    """How a clean recording is varied. Every pair is a range to draw from evenly; every `_chance` a probability."""

    stretch: tuple[float, float] = (0.94, 1.06)
    """Played this much faster, pitch and all."""
    room_chance: float = 0.4
    reverberation: tuple[float, float] = (0.1, 0.5)
    """Seconds until the echo has fallen by 60 dB."""
    directness: tuple[float, float] = (3.0, 18.0)
    """Direct sound above the echo, in dB."""
    noise_chance: float = 0.7
    snr: tuple[float, float] = (8.0, 40.0)
    """Speech above the noise, in dB."""
    colors: tuple[float, ...] = (-1.0, 0.0, 1.0, 2.0)
    """Of the noise, whose power falls with this power of the frequency: blue, white, pink, brown."""
    band_chance: float = 0.3
    low_cut: tuple[float, float] = (50.0, 350.0)
    """Hz below which little comes through."""
    high_cut: tuple[float, float] = (3000.0, 7000.0)
    """Hz above which little comes through."""
    level: tuple[float, float] = (-36.0, -16.0)
    """RMS of the result in dB of full scale; less where its peak would pass full scale."""


def augment(
    audio: np.ndarray, rate: int, seed: int | list[int], settings: Augmentation | None = None
) -> tuple[np.ndarray, dict[str, float]]:
    """What a room, its noise and a microphone make of a voice.

    Args:
        audio: f32 [samples], not silent; silence around the speech is where the echo ends.
        rate: samples per second.
        seed: of everything drawn; the same seed gives the same samples.
        settings: the ranges; `Augmentation()` if None.

    Returns:
        f32 [samples] within -1..1, as long as the stretched recording, and what was drawn, by name.

    Raises:
        SynthesisError: the recording is silent.
    """
    ranges = settings or Augmentation()
    rng = np.random.default_rng(seed)
    if not np.any(audio):
        raise SynthesisError(f"expected sound to vary, found {len(audio)} samples of silence")
    drawn = {"stretch": float(rng.uniform(*ranges.stretch))}
    sound = change_speed(np.asarray(audio, np.float32), drawn["stretch"])
    if rng.random() < ranges.room_chance:
        drawn["reverberation"] = float(rng.uniform(*ranges.reverberation))
        drawn["directness"] = float(rng.uniform(*ranges.directness))
        sound = _convolve(sound, room_impulse_response(rng, rate, drawn["reverberation"], drawn["directness"]))
    if rng.random() < ranges.noise_chance:
        drawn["snr"] = float(rng.uniform(*ranges.snr))
        drawn["color"] = float(rng.choice(ranges.colors))
        hiss = colored_noise(rng, len(sound), rate, drawn["color"])
        sound = sound + hiss * _rms(sound) * np.float32(10 ** (-drawn["snr"] / 20))
    if rng.random() < ranges.band_chance:
        drawn["low_cut"] = float(rng.uniform(*ranges.low_cut))
        drawn["high_cut"] = float(rng.uniform(*ranges.high_cut))
        sound = _band(sound, rate, drawn["low_cut"], drawn["high_cut"])
    drawn["level"] = float(rng.uniform(*ranges.level))
    return set_level(sound, drawn["level"]), {name: round(value, 4) for name, value in drawn.items()}


def set_level(audio: np.ndarray, decibels: float, peak: float = 0.98) -> np.ndarray:
    """Sound at a given RMS.

    Args:
        audio: f32 [samples], not silent.
        decibels: RMS of the result, of full scale.
        peak: if the result would pass this, it is as loud as it can be within.
    """
    gain = min(10 ** (decibels / 20) / float(_rms(audio)), peak / float(np.abs(audio).max()))
    return (audio * np.float32(gain)).astype(np.float32)


def colored_noise(rng: np.random.Generator, samples: int, rate: int, color: float) -> np.ndarray:
    """Noise whose power falls with a power of the frequency (0 white, 1 pink, 2 brown), f32 [samples] of RMS 1.

    Below 50 Hz, where a voice has nothing, it falls no further.
    """
    size = _fast(samples)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 50.0)
    colored = np.fft.irfft(spectrum * frequencies ** (-color / 2), size)[:samples]
    return (colored / np.sqrt(np.mean(colored**2))).astype(np.float32)


def room_impulse_response(rng: np.random.Generator, rate: int, reverberation: float, directness: float) -> np.ndarray:
    """A made-up room's impulse response: the sound itself, a few early reflections, a decaying tail of noise.

    Args:
        rng: of the reflections and the tail.
        rate: samples per second.
        reverberation: seconds until the tail has fallen by 60 dB.
        directness: direct sound above all the rest, in dB.

    Returns:
        f32 [samples]; the first sample is the direct sound, 1.
    """
    length = max(round(rate * reverberation), 2)
    times = np.arange(length) / rate
    tail = rng.standard_normal(length) * 10 ** (-3 * times / reverberation)
    tail[: round(0.004 * rate)] = 0
    for delay in rng.uniform(0.002, 0.04, 6):
        tail[min(round(delay * rate), length - 1)] += rng.choice([-1, 1]) * rng.uniform(2, 6)
    tail[0] = 0
    tail *= 10 ** (-directness / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return tail.astype(np.float32)


def _rms(audio: np.ndarray) -> np.float32:
    return np.sqrt(np.mean(np.square(audio, dtype=np.float64))).astype(np.float32)


def _join(a: np.ndarray, b: np.ndarray, overlap: int) -> np.ndarray:
    """One after the other, faded into each other."""
    ramp = np.linspace(0, 1, overlap, dtype=np.float32)
    return np.concatenate([a[:-overlap], a[-overlap:] * (1 - ramp) + b[:overlap] * ramp, b[overlap:]])


def _fast(size: int) -> int:
    """At least `size`, and quick to transform; a prime is ten times slower."""
    return -(-size // 1024) * 1024


def _convolve(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    """As long as the audio."""
    size = _fast(len(audio) + len(response) - 1)
    spectrum = np.fft.rfft(audio, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(audio)].astype(np.float32)


def _band(audio: np.ndarray, rate: int, low: float, high: float) -> np.ndarray:
    """Without what lies outside low..high Hz, by the slopes of Butterworth filters of the second and fourth order."""
    # Silence after the end, so that the end does not leak into the beginning.
    size = _fast(len(audio) + rate // 10)
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 1e-3)
    gain = 1 / np.sqrt((1 + (low / frequencies) ** 4) * (1 + (frequencies / high) ** 8))
    return np.fft.irfft(np.fft.rfft(audio, size) * gain, size)[: len(audio)].astype(np.float32)
