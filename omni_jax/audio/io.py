"""Recordings in: read, check, mix, resample, truncate. On the host, in numpy.

Inside the package a recording is float32, mono, [samples], nominally within -1..1. Anything that cannot be converted to
that raises an `AudioError` before compute starts; nothing is truncated, dropped or replaced without a word.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import soxr

from omni_jax.audio.decoding import HEADERLESS, MAX_CHANNELS, decode, scale, too_long
from omni_jax.errors import AudioError, NoSpeechError
from omni_jax.input_files import open_file

SAMPLE_RATE = 16_000
"""Samples per second that the audio encoder takes."""
MIN_SECONDS = 0.02
"""Shortest recording: one frame of the audio encoder, 20 ms (320 samples at 16 kHz)."""
MIN_RATE, MAX_RATE = 1000, 1_000_000
"""Fewest and most samples per second. No speech survives at a lower rate and no device records at a higher one: the
number is a damaged header, and resampling would turn a small file into a huge recording."""
SILENCE_PEAK = 1e-4
"""A recording with a lower peak (-80 dB of full scale, three steps of 16-bit audio) is silent: dither and converter
noise are below it, the faintest speech of a working microphone is far above."""
MAX_PEAK = 32.0
"""A float recording with a higher peak (+30 dB of full scale) is not scaled to -1..1: it is most likely integer samples
cast to float. Ordinary overshoot from mixing, lossy codecs or resampling is well below."""
CANCELED_ENERGY = 0.01
"""The average of channels that has less than so much of the loudest channel's energy (-20 dB) is not listened to: the
channels cancel. Those of different microphones lose 3 dB, and a channel next to a silent one 6 dB."""
RESAMPLING_SECONDS = 0.1
"""A truncated recording is decoded so much further, which the last samples depend on when the rate is changed."""
MAX_STREAM_BYTES = 1 << 30
"""Most bytes that are read from a file object: all of them are in memory. A path has no such limit."""

Source: TypeAlias = "str | Path | bytes | bytearray | memoryview | BinaryIO"
"""What `read_audio` reads."""


def read_audio(
    source: Source, sample_rate: int = SAMPLE_RATE, *, max_seconds: float | None = None, truncate: bool = False
) -> np.ndarray:
    """Read a recording as mono at the wanted rate.

    Everything is read that people have: see `omni_jax.audio.decoding`. A file is recognized by its content, not by its
    name; of a video the sound is taken. Another rate is resampled by soxr (HQ). The channels are averaged; where they
    cancel, as the two sides of a balanced cable recorded as stereo do, the loudest one is taken.

    Args:
        source: the path or the bytes of a file, or a binary file object, read from its current position to its end.
        sample_rate: samples per second of the result.
        max_seconds: refuse a longer recording, and one of more than `MAX_CHANNELS`, before it fills the memory: a
            small file can contain hours of silence. None: `omni_jax.audio.decoding.MAX_SECONDS`.
        truncate: return only the first `max_seconds` of a longer recording, instead of refusing it.

    Returns:
        f32 [samples]. Memory holds the recording once while it is read, at the wanted rate.

    Raises:
        AudioTooLongError: it is longer than `max_seconds`.
        NoSpeechError: it is silent: its peak is below `SILENCE_PEAK`.
        AudioError: the file does not exist, is not an ordinary file (a folder, a pipe, a device), cannot be read, is
            empty, is not audio, is damaged or ends early, takes too long to decode, or its samples fail the checks of
            `to_mono`.
    """
    name = source_name(source)
    limit = max_seconds if max_seconds is None or not truncate else max_seconds + RESAMPLING_SECONDS
    with _open(source, name) as file:
        recording = _Recording(name, sample_rate)
        recording.read(decode(file, name, max_seconds=limit, truncate=truncate))
        if any(section.loudest is not None for section in recording.sections):
            # The channels cancel, which is known only at the end.
            file.seek(0)
            channels = [section.loudest for section in recording.sections]
            recording = _Recording(name, sample_rate)
            recording.read(decode(file, name, max_seconds=limit, truncate=truncate), channels)
    if recording.seconds < MIN_SECONDS:
        raise _too_short(name, recording.length or "no samples")
    mono = np.frombuffer(recording.data, np.float32)
    if max_seconds is not None and truncate:
        mono = mono[: round(max_seconds * sample_rate)]
    return _check_sound(mono, sample_rate, name)


def source_name(source: Source) -> str:
    """The name of a recording in messages: its path, or `recording` for bytes and file objects without a name."""
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", None) or "recording")


def to_mono(array: Any, rate: int, sample_rate: int = SAMPLE_RATE, *, name: str = "array") -> np.ndarray:
    """Check an array of samples and convert it to mono at the wanted rate.

    Args:
        array: [samples], [samples, channels], or [channels, samples] of up to `MAX_CHANNELS`; floating point nominally
            within -1..1, or uint8, int16 or int32, which are scaled to that.
        rate: samples per second of the array.
        sample_rate: samples per second of the result.
        name: of the array, in messages.

    Returns:
        f32 [samples]; mixed and resampled as `read_audio` does.

    Raises:
        NoSpeechError: it is silent: its peak is below `SILENCE_PEAK`.
        AudioError: another dtype or shape, a rate outside of `MIN_RATE` to `MAX_RATE`, no samples, NaN or infinity, a
            peak above `MAX_PEAK`, or less than `MIN_SECONDS`.
    """
    samples = np.asarray(array)
    # Big-endian samples, as some readers return them.
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    if samples.ndim not in (1, 2):
        raise AudioError(f"{name}: expected [samples] or [samples, channels], found shape {samples.shape}")
    if samples.dtype in (np.uint8, np.int16, np.int32):
        samples = scale(samples)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"{name}: expected floating point, uint8, int16 or int32 samples, found {samples.dtype}")
    if samples.ndim == 2 and samples.shape[1] > samples.shape[0]:
        if 0 < samples.shape[0] <= MAX_CHANNELS:
            samples = samples.T
        elif samples.size:
            raise AudioError(f"{name}: expected at most {MAX_CHANNELS} channels, found shape {samples.shape}")
    _check(samples, rate, name)
    samples = samples.astype(np.float32)
    if len(samples) < MIN_SECONDS * rate:
        raise _too_short(name, _found_length(samples, rate))
    return _check_sound(_convert(samples, rate, sample_rate), sample_rate, name)


def check_duration(
    audio: np.ndarray, max_samples: int, *, truncate: bool, name: str = "array", sample_rate: int = SAMPLE_RATE
) -> np.ndarray:
    """Check that a recording is not longer than a limit, or truncate it.

    Args:
        audio: f32 [samples].
        max_samples: the limit.
        truncate: whether to keep only the first `max_samples` of a longer recording.
        name: of the recording, in the message; see `source_name`.
        sample_rate: samples per second, for the message.

    Returns:
        f32 [samples] of at most `max_samples`.

    Raises:
        AudioTooLongError: the recording is longer and `truncate` is False; gives both durations.
    """
    if len(audio) <= max_samples:
        return audio
    if not truncate:
        raise too_long(name, max_samples / sample_rate, f"{len(audio) / sample_rate:.2f} s")
    return audio[:max_samples]


def from_pcm16(samples: np.ndarray) -> np.ndarray:
    """16-bit samples as f32 within -1..1, of the same shape; `to_pcm16` inverts it exactly."""
    return samples.astype(np.float32) / 32768.0


def to_pcm16(audio: np.ndarray) -> np.ndarray:
    """Samples as 16-bit integers, rounded; values outside -1..1 are clipped, not wrapped around.

    The scale is 2^15 both ways, so that 16-bit audio read by `read_audio` or `to_mono` is written unchanged.

    Args:
        audio: f32 of any shape, nominally within -1..1.

    Returns:
        int16 of the same shape.

    Raises:
        AudioError: the samples contain NaN or infinity.
    """
    audio = np.asarray(audio, np.float32)
    if not np.isfinite(audio).all():
        raise AudioError("expected finite samples to write, found NaN or infinity")
    return np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)


def pcm_bytes(audio: np.ndarray) -> bytes:
    """Samples f32 [samples] as 16-bit little-endian bytes, without a header; see `to_pcm16`."""
    return to_pcm16(audio).astype("<i2").tobytes()


@contextmanager
def _open(source: Source, name: str) -> Iterator[BinaryIO]:
    """A seekable file at its beginning. An ordinary file is not read into memory."""
    if isinstance(source, (str, Path)):
        file = _open_path(Path(source))
    else:
        file = io.BytesIO(source if isinstance(source, (bytes, bytearray, memoryview)) else _read_stream(source, name))
    with file:
        if not file.seek(0, io.SEEK_END):
            raise AudioError(f"{name}: expected a recording, found an empty file (0 bytes)")
        file.seek(0)
        yield file


def _open_path(path: Path) -> BinaryIO:
    file = open_file(path, AudioError, "a recording")
    # FFmpeg looks at the name's suffix, which must not matter where the content says what it is.
    file.raw.name = f"recording.{HEADERLESS.get(path.suffix.lower(), 'media')}"  # type: ignore[attr-defined]
    return file


def _read_stream(file: BinaryIO, name: str) -> bytes:
    """The bytes of a file object, which may be a pipe without end."""
    data = file.read(MAX_STREAM_BYTES + 1)
    if not isinstance(data, bytes):
        raise AudioError(f"{name}: expected a file object opened in binary mode, found one that reads {type(data)}")
    if len(data) > MAX_STREAM_BYTES:
        raise AudioError(f"{name}: expected at most {MAX_STREAM_BYTES} bytes, found more")
    return data


def _check(samples: np.ndarray, rate: int, name: str) -> None:
    """Refuse floating point samples that cannot be sound."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name}: expected a sample rate of {MIN_RATE} to {MAX_RATE} Hz, found {rate}")
    if samples.size == 0:
        raise _too_short(name, "no samples")
    # Without a copy of the samples, which may be hours. NaN is the maximum of what it is in.
    peak = max(float(samples.max()), -float(samples.min()))
    if not np.isfinite(peak):
        raise AudioError(f"{name}: expected finite samples, found NaN or infinity")
    if peak > MAX_PEAK:
        raise AudioError(f"{name}: expected floating point samples within -1..1, found a peak of {peak:.6g}")


def _too_short(name: str, found: str) -> AudioError:
    return AudioError(f"{name}: expected at least {MIN_SECONDS * 1000:.0f} ms of sound, found {found}")


def _found_length(samples: np.ndarray, rate: int) -> str:
    return f"{len(samples) * 1000 / rate:.4g} ms ({len(samples)} samples at {rate} Hz)"


@dataclass
class _Section:
    """A part of a recording in one format: its channels are averaged, or one of them is taken."""

    rate: int
    num_channels: int
    channel: int | None = None
    """The channel to take; None: the average."""
    energy: float = 0.0
    """Of the average."""
    energies: list[float] = field(default_factory=list)
    """Of each channel."""

    def mix(self, samples: np.ndarray) -> np.ndarray:
        """Mono f32 [samples] of the next f32 [samples, channels], which are not changed."""
        if self.channel is not None:
            return np.ascontiguousarray(samples[:, self.channel])
        if self.num_channels == 1:
            return np.ascontiguousarray(samples[:, 0])
        # Ten times as fast as `samples.mean(axis=1)`, with the same result for up to seven channels.
        mono = samples[:, 0].copy()
        for channel in samples.T[1:]:
            mono += channel
        mono /= self.num_channels
        self.energy += float(np.dot(mono, mono))
        energies = [float(np.dot(channel, channel)) for channel in samples.T]
        self.energies = [sum(pair) for pair in zip(energies, self.energies or [0.0] * len(energies), strict=True)]
        return mono

    @property
    def loudest(self) -> int | None:
        """The channel with the most energy, if the channels cancel."""
        if not self.energies or self.energy >= CANCELED_ENERGY * max(self.energies):
            return None
        return int(np.argmax(self.energies))


@dataclass
class _Recording:
    """A recording that grows block by block, mixed and resampled: memory holds it once, at the wanted rate."""

    name: str
    sample_rate: int
    data: bytearray = field(default_factory=bytearray)
    """f32 [samples]; grows in place."""
    sections: list[_Section] = field(default_factory=list)
    seconds: float = 0.0
    """As decoded."""
    length: str = ""
    """Of the first block, for messages."""

    def read(self, blocks: Iterable[tuple[np.ndarray, int]], channels: Sequence[int | None] = ()) -> None:
        """Add all blocks.

        Args:
            blocks: f32 [samples, channels] with their rates, as `decode` yields them.
            channels: of each section the channel to take; None, or none given: the average.
        """
        resample: Callable[..., np.ndarray] | None = None
        for samples, rate in blocks:
            _check(samples, rate, self.name)
            self.length = self.length or _found_length(samples, rate)
            self.seconds += len(samples) / rate
            # As at the borders of the programs that a television recorder receives.
            form = (rate, samples.shape[1])
            if not self.sections or (self.sections[-1].rate, self.sections[-1].num_channels) != form:
                self._end(resample)
                number = len(self.sections)
                self.sections.append(_Section(*form, channels[number] if channels else None))
                resample = None
                if rate != self.sample_rate:
                    resample = soxr.ResampleStream(rate, self.sample_rate, 1, quality="HQ").resample_chunk
            mono = self.sections[-1].mix(samples)
            self._append(mono if resample is None else resample(mono))
        self._end(resample)

    def _end(self, resample: Callable[..., np.ndarray] | None) -> None:
        """Add what the resampler has kept."""
        if resample is not None:
            self._append(resample(np.zeros(0, np.float32), last=True))

    def _append(self, mono: np.ndarray) -> None:
        self.data += mono.data.cast("B") if mono.size else b""


def _convert(samples: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """Mono f32 [samples] at `sample_rate` of f32 [samples] or [samples, channels] at `rate`."""
    mono = _mix(samples) if samples.ndim == 2 else samples
    return mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate, quality="HQ")


def _mix(samples: np.ndarray) -> np.ndarray:
    """The average of the channels, or the loudest one if they cancel."""
    section = _Section(0, samples.shape[1])
    mono = section.mix(samples)
    return mono if section.loudest is None else samples[:, section.loudest]


def _check_sound(mono: np.ndarray, sample_rate: int, name: str) -> np.ndarray:
    """Refuse silence; after resampling, which may remove all that there was."""
    peak = max(float(mono.max()), -float(mono.min())) if len(mono) else 0.0
    if peak < SILENCE_PEAK:
        raise NoSpeechError(
            f"{name}: expected sound, found silence (a peak of {peak:.2g} where 1 is full scale, "
            f"less than {SILENCE_PEAK:g})",
            seconds=len(mono) / sample_rate,
        )
    return mono
