"""Samples without a file around them, as realtime and telephone APIs send them: 16-bit PCM, G.711 mu-law and A-law."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soxr

from omni_jax.audio.io import to_pcm16

Law = Literal["mulaw", "alaw"]


@dataclass(frozen=True)
class RawFormat:
    """A format of raw mono samples."""

    rate: int
    """Samples per second."""
    law: Law | None = None
    """G.711's compression of a sample to a byte; None: 16-bit little-endian PCM."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample."""
        return 2 if self.law is None else 1

    def decode(self, data: bytes) -> np.ndarray:
        """Samples int16 [samples] of whole samples in bytes."""
        if self.law is None:
            return np.frombuffer(data, "<i2").astype(np.int16, copy=False)
        return _g711(self.law)[0][np.frombuffer(data, np.uint8)]

    def encode(self, samples: np.ndarray) -> bytes:
        """Bytes of int16 [samples]."""
        if self.law is None:
            return samples.astype("<i2", copy=False).tobytes()
        return _g711(self.law)[1][samples.view(np.uint16)].tobytes()

    def seconds(self, size: int) -> float:
        """Duration of so many bytes."""
        return size / (self.sample_bytes * self.rate)

    def size(self, seconds: float) -> int:
        """Bytes of so many seconds, up to the last whole sample."""
        return int(seconds * self.rate) * self.sample_bytes


class RawEncoder:
    """Encodes audio piece by piece, resampled where the format has another rate; the pieces join without a click."""

    def __init__(self, rate: int, format: RawFormat):
        """Begin.

        Args:
            rate: samples per second of the audio.
            format: of the result.
        """
        self._format = format
        self._resampler = None if rate == format.rate else soxr.ResampleStream(rate, format.rate, 1, dtype="float32")

    def push(self, audio: np.ndarray, *, last: bool = False) -> bytes:
        """Take the next samples f32 [samples] and give the bytes that are ready; with `last` all that are left."""
        if self._resampler is not None:
            audio = self._resampler.resample_chunk(audio, last=last)
        return self._format.encode(to_pcm16(audio))


@functools.cache
def _g711(law: Law) -> tuple[np.ndarray, np.ndarray]:
    """FFmpeg's G.711 as tables: int16 [256] of each byte, and uint8 [65536] of each sample as an unsigned number."""
    # Loads a library, which most requests need not wait for.
    import av

    encoder, decoder = (av.CodecContext.create(f"pcm_{law}", mode) for mode in ("w", "r"))
    assert isinstance(encoder, av.AudioCodecContext)
    assert isinstance(decoder, av.AudioCodecContext)
    for codec in (encoder, decoder):
        codec.sample_rate, codec.layout, codec.format = 8000, "mono", "s16"
    samples = av.AudioFrame.from_ndarray(np.arange(1 << 16, dtype=np.uint16).view(np.int16)[None], "s16", "mono")
    samples.sample_rate = 8000
    encoded = b"".join(bytes(packet) for packet in encoder.encode(samples))
    (decoded,) = decoder.decode(av.Packet(bytes(range(256))))
    return decoded.to_ndarray()[0], np.frombuffer(encoded, np.uint8)
