"""Sound on its way out: the formats that clients may ask for."""

from __future__ import annotations

import io
import struct
from collections.abc import AsyncIterator

import numpy as np
import soundfile

from omni_jax.audio.io import encode_wav, to_pcm16
from omni_jax.serve.sessions import Conversation

MEDIA_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
STREAMED = ("wav", "pcm", "pcm16")
"""Formats whose beginning can be sent before the end is known."""


def encode(audio: np.ndarray, rate: int, format: str) -> bytes:
    """A whole recording in one of `MEDIA_TYPES`; `pcm` and `pcm16` are 16-bit little-endian without a header."""
    if format in ("pcm", "pcm16"):
        return pcm(audio)
    if format == "wav":
        return encode_wav(audio, rate)
    container, subtype = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", None), "opus": ("OGG", "OPUS")}[format]
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def pcm(audio: np.ndarray) -> bytes:
    """16-bit little-endian samples."""
    return to_pcm16(audio).astype("<i2").tobytes()


def endless_header(rate: int) -> bytes:
    """The header of a mono 16-bit wav file whose length isn't known yet: both sizes say so, as 2^32 - 1."""
    unknown = 0xFFFFFFFF
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", unknown, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", unknown
    )


async def streamed(conversation: Conversation, rate: int, format: str, stride: int = 1) -> AsyncIterator[bytes]:
    """The sound of an answer as it is made, in one of `STREAMED`.

    Args:
        conversation: that speaks.
        rate: its samples per second.
        format: with a header or without.
        stride: bytes are held back until there are this many; joined they are the same.
    """
    if format == "wav":
        yield endless_header(rate)
    held = b""
    async for part in conversation:
        held += pcm(part.audio)
        if len(held) >= stride:
            yield held
            held = b""
    if held:
        yield held
