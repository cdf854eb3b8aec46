"""Augmentation of waveforms, for corpora of synthetic speech: speed, room, silence, noise, band, clips, codec, level.

`augment` turns one clean recording into one of many that a microphone may have made of it. Everything is float32, mono,
on the host. Equal seeds give equal samples: `make nano` relies on it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import av
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
class LossyCodec:
    """How a recording may be compressed on its way, as FFmpeg names it."""

    codec: str
    container: str
    sample_rate: int
    bit_rates: tuple[int, ...] = ()
    """In bit/s; empty: the codec has one."""


CODECS: Mapping[str, LossyCodec] = {
    "telephone": LossyCodec("pcm_mulaw", "wav", 8000),
    "telephone_alaw": LossyCodec("pcm_alaw", "wav", 8000),
    "voip": LossyCodec("libopus", "ogg", 16_000, (8000, 12_000, 16_000, 24_000)),
    "mp3": LossyCodec("libmp3lame", "mp3", 16_000, (16_000, 24_000, 32_000)),
    "low_mp3": LossyCodec("libmp3lame", "mp3", 8000, (8000, 16_000)),
}
"""Codecs by name. Those of telephones are G.711."""
TELEPHONE_BAND = (300.0, 3400.0)
"""Of codecs at 8 kHz, in Hz."""


@dataclass(frozen=True)
class Augmentation:
    """Settings of `augment`. Each pair is a range to draw from uniformly, each `_chance` a probability."""

    stretch: tuple[float, float] = (0.9, 1.1)
    """Speed, which changes the pitch too."""
    room_chance: float = 0.4
    rt60: tuple[float, float] = (0.1, 0.6)
    """Reverberation time: seconds until the reverberation has decayed by 60 dB."""
    drr_db: tuple[float, float] = (0.0, 18.0)
    """Direct-to-reverberant ratio, in dB."""
    silence_chance: float = 0.2
    """Of silence before the recording, and as often of silence after it."""
    silence: tuple[float, float] = (0.0, 3.0)
    """In seconds."""
    max_seconds: float = 30.0
    """Longest result; silence is shortened accordingly."""
    noise_chance: float = 0.7
    snr_db: tuple[float, float] = (5.0, 35.0)
    """Speech to noise, in dB."""
    colors: tuple[float, ...] = (-1.0, 0.0, 1.0, 2.0)
    """Colors of noise, by the exponent with which its power falls over frequency: blue, white, pink, brown."""
    swell_chance: float = 0.5
    """Of noise that becomes louder and softer, as that of a street or a room full of people."""
    band_chance: float = 0.2
    low_cut: tuple[float, float] = (50.0, 350.0)
    """Cut-off frequency of the high-pass filter, in Hz."""
    high_cut: tuple[float, float] = (3000.0, 7000.0)
    """Cut-off frequency of the low-pass filter, in Hz."""
    clip_chance: float = 0.1
    clip_db: tuple[float, float] = (1.0, 10.0)
    """How far the peaks are above what the microphone can take, in dB."""
    codec_chance: float = 0.3
    codecs: tuple[str, ...] = tuple(CODECS)
    """Some of `CODECS`."""
    level: tuple[float, float] = (-40.0, -12.0)
    """RMS of the result in dB of full scale; lower where its peak would exceed full scale."""


def augment(
    audio: np.ndarray, rate: int, seed: int | list[int], settings: Augmentation | None = None
) -> tuple[np.ndarray, dict[str, float | str]]:
    """Simulate a room, its noise, a microphone and a connection.

    Args:
        audio: f32 [samples], not silent. The reverberation is truncated at its end: leave some silence there.
        rate: samples per second.
        seed: of all random numbers; the same seed gives the same samples.
        settings: the ranges; `Augmentation()` if None.

    Returns:
        f32 [samples] within -1..1, as long as the recording after the change of speed with its silence, and what was
        drawn, by name.

    Raises:
        SynthesisError: the recording is silent.
    """
    ranges = settings or Augmentation()
    rng = np.random.default_rng(seed)
    if not np.any(audio):
        raise SynthesisError(f"expected sound to augment, found {len(audio)} samples of silence")
    drawn: dict[str, float | str] = {}

    def draw(name: str, span: tuple[float, float]) -> float:
        value = float(rng.uniform(*span))
        drawn[name] = round(value, 4)
        return value

    sound = change_speed(np.asarray(audio, np.float32), draw("stretch", ranges.stretch))
    if rng.random() < ranges.room_chance:
        response = room_impulse_response(rng, rate, draw("rt60", ranges.rt60), draw("drr_db", ranges.drr_db))
        sound = _convolve(sound, response)
    speech = _rms(sound)
    for side in ("silence_before", "silence_after"):
        if rng.random() < ranges.silence_chance:
            room = round(ranges.max_seconds * rate) - len(sound)
            silence = np.zeros(max(min(round(draw(side, ranges.silence) * rate), room), 0), np.float32)
            sound = np.concatenate([silence, sound] if side == "silence_before" else [sound, silence])
    if rng.random() < ranges.noise_chance:
        color = float(rng.choice(ranges.colors))
        drawn["color"] = color
        noise = colored_noise(rng, len(sound), rate, color)
        if rng.random() < ranges.swell_chance:
            drawn["swell"] = "yes"
            noise = swell(rng, noise, rate)
        sound = sound + noise * speech * np.float32(10 ** (-draw("snr_db", ranges.snr_db) / 20))
    if rng.random() < ranges.band_chance:
        sound = _band_pass(sound, rate, draw("low_cut", ranges.low_cut), draw("high_cut", ranges.high_cut))
    if rng.random() < ranges.clip_chance:
        limit = float(np.abs(sound).max()) * 10 ** (-draw("clip_db", ranges.clip_db) / 20)
        sound = np.clip(sound, -limit, limit)
    if rng.random() < ranges.codec_chance:
        name = str(rng.choice(ranges.codecs))
        codec = CODECS[name]
        bit_rate = int(rng.choice(codec.bit_rates)) if codec.bit_rates else None
        drawn["codec"] = f"{name} {bit_rate or ''}".strip()
        sound = through_codec(set_level(sound, -20.0), rate, codec, bit_rate)
    return set_level(sound, draw("level", ranges.level)), drawn


def through_codec(audio: np.ndarray, rate: int, codec: LossyCodec, bit_rate: int | None = None) -> np.ndarray:
    """Compress and decompress a recording.

    Args:
        audio: f32 [samples] within -1..1.
        rate: samples per second.
        codec: at 8 kHz, frequencies beyond a telephone's are removed first.
        bit_rate: in bit/s; None: the codec's own.

    Returns:
        f32 [samples] of the same length. Where the codec delays, the end is cut off.
    """
    if codec.sample_rate == 8000:
        audio = _band_pass(audio, rate, *TELEPHONE_BAND)
    narrow = soxr.resample(audio, rate, codec.sample_rate, quality="HQ")
    samples = np.rint(np.clip(narrow, -1, 1) * 32767).astype(np.int16)
    file = io.BytesIO()
    with av.open(file, "w", codec.container) as container:
        stream = container.add_stream(codec.codec, codec.sample_rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        if bit_rate:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.sample_rate = codec.sample_rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    file.seek(0)
    with av.open(file, "r") as compressed:
        resampler = av.AudioResampler("flt", "mono", rate)
        frames = [part for frame in compressed.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    decoded = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])[: len(audio)]
    return np.pad(decoded, (0, len(audio) - len(decoded))).astype(np.float32)


def swell(rng: np.random.Generator, noise: np.ndarray, rate: int) -> np.ndarray:
    """Noise f32 [samples] made louder and softer several times a second; its RMS stays 1."""
    points = max(len(noise) * 8 // rate, 1) + 2
    gain = np.exp(np.interp(np.linspace(0, points - 1, len(noise)), np.arange(points), rng.normal(0, 0.8, points)))
    return (noise * gain / np.sqrt(np.mean(np.square(noise * gain)))).astype(np.float32)


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
