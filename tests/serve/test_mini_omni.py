"""A client like Mini-Omni's own, which reads 16-bit samples from `/chat`."""

from __future__ import annotations

import base64
import io
import json
import urllib.request

import numpy as np
import pytest
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import encode, streaming_wav_header
from tests.serve.conftest import RunningServer, assert_same_audio


def stream_chat(server: RunningServer, **body: object) -> tuple[bytes, str]:
    """Body and content type, read in pieces of a fixed size as such a client does."""
    request = urllib.request.Request(
        f"{server.url}/chat", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    pieces = []
    with urllib.request.urlopen(request, timeout=60) as response:
        while piece := response.read(4096):
            pieces.append(piece)
        return b"".join(pieces), response.headers["content-type"]


@pytest.mark.parametrize("stride", [1, 4, 100])
def test_chat_pcm_does_not_depend_on_stride(
    server: RunningServer, recording: bytes, recording_base64: str, stride: int
) -> None:
    expected = server.omni.reply(io.BytesIO(recording), max_steps=2048).audio
    assert expected is not None
    data, kind = stream_chat(server, audio=recording_base64, stream_stride=stride, max_tokens=2048, format="pcm")
    assert kind == "audio/pcm"
    assert_same_audio(np.frombuffer(data, "<i2"), expected)


def test_chat_streams_wav_by_default(server: RunningServer, recording: bytes, recording_base64: str) -> None:
    expected = server.omni.reply(io.BytesIO(recording))
    assert expected.audio is not None
    data, kind = stream_chat(server, audio=recording_base64)
    assert kind == "audio/wav"
    assert data.startswith(streaming_wav_header(expected.sample_rate))
    read, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == expected.sample_rate
    assert_same_audio(read, expected.audio)
    # `read_audio` reads it too, although the header has no length.
    assert len(audio_io.read_audio(io.BytesIO(data), rate)) == len(expected.audio)


def test_chat_max_tokens(server: RunningServer, recording: bytes, recording_base64: str) -> None:
    expected = server.omni.reply(io.BytesIO(recording), max_steps=9)
    assert expected.audio is not None
    data, _ = stream_chat(server, audio=recording_base64, max_tokens=9, format="pcm")
    assert len(data) == 2 * len(expected.audio)


def test_chat_truncates_if_asked(server: RunningServer) -> None:
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, 10_000).astype(np.float32)
    data = base64.b64encode(encode(audio, 16_000, "flac")).decode()
    assert "at most 0.40 s" in server.refused("/chat", {"audio": data, "truncate": None})[1]
    assert server.call("/chat", {"audio": data, "truncate": True, "max_tokens": 20})[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "audio: field required"),
        ({"audio": "?"}, "audio: expected base64"),
        ({"audio": ""}, "audio: expected a recording in base64, found nothing"),
        ({"audio": "aGVsbG8="}, "expected audio"),
        ({"audio": "aGVsbG8=", "stream_stride": 0}, "stream_stride: input should be greater than or equal to 1"),
        ({"audio": "aGVsbG8=", "max_tokens": "many"}, "max_tokens: input should be a valid integer, found 'many'"),
        ([], "body: input should be a valid dictionary"),
    ],
)
def test_chat_refuses_invalid_bodies(server: RunningServer, body: object, message: str) -> None:
    status, sentence = server.refused("/chat", body)
    assert status == 400
    assert message in sentence
