"""Transcription and speech by OpenAI's own client library: its answers are those of `Omni`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

import omni_jax
from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import encode
from omni_jax.audio.tempo import TempoStream
from omni_jax.config.model import AudioConfig, ModelConfig, TextConfig
from omni_jax.text.subtitles import srt, vtt
from tests.serve.conftest import RunningServer, assert_same_audio, run_server

HEADER = 44
QUESTIONS = Path(omni_jax.__file__).parent / "assets" / "questions"


def test_transcriptions(client: Any, server: RunningServer, recording: bytes) -> None:
    expected = server.omni.transcribe(io.BytesIO(recording)).text
    file = ("question.wav", recording)
    assert client.audio.transcriptions.create(model="small", file=file).text == expected
    text = client.audio.transcriptions.create(model="small", file=file, response_format="text")
    assert text == expected + "\n"
    events = list(client.audio.transcriptions.create(model="small", file=file, stream=True))
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == expected


@pytest.fixture(scope="module")
def long_recording() -> np.ndarray:
    """Somebody who speaks for 5 s, of which the model takes 0.4 s at once."""
    return np.concatenate([audio_io.read_audio(QUESTIONS / f"{name}.wav") for name in ("day", "name", "sum")])


def test_transcription_of_any_length_has_segments(
    client: Any, server: RunningServer, long_recording: np.ndarray
) -> None:
    recording = encode(long_recording, 16_000, "wav")
    expected = server.omni.transcribe(recording)
    assert len(expected.segments) > 10
    file = ("talk.wav", recording)
    verbose = client.audio.transcriptions.create(
        model="small", file=file, response_format="verbose_json", timestamp_granularities=["segment"]
    )
    assert verbose.duration == len(long_recording) / 16_000
    assert verbose.text == expected.text
    assert verbose.language == ""
    assert [(s.id, s.start, s.end, s.text) for s in verbose.segments] == [
        (number, s.start, s.end, s.text) for number, s in enumerate(expected.segments)
    ]
    for format, written in (("srt", srt), ("vtt", vtt)):
        response = client.audio.transcriptions.create(model="small", file=file, response_format=format)
        assert response == written(expected.segments)
    events = list(client.audio.transcriptions.create(model="small", file=file, stream=True))
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == expected.text


@pytest.fixture(scope="module")
def prepared(server: RunningServer) -> Iterator[Omni]:
    """The served model as one that finds the speech, and knows only English."""
    omni, config = server.omni, server.omni.config
    values = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    values |= {"audio": AudioConfig(find_speech=True, level=-20.0), "text": TextConfig(spoken_english=True)}
    omni.config = ModelConfig(**values)
    yield omni
    omni.config = config


def test_recording_without_speech(client: Any, prepared: Omni) -> None:
    """An empty transcript; one clear error instead of an answer."""
    noise = encode(np.random.default_rng(0).normal(size=32_000).astype(np.float32) / 10, 16_000, "wav")
    for quiet, seconds in ((noise, 2), (encode(np.zeros(24_000, np.float32), 16_000, "wav"), 1.5)):
        file = ("quiet.wav", quiet)
        verbose = client.audio.transcriptions.create(model="small", file=file, response_format="verbose_json")
        assert (verbose.text, verbose.segments, verbose.language) == ("", [], "english")
        assert verbose.duration == seconds
        (event,) = client.audio.transcriptions.create(model="small", file=file, stream=True)
        assert event.text == ""
        content = [{"type": "input_audio", "input_audio": {"data": base64.b64encode(quiet).decode(), "format": "wav"}}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="small", messages=[{"role": "user", "content": content}])
        assert caught.value.code == "no_speech"


def test_language_must_be_one_that_the_model_knows(client: Any, prepared: Omni, recording: bytes) -> None:
    file = ("quiet.wav", encode(np.zeros(16_000, np.float32), 16_000, "wav"))
    for language in ("en", "en-US", "English"):
        assert client.audio.transcriptions.create(model="small", file=file, language=language).text == ""
    with pytest.raises(openai.BadRequestError, match="language: expected en, which this model knows, found 'de'"):
        client.audio.transcriptions.create(model="small", file=file, language="de")


def test_word_times_are_refused(client: Any, recording: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match="timestamp_granularities"):
        client.audio.transcriptions.create(
            model="small",
            file=("a.wav", recording),
            response_format="verbose_json",
            timestamp_granularities=["word"],
        )


@pytest.mark.parametrize("format", ["pcm", "wav", "mp3"])
def test_speech(client: Any, server: RunningServer, format: str) -> None:
    expected = server.omni.read_aloud("read me")
    assert expected.audio is not None
    with client.audio.speech.with_streaming_response.create(
        model="small", voice="alloy", input="read me", response_format=format
    ) as response:
        data = b"".join(response.iter_bytes())
    if format == "mp3":
        received, rate = soundfile.read(io.BytesIO(data))
        assert len(received) / rate == pytest.approx(expected.seconds, abs=0.1)
        return
    data = data[HEADER:] if format == "wav" else data
    assert_same_audio(np.frombuffer(data, "<i2"), expected.audio)


@pytest.mark.parametrize("format", ["pcm", "flac"])
def test_speech_speed(client: Any, server: RunningServer, format: str) -> None:
    reply = server.omni.read_aloud("read me")
    assert reply.audio is not None
    expected = TempoStream(reply.sample_rate, 0.5).push(reply.audio, last=True)
    data = client.audio.speech.create(
        model="small", voice="alloy", input="read me", response_format=format, speed=0.5
    ).content
    received = np.frombuffer(data, "<i2") if format == "pcm" else soundfile.read(io.BytesIO(data), dtype="int16")[0]
    # Overlaps are sought for, so that rounding may move a piece.
    assert len(received) == pytest.approx(len(expected), abs=2000)
    assert len(received) > 1.5 * len(reply.audio)


@pytest.mark.parametrize("format", ["pcm", "mp3"])
def test_speech_as_events(client: Any, server: RunningServer, format: str) -> None:
    expected = server.omni.read_aloud("read me")
    with client.audio.speech.with_streaming_response.create(
        model="small", voice="alloy", input="read me", response_format=format, stream_format="sse"
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    data = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    if format == "pcm":
        assert_same_audio(np.frombuffer(data, "<i2"), expected.audio)
    else:
        assert len(audio_io.read_audio(data)) / 16_000 == pytest.approx(expected.seconds, abs=0.1)
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["output_tokens"] == expected.tokens.shape[1]
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"]


def test_lists_of_voices_and_models(server: RunningServer) -> None:
    status, content, _ = server.call("/v1/audio/voices")
    assert (status, json.loads(content)) == (200, {"voices": [{"id": "default", "name": "default"}]})
    status, content, _ = server.call("/v1/audio/models")
    assert (status, json.loads(content)) == (200, {"models": [{"id": "small", "name": "small"}]})


def test_aliases(omni: Omni, recording: bytes) -> None:
    with (
        run_server(omni, aliases=("whisper-1", "tts-1")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["small", "whisper-1", "tts-1"]
        assert client.models.retrieve("tts-1").id == "tts-1"
        transcript = client.audio.transcriptions.create(model="whisper-1", file=("a.wav", recording))
        assert transcript.text == omni.transcribe(recording).text
        with pytest.raises(openai.NotFoundError, match="expected 'small' or 'whisper-1' or 'tts-1', found 'other'"):
            client.audio.transcriptions.create(model="other", file=("a.wav", recording))
