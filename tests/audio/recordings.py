"""Recordings of many kinds, made at test time by PyAV, and how to compare what was read with what was written."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

SECONDS = 1.7
"""Not a whole number of frames of any codec."""


class Kind(NamedTuple):
    """A kind of file: FFmpeg's names of a container and an encoder, and the sound in it."""

    container: str
    codec: str
    rate: int
    channels: int = 1
    sample_format: str = "s16"
    video: str = ""
    """Encoder of the pictures."""
    bit_rate: int = 0
    padding: float = 0.0
    """Seconds that the encoder adds, before and after, and that the container does not tell."""
    suffix: str = ""
    """Of the file, where its content does not say what it is."""

    def __str__(self) -> str:
        video = f"-{self.video}" if self.video else ""
        return f"{self.container}-{self.codec}-{self.rate}-{self.channels}{video}"


PCM = ("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_mulaw", "pcm_alaw")
KINDS = [
    *(Kind("wav", "pcm_s16le", rate, channels) for rate in (8000, 16_000, 44_100, 48_000) for channels in (1, 2)),
    *(Kind("wav", codec, 8000) for codec in PCM),
    Kind("wav", "pcm_s16le", 48_000, 6),
    *(Kind("wav", codec, 8000, padding=0.07) for codec in ("adpcm_ima_wav", "adpcm_ms", "adpcm_yamaha")),
    Kind("wav", "g722", 16_000),
    Kind("wav", "g726", 8000),
    Kind("wav", "libmp3lame", 44_100, 2, padding=0.03),
    Kind("wav", "libmp3lame", 8000, padding=0.15),
    Kind("wav", "ac3", 48_000),
    Kind("w64", "pcm_s16le", 16_000),
    Kind("aiff", "pcm_s16be", 44_100, 2),
    Kind("aiff", "pcm_s24be", 44_100),
    Kind("au", "pcm_s16be", 8000),
    Kind("au", "pcm_mulaw", 8000),
    Kind("caf", "pcm_s16le", 44_100),
    Kind("caf", "alac", 44_100, 2),
    Kind("voc", "pcm_s16le", 16_000),
    Kind("flac", "flac", 16_000),
    Kind("flac", "flac", 44_100, 2),
    Kind("tta", "tta", 44_100, 2),
    Kind("wv", "wavpack", 44_100, 2),
    Kind("mp3", "libmp3lame", 8000),
    Kind("mp3", "libmp3lame", 16_000),
    Kind("mp3", "libmp3lame", 44_100, 2),
    Kind("mp2", "mp2", 48_000, 2),
    Kind("ogg", "libopus", 16_000),
    Kind("ogg", "libopus", 48_000, 2),
    Kind("ogg", "vorbis", 44_100, 2),
    Kind("oga", "flac", 16_000),
    Kind("adts", "aac", 44_100, 2, padding=0.03),
    Kind("adts", "aac", 16_000, padding=0.1),
    Kind("adts", "aac", 48_000, 8, padding=0.03),
    Kind("mp4", "aac", 48_000, 8),
    Kind("ac3", "ac3", 48_000, 2),
    Kind("eac3", "eac3", 48_000, 2),
    Kind("amr", "libopencore_amrnb", 8000, bit_rate=12_200),
    Kind("g722", "g722", 16_000, suffix=".g722"),
    Kind("mulaw", "pcm_mulaw", 8000, suffix=".ul"),
    Kind("alaw", "pcm_alaw", 8000, suffix=".alaw"),
    Kind("ipod", "aac", 44_100),
    Kind("ipod", "alac", 44_100, 2),
    Kind("mp4", "aac", 48_000, 2),
    Kind("mp4", "libopus", 48_000),
    Kind("mp4", "flac", 48_000),
    Kind("mp4", "libmp3lame", 44_100),
    Kind("ismv", "aac", 44_100),
    Kind("3gp", "aac", 16_000),
    Kind("3gp", "libopencore_amrnb", 8000, bit_rate=12_200),
    Kind("3g2", "aac", 22_050),
    Kind("mov", "pcm_s16le", 48_000, 2),
    Kind("webm", "libopus", 48_000),
    Kind("webm", "vorbis", 44_100, 2),
    Kind("matroska", "flac", 44_100),
    Kind("matroska", "pcm_s16le", 48_000),
    Kind("matroska", "ac3", 48_000, 6),
    Kind("asf", "wmav2", 44_100, 2, bit_rate=64_000, padding=0.1),
    Kind("asf", "wmav1", 22_050, bit_rate=32_000, padding=0.1),
    Kind("avi", "pcm_s16le", 22_050),
    Kind("mpegts", "aac", 48_000, 2),
    Kind("vob", "ac3", 48_000, 2),
    Kind("mp4", "aac", 44_100, 2, video="mpeg4"),
    Kind("mp4", "aac", 48_000, video="libx264"),
    Kind("mov", "alac", 44_100, 2, video="libx264"),
    Kind("mov", "pcm_s16le", 44_100, 2, video="mjpeg"),
    Kind("matroska", "aac", 44_100, 2, video="libx264"),
    Kind("webm", "libopus", 48_000, video="libvpx"),
    Kind("avi", "libmp3lame", 44_100, 2, video="mpeg4", padding=0.03),
    Kind("flv", "libmp3lame", 44_100, 2, video="flv", padding=0.03),
    Kind("mpegts", "mp2", 44_100, 2, video="mpeg2video"),
    Kind("mpeg", "mp2", 44_100, 2, video="mpeg1video"),
    Kind("asf", "wmav2", 44_100, 2, video="wmv2", bit_rate=64_000, padding=0.1),
]
KINDS = list(dict.fromkeys(KINDS))


def voice(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """A gliding tone with two overtones, in syllables, below 1200 Hz. f32 [samples]."""
    times = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * (250 * times + 5 * np.sin(3 * times))
    sound = np.sin(phase) + 0.2 * np.sin(2 * phase) + 0.1 * np.sin(3 * phase)
    return (0.5 * sound * (0.55 + 0.45 * np.sin(2 * np.pi * 3.1 * times))).astype(np.float32)


def encode(kind: Kind, seconds: float = SECONDS, sound: np.ndarray | None = None) -> bytes:
    """A file of a kind, of `voice` in all channels, or of a sound f32 [samples] or [channels, samples]."""
    sound = voice(kind.rate, seconds) if sound is None else sound
    sound = np.broadcast_to(sound, (kind.channels, sound.shape[-1]))
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[kind.channels]
    file = io.BytesIO()
    with av.open(file, "w", format=kind.container) as container:
        pictures = container.add_stream(kind.video, rate=25) if kind.video else None
        if pictures is not None:
            assert isinstance(pictures, av.VideoStream)
            pictures.width, pictures.height = 128, 96
            pictures.pix_fmt = "yuvj420p" if kind.video == "mjpeg" else "yuv420p"
        stream = container.add_stream(kind.codec, rate=kind.rate, layout=layout, format=_format(kind))
        assert isinstance(stream, av.AudioStream)
        if kind.bit_rate:
            stream.bit_rate = kind.bit_rate
        stream.codec_context.options = {"strict": "experimental"}
        if isinstance(pictures, av.VideoStream):
            for index in range(round(seconds * 25)):
                picture = av.VideoFrame.from_ndarray(np.full((144, 128), 5 * index, np.uint8), format="yuv420p")
                picture.pts, picture.time_base = index, Fraction(1, 25)
                container.mux(pictures.encode(picture))
            container.mux(pictures.encode(None))
        pcm = np.rint(np.clip(sound, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm.T.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = kind.rate, Fraction(1, kind.rate), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def source(kind: Kind, data: bytes, folder: Path) -> bytes | Path:
    """What is read: bytes, or a file where the suffix says what it is."""
    if not kind.suffix:
        return data
    path = folder / f"recording{kind.suffix}"
    path.write_bytes(data)
    return path


def _format(kind: Kind) -> str:
    """The sample format of an encoder: the wanted one, or its first."""
    formats = [format.name for format in av.Codec(kind.codec, "w").audio_formats or []]
    return kind.sample_format if kind.sample_format in formats or not formats else formats[0]


def correlation(found: np.ndarray, rate: int, max_lag: float = 0.03) -> float:
    """The largest correlation of a recording with `voice`, both below 3 kHz, at any lag up to `max_lag` seconds."""
    size = 1 << (2 * len(found)).bit_length()
    keep = np.fft.rfftfreq(size, 1 / rate) < 3000
    first, second = (np.fft.rfft(sound, size) * keep for sound in (found, voice(rate, len(found) / rate)))
    products = np.fft.irfft(first * np.conj(second), size)
    lag = round(max_lag * rate)
    best = max(products[: lag + 1].max(), products[-lag:].max())
    powers = [float((np.fft.irfft(spectrum, size) ** 2).sum()) for spectrum in (first, second)]
    return float(best / np.sqrt(powers[0] * powers[1]))
