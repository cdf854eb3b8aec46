"""Augmentation of waveforms, for corpora of synthetic speech: trimming, speed, room, noise, band, level.

`augment` turns one clean recording into one of many that a microphone may have made of it. Everything is float32, mono,
on the host. Equal seeds give equal samples: `make nano` relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr

from omni_jax.errors import SynthesisError


def change_speed(audio: np.ndarray, ratio: float) -> np.ndarray:
    """Play a recording faster, which raises its pitch too.

    Args:
        audio: f32 [samples].
        ratio: the result's frequencies and 1 / duration are this many times those of `audio`.

    Returns:
        f32 [samples / ratio].
    """
    if abs(ratio - 1) < 1e-4:
        return audio
    # soxr takes two rates; only their quotient matters.
    return np.asarray(soxr.resample(audio, 10_000 * ratio, 10_000.0, quality="HQ"), np.float32)


def trim_silence(audio: np.ndarray, rate: int, *, pause: float = 0.3) -> np.ndarray:
    """Trim the silence at both ends and shorten long pauses inside.

    A stretch of 10 ms is silent if its power is 45 dB below that of the loudest one, and nothing louder is within 40 ms
    of it: soft beginnings and ends of words are kept.

    Args:
        audio: f32 [samples].
        rate: samples per second.
        pause: longest pause that is kept, in seconds.

    Returns:
        f32 [samples], empty if all is silent.
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
    pieces = np.split(padded, np.flatnonzero(np.diff(keep)) * step + step)
    kept = pieces[0 if keep[0] else 1 :: 2]
    joined = kept[0]
    for piece in kept[1:]:
        joined = _crossfade(joined, piece, step)
    return joined


def pad_silence(
    audio: np.ndarray, rate: int, target_rate: int, before: float, after: float, *, decibels: float | None = None
) -> np.ndarray:
    """Trim and resample a synthesizer's speech, and put silence of a known duration around it.

    Args:
        audio: f32 [samples].
        rate: samples per second.
        target_rate: samples per second of the result.
        before: seconds of silence.
        after: seconds of silence.
        decibels: RMS of the speech in the result, in dB of full scale; None: unchanged.

    Returns:
        f32 [samples].
    """
    audio = trim_silence(audio, rate)
    if rate != target_rate:
        audio = soxr.resample(audio, rate, target_rate, quality="HQ")
    if decibels is not None:
        audio = set_level(audio, decibels)
    silences = [np.zeros(round(seconds * target_rate), np.float32) for seconds in (before, after)]
    return np.concatenate([silences[0], audio, silences[1]])


@dataclass(frozen=True)
class Augmentation:
    """Settings of `augment`. Each pair is a range to draw from uniformly, each `_chance` a probability."""

    stretch: tuple[float, float] = (0.94, 1.06)
    """Speed, which changes the pitch too."""
    room_chance: float = 0.4
    rt60: tuple[float, float] = (0.1, 0.5)
    """Reverberation time: seconds until the reverberation has decayed by 60 dB."""
    drr_db: tuple[float, float] = (3.0, 18.0)
    """Direct-to-reverberant ratio, in dB."""
    noise_chance: float = 0.7
    snr_db: tuple[float, float] = (8.0, 40.0)
    """Speech to noise, in dB."""
    colors: tuple[float, ...] = (-1.0, 0.0, 1.0, 2.0)
    """Colors of noise, by the exponent with which its power falls over frequency: blue, white, pink, brown."""
    band_chance: float = 0.3
    low_cut: tuple[float, float] = (50.0, 350.0)
    """Cut-off frequency of the high-pass filter, in Hz."""
    high_cut: tuple[float, float] = (3000.0, 7000.0)
    """Cut-off frequency of the low-pass filter, in Hz."""
    level: tuple[float, float] = (-36.0, -16.0)
    """RMS of the result in dB of full scale; lower where its peak would exceed full scale."""


def augment(
    audio: np.ndarray, rate: int, seed: int | list[int], settings: Augmentation | None = None
) -> tuple[np.ndarray, dict[str, float]]:
    """Simulate a room, its noise and a microphone.

    Args:
        audio: f32 [samples], not silent. The reverberation is truncated at its end: leave some silence there.
        rate: samples per second.
        seed: of all random numbers; the same seed gives the same samples.
        settings: the ranges; `Augmentation()` if None.

    Returns:
        f32 [samples] within -1..1, as long as the recording after the change of speed, and the numbers drawn, by name.

    Raises:
        SynthesisError: the recording is silent.
    """
    ranges = settings or Augmentation()
    rng = np.random.default_rng(seed)
    if not np.any(audio):
        raise SynthesisError(f"expected sound to augment, found {len(audio)} samples of silence")
    drawn = {"stretch": float(rng.uniform(*ranges.stretch))}
    sound = change_speed(np.asarray(audio, np.float32), drawn["stretch"])
    if rng.random() < ranges.room_chance:
        drawn["rt60"] = float(rng.uniform(*ranges.rt60))
        drawn["drr_db"] = float(rng.uniform(*ranges.drr_db))
        sound = _convolve(sound, room_impulse_response(rng, rate, drawn["rt60"], drawn["drr_db"]))
    if rng.random() < ranges.noise_chance:
        drawn["snr_db"] = float(rng.uniform(*ranges.snr_db))
        drawn["color"] = float(rng.choice(ranges.colors))
        noise = colored_noise(rng, len(sound), rate, drawn["color"])
        sound = sound + noise * _rms(sound) * np.float32(10 ** (-drawn["snr_db"] / 20))
    if rng.random() < ranges.band_chance:
        drawn["low_cut"] = float(rng.uniform(*ranges.low_cut))
        drawn["high_cut"] = float(rng.uniform(*ranges.high_cut))
        sound = _band_pass(sound, rate, drawn["low_cut"], drawn["high_cut"])
    drawn["level"] = float(rng.uniform(*ranges.level))
    return set_level(sound, drawn["level"]), {name: round(value, 4) for name, value in drawn.items()}


def set_level(audio: np.ndarray, decibels: float, peak: float = 0.98) -> np.ndarray:
    """Scale a recording to a given RMS.

    Args:
        audio: f32 [samples], not silent.
        decibels: RMS of the result, in dB of full scale.
        peak: the result's peak is at most this, even if its RMS is lower then.

    Returns:
        f32 [samples].
    """
    gain = min(10 ** (decibels / 20) / float(_rms(audio)), peak / float(np.abs(audio).max()))
    return (audio * np.float32(gain)).astype(np.float32)


def colored_noise(rng: np.random.Generator, samples: int, rate: int, color: float) -> np.ndarray:
    """Noise whose power is proportional to frequency ** -color, flat below 50 Hz, where a voice has no power.

    Args:
        rng: of the noise.
        samples: length of the result.
        rate: samples per second.
        color: -1 blue, 0 white, 1 pink, 2 brown.

    Returns:
        f32 [samples] of RMS 1.
    """
    size = _fft_size(samples)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 50.0)
    colored = np.fft.irfft(spectrum * frequencies ** (-color / 2), size)[:samples]
    return (colored / np.sqrt(np.mean(colored**2))).astype(np.float32)


def room_impulse_response(rng: np.random.Generator, rate: int, rt60: float, drr_db: float) -> np.ndarray:
    """A synthetic impulse response: the direct sound, six early reflections, and a decaying tail of noise.

    Args:
        rng: of the reflections and the tail.
        rate: samples per second.
        rt60: seconds until the tail has decayed by 60 dB.
        drr_db: energy of the direct sound over that of all the rest, in dB.

    Returns:
        f32 [samples]; the first sample is the direct sound, 1.
    """
    length = max(round(rate * rt60), 2)
    times = np.arange(length) / rate
    tail = rng.standard_normal(length) * 10 ** (-3 * times / rt60)
    tail[: round(0.004 * rate)] = 0
    for delay in rng.uniform(0.002, 0.04, 6):
        tail[min(round(delay * rate), length - 1)] += rng.choice([-1, 1]) * rng.uniform(2, 6)
    tail[0] = 0
    tail *= 10 ** (-drr_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return tail.astype(np.float32)


def _rms(audio: np.ndarray) -> np.float32:
    return np.sqrt(np.mean(np.square(audio, dtype=np.float64))).astype(np.float32)


def _crossfade(a: np.ndarray, b: np.ndarray, overlap: int) -> np.ndarray:
    """Join two recordings, fading one into the other over `overlap` samples."""
    ramp = np.linspace(0, 1, overlap, dtype=np.float32)
    return np.concatenate([a[:-overlap], a[-overlap:] * (1 - ramp) + b[:overlap] * ramp, b[overlap:]])


def _fft_size(size: int) -> int:
    """A length of at least `size` with a fast Fourier transform; that of a prime length is ten times slower."""
    return -(-size // 1024) * 1024


def _convolve(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve, and truncate to the length of the audio."""
    size = _fft_size(len(audio) + len(response) - 1)
    spectrum = np.fft.rfft(audio, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(audio)].astype(np.float32)


def _band_pass(audio: np.ndarray, rate: int, low: float, high: float) -> np.ndarray:
    """Apply Butterworth gains: a second-order high-pass at `low` Hz and a fourth-order low-pass at `high` Hz."""
    # Padded with silence: the Fourier transform is circular, so the end would leak into the beginning.
    size = _fft_size(len(audio) + rate // 10)
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 1e-3)
    gain = 1 / np.sqrt((1 + (low / frequencies) ** 4) * (1 + (frequencies / high) ** 8))
    return np.fft.irfft(np.fft.rfft(audio, size) * gain, size)[: len(audio)].astype(np.float32)
