"""A client like Mini-Omni's own, which streams 16-bit samples from `/chat`."""

from __future__ import annotations

import io
import json
import urllib.request

import numpy as np
import pytest
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.serve import sound as sounds
from tests.serve.conftest import Running, assert_same_sound


def heard(server: Running, **body: object) -> tuple[bytes, str]:
    """What such a client gets: it reads pieces of a fixed size until there are no more."""
    request = urllib.request.Request(
        f"{server.url}/chat", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    pieces = []
    with urllib.request.urlopen(request, timeout=60) as response:
        while piece := response.read(4096):
            pieces.append(piece)
        return b"".join(pieces), response.headers["content-type"]


@pytest.mark.parametrize("stride", [1, 4, 100])
def test_bare_samples_whatever_the_stride(server: Running, recording: bytes, spoken: str, stride: int) -> None:
    expected = server.omni.reply(io.BytesIO(recording), max_steps=2048).audio
    assert expected is not None
    data, kind = heard(server, audio=spoken, stream_stride=stride, max_tokens=2048, format="pcm")
    assert kind == "audio/pcm"
    assert_same_sound(np.frombuffer(data, "<i2"), expected)


def test_by_default_a_wav_that_every_player_reads(server: Running, recording: bytes, spoken: str) -> None:
    expected = server.omni.reply(io.BytesIO(recording))
    assert expected.audio is not None
    data, kind = heard(server, audio=spoken)
    assert kind == "audio/wav"
    assert data.startswith(sounds.endless_header(expected.sample_rate))
    read, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == expected.sample_rate
    assert_same_sound(read, expected.audio)
    # Our own reader takes it too, though its header can't say how long it is.
    assert len(audio_io.read_audio(io.BytesIO(data), rate)) == len(expected.audio)


def test_it_stops_where_it_is_told_to(server: Running, recording: bytes, spoken: str) -> None:
    expected = server.omni.reply(io.BytesIO(recording), max_steps=9)
    assert expected.audio is not None
    data, _ = heard(server, audio=spoken, max_tokens=9, format="pcm")
    assert len(data) == 2 * len(expected.audio)


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
def test_bad_bodies(server: Running, body: object, message: str) -> None:
    status, sentence = server.refused("/chat", body)
    assert status == 400
    assert message in sentence
