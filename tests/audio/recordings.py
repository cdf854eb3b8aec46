"""Recordings of many kinds, made at test time by PyAV, and how to compare what was read with what was written."""

from __future__ import annotations

import io
from fractions import Fraction
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
            pictures.width, pictures.height = 128, 96
            pictures.pix_fmt = "yuvj420p" if kind.video == "mjpeg" else "yuv420p"
        stream = container.add_stream(kind.codec, rate=kind.rate, layout=layout, format=_format(kind))
        if kind.bit_rate:
            stream.bit_rate = kind.bit_rate
        stream.codec_context.options = {"strict": "experimental"}
        if pictures is not None:
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
