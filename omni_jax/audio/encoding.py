"""Recordings out: encode samples, write files. On the host."""

from __future__ import annotations

import io
import secrets
import struct
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from omni_jax.audio.io import pcm_bytes, to_pcm16
from omni_jax.errors import AudioError


class _Form(NamedTuple):
    """How FFmpeg makes a format."""

    container: str
    encoder: str
    bit_rate: int
    """Bits per second; 0 if nothing is lost."""
    rates: tuple[int, ...]
    """Samples per second that the format has; none if it has all."""


_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_OPUS_RATES = (8000, 12_000, 16_000, 24_000, 48_000)
_FORMS = {
    "flac": _Form("flac", "flac", 0, ()),
    "mp3": _Form("mp3", "libmp3lame", 64_000, _RATES),
    "ogg": _Form("ogg", "libopus", 64_000, _OPUS_RATES),
    "opus": _Form("ogg", "libopus", 64_000, _OPUS_RATES),
    "aac": _Form("adts", "aac", 64_000, _RATES),
    "m4a": _Form("ipod", "aac", 64_000, _RATES),
}

MEDIA_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "m4a": "audio/mp4",
}
"""Formats that `encode` writes, and their media types."""
FILE_FORMATS = ("wav", *_FORMS)
"""Formats of files, which are their suffixes too."""


def file_format(path: str | Path) -> str:
    """The format that a file's suffix names, one of `FILE_FORMATS`.

    Raises:
        AudioError: the suffix is another one or missing; lists those that are possible.
    """
    suffix = Path(path).suffix
    if suffix[1:].lower() not in FILE_FORMATS:
        expected = ", ".join(f".{format}" for format in FILE_FORMATS)
        raise AudioError(f"{path}: expected a file name that ends in {expected}, found {suffix or 'no suffix'}")
    return suffix[1:].lower()


def encode(audio: np.ndarray, rate: int, format: str) -> bytes:
    """A whole recording in one of several formats: mono, its length in its header where the format has one.

    wav and flac have 16 bits; `pcm` and `pcm16` are both `pcm_bytes`; `ogg` and `opus` are both Opus in Ogg; `aac` is
    AAC without a container (ADTS), `m4a` AAC in MP4. MP3, Opus and AAC have certain rates only: audio of another rate
    is resampled to the next higher one.

    Args:
        audio: f32 [samples]; clipped to -1..1.
        rate: samples per second.
        format: one of `MEDIA_TYPES`.

    Raises:
        AudioError: there is no such format, or the samples are not one-dimensional or not finite.
    """
    if format not in MEDIA_TYPES:
        raise AudioError(f"format: expected one of {', '.join(MEDIA_TYPES)}, found {format!r}")
    if np.ndim(audio) != 1:
        raise AudioError(f"expected samples to write as [samples], found shape {np.shape(audio)}")
    if format in ("pcm", "pcm16"):
        return pcm_bytes(audio)
    if format == "wav":
        data = pcm_bytes(audio)
        return _wav_header(rate, len(data)) + data
    form = _FORMS[format]
    if form.rates and rate not in form.rates:
        higher = min((possible for possible in form.rates if possible > rate), default=form.rates[-1])
        audio, rate = soxr.resample(np.asarray(audio, np.float32), rate, higher, quality="HQ"), higher
    return _encode_by_ffmpeg(to_pcm16(audio), rate, form)


def _encode_by_ffmpeg(pcm: np.ndarray, rate: int, form: _Form) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form.container) as container:
        stream = container.add_stream(form.encoder, rate=rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        if form.bit_rate:
            stream.bit_rate = form.bit_rate
        # Writes the header, even if no samples follow.
        container.start_encoding()
        if len(pcm):
            frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _wav_header(rate: int, data_size: int | None) -> bytes:
    """The 44 bytes in front of mono 16-bit samples. Both sizes are 2^32 - 1 if the size is unknown."""
    riff, data = (0xFFFFFFFF, 0xFFFFFFFF) if data_size is None else (36 + data_size, data_size)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", data
    )


def streaming_wav_header(rate: int) -> bytes:
    """The header of a mono 16-bit wav file of unknown length; both of its sizes are 2^32 - 1. `pcm_bytes` follow it."""
    return _wav_header(rate, None)


def write_audio(path: str | Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write a file in the format that its suffix names, whole or not at all.

    The bytes are written to a temporary file in the same folder, which is renamed at the end, so that the final name
    never has half a recording.

    Args:
        path: of the file, see `file_format`; an existing file is replaced.
        audio: f32 [samples]; clipped to -1..1.
        sample_rate: samples per second.

    Raises:
        AudioError: the suffix names no format, the samples are not one-dimensional or not finite, or the file cannot
            be written.
    """
    path = Path(path)
    data = encode(audio, sample_rate, file_format(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise AudioError(f"{path}: expected a writable path, found {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
