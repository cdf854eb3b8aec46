"""Recordings in and out: read, check, resample, truncate, encode, write. On the host, in numpy.

Inside the package a recording is float32, mono, [samples], nominally within -1..1. Anything that cannot be converted to
that raises an `AudioError` before compute starts; nothing is truncated, dropped or replaced without a word.
"""

from __future__ import annotations

import io
import secrets
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from omni_jax.errors import AudioError, AudioTooLongError

SAMPLE_RATE = 16_000
"""Samples per second that the audio encoder takes."""
MIN_SECONDS = 0.02
"""Shortest recording: one frame of the audio encoder, 20 ms (320 samples at 16 kHz)."""
MIN_RATE = 1000
"""Fewest samples per second. No speech survives at a lower rate: the number is a damaged header, and resampling would
turn a small file into a huge recording."""
SILENCE_PEAK = 1e-4
"""A recording with a lower peak (-80 dB of full scale, three steps of 16-bit audio) is silent: dither and converter
noise are below it, the faintest speech of a working microphone is far above."""
MAX_PEAK = 32.0
"""A float recording with a higher peak (+30 dB of full scale) is not scaled to -1..1: it is most likely integer samples
cast to float. Ordinary overshoot from mixing, lossy codecs or resampling is well below."""
MAX_CHANNELS = 32
"""Most channels of a recording whose size is limited."""

MEDIA_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
"""Formats that `encode` writes, and their media types."""


def read_audio(
    path_or_file: str | Path | BinaryIO, sample_rate: int = SAMPLE_RATE, *, max_seconds: float | None = None
) -> np.ndarray:
    """Read a recording as mono at the wanted rate.

    Every format of libsndfile is read (wav, flac, ogg, mp3, aiff, ...), recognized by content, not by name.
    Channels are averaged; another rate is resampled by soxr (HQ).

    Args:
        path_or_file: a path, or a binary file object, read from its current position to its end.
        sample_rate: samples per second of the result.
        max_seconds: refuse a longer recording, and one of more than `MAX_CHANNELS`, before it fills the memory: a
            small file can contain hours of silence. None: no limit.

    Returns:
        f32 [samples].

    Raises:
        AudioTooLongError: it is longer than `max_seconds`.
        AudioError: the file does not exist, is a directory, cannot be read, is empty, is not audio or is damaged, or
            its samples fail the checks of `to_mono`.
    """
    name = source_name(path_or_file)
    data = _read_bytes(path_or_file, name)
    samples, rate = _decode(data, name, max_seconds)
    return _convert(samples, rate, sample_rate, name)


def source_name(path_or_file: str | Path | BinaryIO) -> str:
    """The name of a recording in messages: its path, or `recording` for a file object that has no name."""
    if isinstance(path_or_file, (str, Path)):
        return str(path_or_file)
    return str(getattr(path_or_file, "name", None) or "recording")


def to_mono(array: Any, rate: int, sample_rate: int = SAMPLE_RATE, *, name: str = "array") -> np.ndarray:
    """Check an array of samples and convert it to mono at the wanted rate.

    Args:
        array: [samples] or [samples, channels]; floating point nominally within -1..1, or int16.
        rate: samples per second of the array.
        sample_rate: samples per second of the result.
        name: of the array, in messages.

    Returns:
        f32 [samples]; the average of the channels, resampled by soxr (HQ) when the rates differ.

    Raises:
        AudioError: another dtype or shape, more channels than samples, a rate below `MIN_RATE`, no samples, NaN or
            infinity, a peak above `MAX_PEAK`, less than `MIN_SECONDS`, or a peak below `SILENCE_PEAK`.
    """
    return _convert(np.asarray(array), rate, sample_rate, name)


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
        max_seconds = max_samples / sample_rate
        raise AudioTooLongError(
            f"{name}: expected a recording of at most {max_seconds:.2f} s, found {len(audio) / sample_rate:.2f} s: "
            "shorten it, or use its beginning only (truncate)",
            max_seconds=max_seconds,
        )
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


def encode(audio: np.ndarray, rate: int, format: str) -> bytes:
    """A whole recording in one of several formats.

    Args:
        audio: f32 [samples]; clipped to -1..1.
        rate: samples per second.
        format: one of `MEDIA_TYPES`; `pcm` and `pcm16` are both `pcm_bytes`.
    """
    if format in ("pcm", "pcm16"):
        return pcm_bytes(audio)
    if format == "wav":
        return encode_wav(audio, rate)
    container, subtype = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", None), "opus": ("OGG", "OPUS")}[format]
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def streaming_wav_header(rate: int) -> bytes:
    """The header of a mono 16-bit wav file of unknown length; both of its sizes are 2^32 - 1. `pcm_bytes` follow it."""
    unknown = 0xFFFFFFFF
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", unknown, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", unknown
    )


def encode_wav(audio: np.ndarray, sample_rate: int) -> bytes:
    """A whole PCM_16 wav file in memory.

    Args:
        audio: f32 [samples]; clipped to -1..1.
        sample_rate: samples per second.

    Raises:
        AudioError: the samples are not one-dimensional or not finite.
    """
    if np.ndim(audio) != 1:
        raise AudioError(f"expected samples to write as [samples], found shape {np.shape(audio)}")
    buffer = io.BytesIO()
    soundfile.write(buffer, to_pcm16(audio), sample_rate, subtype="PCM_16", format="WAV")
    return buffer.getvalue()


def write_wav(path: str | Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write a PCM_16 wav file, whole or not at all.

    The bytes are written to a temporary file in the same folder, which is renamed at the end, so that the final name
    never has half a recording.

    Args:
        path: of the file; an existing file is replaced.
        audio: f32 [samples]; clipped to -1..1.
        sample_rate: samples per second.

    Raises:
        AudioError: the samples are not one-dimensional or not finite, or the file cannot be written.
    """
    path = Path(path)
    data = encode_wav(audio, sample_rate)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise AudioError(f"{path}: expected a writable path, found {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _read_bytes(path_or_file: str | Path | BinaryIO, name: str) -> bytes:
    if isinstance(path_or_file, (str, Path)):
        try:
            data = Path(path_or_file).read_bytes()
        except FileNotFoundError:
            raise AudioError(f"{name}: expected a recording, there is no such file") from None
        except IsADirectoryError:
            raise AudioError(f"{name}: expected a recording, found a directory") from None
        except OSError as error:
            raise AudioError(f"{name}: expected a readable file, found {error.strerror}") from None
    else:
        data = path_or_file.read()
    if not data:
        raise AudioError(f"{name}: expected a recording, found an empty file (0 bytes)")
    return data


def _decode(data: bytes, name: str, max_seconds: float | None) -> tuple[np.ndarray, int]:
    """A file's samples f32 [samples, channels] and their rate, or an `AudioError`."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            # Samples according to the header; 0 if it does not say.
            promised = 0 if _length_is_guessed(data, file.format) else file.frames
            if max_seconds is None:
                samples = file.read(dtype="float32", always_2d=True)
            else:
                if file.channels > MAX_CHANNELS:
                    raise AudioError(f"{name}: expected at most {MAX_CHANNELS} channels, found {file.channels}")
                limit = int(max_seconds * rate) + 1
                samples = file.read(frames=limit, dtype="float32", always_2d=True)
                if max(len(samples), promised) >= limit:
                    found = f"{promised / rate:.2f} s" if promised else "more"
                    raise AudioTooLongError(
                        f"{name}: expected a recording of at most {max_seconds:.2f} s, found {found}",
                        max_seconds=max_seconds,
                    )
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name}: expected audio (wav, flac, ogg, mp3, ...), "
            f"found {len(data)} bytes that libsndfile cannot decode: {error.error_string}"
        ) from None
    if len(samples) < promised or _ends_early(data) or not _is_intact_ogg(data):
        raise AudioError(
            f"{name}: expected all the sound its header promises, found a file that is damaged or ends early"
        )
    return samples, rate


def _ends_early(data: bytes) -> bool:
    """Whether a wav file is shorter than its header says, which libsndfile silently accepts."""
    if data[:4] != b"RIFF":
        return False
    chunk = 12
    while data[chunk : chunk + 4] != b"data":
        if chunk + 8 > len(data):
            return False
        size = int.from_bytes(data[chunk + 4 : chunk + 8], "little")
        chunk += 8 + size + size % 2
    size = int.from_bytes(data[chunk + 4 : chunk + 8], "little")
    # A program that writes to a pipe does not know the size and puts in a number near 2^31 or 2^32.
    return size < 0x7FFF0000 and chunk + 8 + size > len(data)


def _length_is_guessed(data: bytes, format: str) -> bool:
    """Whether libsndfile estimates a file's length from its size, which is wrong where the bitrate varies.

    It does for MP3, unless the first frame has a Xing table (called Info where the bitrate is constant).
    """
    if format != "MP3":
        return False
    start = 0
    if data[:3] == b"ID3":
        # A tag of names and pictures comes first; its size is stored with seven bits per byte.
        start = 10 + sum((byte & 127) << 7 * index for index, byte in enumerate(reversed(data[6:10])))
    first = data[start : start + 256]
    return b"Xing" not in first and b"Info" not in first


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _is_intact_ogg(data: bytes) -> bool:
    """Whether every page of an Ogg file is complete and has the right checksum; libsndfile skips those that do not.

    True for other files. The layout and the checksum of a page: RFC 3533, section 6.
    """
    page = 0
    while data[:4] == b"OggS" and page < len(data):
        segments = data[page + 27 : page + 27 + (data[page + 26] if page + 26 < len(data) else 0)]
        size = 27 + len(segments) + sum(segments)
        if data[page : page + 4] != b"OggS" or page + size > len(data):
            return False
        whole = data[page : page + 22] + bytes(4) + data[page + 26 : page + size]
        # Ogg's CRC takes the bits of each byte in the opposite order of zlib's, and inverts neither start nor end.
        crc = zlib.crc32(whole.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if int(f"{crc:032b}"[::-1], 2) != int.from_bytes(data[page + 22 : page + 26], "little"):
            return False
        page += size
    return True


def _convert(samples: np.ndarray, rate: int, sample_rate: int, name: str) -> np.ndarray:
    """Check [samples] or [samples, channels] and convert them to f32 mono [samples] at `sample_rate`."""
    if samples.ndim not in (1, 2):
        raise AudioError(f"{name}: expected [samples] or [samples, channels], found shape {samples.shape}")
    if samples.dtype == np.int16:
        samples = from_pcm16(samples)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"{name}: expected floating point or int16 samples, found {samples.dtype}")
    if rate < MIN_RATE:
        raise AudioError(f"{name}: expected a sample rate of at least {MIN_RATE} Hz, found {rate}")
    if samples.size == 0:
        raise AudioError(f"{name}: expected at least {MIN_SECONDS * 1000:.0f} ms of sound, found no samples")
    if samples.ndim == 2 and samples.shape[1] > samples.shape[0]:
        raise AudioError(f"{name}: expected [samples, channels], found more channels than samples, {samples.shape}")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: expected finite samples, found NaN or infinity")
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK:
        raise AudioError(f"{name}: expected floating point samples within -1..1, found a peak of {peak:.6g}")
    mono = samples.astype(np.float32)
    if mono.ndim == 2:
        mono = mono.mean(axis=1)
    # Duration is checked before resampling, which may leave none of a few samples; silence after it, which may remove
    # all that there was.
    if len(mono) < MIN_SECONDS * rate:
        raise AudioError(
            f"{name}: expected at least {MIN_SECONDS * 1000:.0f} ms of sound, "
            f"found {len(mono) * 1000 / rate:.4g} ms ({len(mono)} samples at {rate} Hz)"
        )
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="HQ")
    peak = float(np.abs(mono).max())
    if peak < SILENCE_PEAK:
        raise AudioError(
            f"{name}: expected sound, found silence (a peak of {peak:.2g} where 1 is full scale, "
            f"less than {SILENCE_PEAK:g})"
        )
    return mono
