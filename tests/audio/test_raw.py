"""Raw samples: PCM and G.711, whole and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import soxr

from omni_jax.audio import io as audio_io
from omni_jax.audio.raw import Law, RawEncoder, RawFormat
from tests.audio.recordings import voice


def test_pcm_is_16_bit_little_endian() -> None:
    format = RawFormat(24_000)
    assert format.decode(b"\1\0\0\x80").tolist() == [1, -32768]
    assert format.encode(np.array([1, -32768], np.int16)) == b"\1\0\0\x80"
    assert (format.size(0.5), format.seconds(24_000)) == (24_000, 0.5)


# ITU-T G.711, tables 1a and 2a: loudest and quietest values of both signs, scaled to 16 bits.
@pytest.mark.parametrize(
    ("law", "values"),
    [
        ("mulaw", {0x00: -32124, 0x80: 32124, 0xFF: 0, 0xFE: 8, 0x7E: -8}),
        ("alaw", {0x2A: -32256, 0xAA: 32256, 0xD5: 8, 0x55: -8}),
    ],
)
def test_g711_values(law: Law, values: dict[int, int]) -> None:
    format = RawFormat(8000, law)
    assert format.decode(bytes(values)).tolist() == list(values.values())
    assert (format.size(0.5), format.seconds(4000)) == (4000, 0.5)


@pytest.mark.parametrize("law", ["mulaw", "alaw"])
def test_g711_encodes_to_the_nearest_value(law: Law) -> None:
    format = RawFormat(8000, law)
    samples = np.arange(-32768, 32768, dtype=np.int64).astype(np.int16)
    found = format.decode(format.encode(samples)).astype(int)
    values = np.unique(format.decode(bytes(range(256))).astype(int))
    above = np.clip(np.searchsorted(values, samples), 1, len(values) - 1)
    nearest = np.minimum(np.abs(values[above] - samples), np.abs(values[above - 1] - samples))
    # FFmpeg rounds in its own way between two values.
    assert (np.abs(found - samples) <= nearest + 8 + np.abs(samples.astype(int)) // 32).all()
    every = bytes(range(256))
    assert format.decode(format.encode(format.decode(every))).tolist() == format.decode(every).tolist()


@pytest.mark.parametrize("format", [RawFormat(24_000), RawFormat(8000, "mulaw"), RawFormat(8000, "alaw")])
def test_raw_encoder_joins_pieces(format: RawFormat) -> None:
    sound = voice(24_000, 1.0)
    encoder = RawEncoder(24_000, format)
    pieces = [
        encoder.push(sound[start : start + 777], last=start + 777 >= len(sound)) for start in range(0, 24_000, 777)
    ]
    whole = sound if format.rate == 24_000 else soxr.resample(sound, 24_000, format.rate)
    assert b"".join(pieces) == format.encode(audio_io.to_pcm16(whole))
