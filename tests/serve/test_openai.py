"""OpenAI's own client library against a running server: its answers are those of `Omni`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import encode, streaming_wav_header
from tests.serve.conftest import RunningServer, assert_same_audio

HEADER = 44


def audio_messages(data: str) -> Any:
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return [{"role": "user", "content": [part]}]


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="expected 'small', found 'gpt-4o'"):
        client.models.retrieve("gpt-4o")


def test_long_question_is_refused_or_truncated(client: Any, server: RunningServer) -> None:
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, 10_000).astype(np.float32)
    data = base64.b64encode(encode(audio, 16_000, "flac")).decode()
    content = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    inputs = [{"role": "user", "content": [content]}]
    expected = server.omni.answer(audio_io.from_pcm16(audio_io.to_pcm16(audio)), sample_rate=16_000, truncate=True)
    chat, responses = client.chat.completions.create, client.responses.create
    for create in (
        lambda **body: chat(model="small", messages=inputs, **body).choices[0].message.content,
        lambda **body: responses(model="small", input=inputs, **body).output_text,
    ):
        with pytest.raises(openai.BadRequestError, match=r"at most 0\.40 s, found 0\.62 s") as refused:
            create()
        assert refused.value.code == "audio_too_long"
        assert create(extra_body={"truncate": True}) == expected.text


def test_null_is_as_if_left_out(server: RunningServer, recording_base64: str) -> None:
    audio = {"type": "input_audio", "input_audio": {"data": recording_base64, "format": None}}
    inputs = [{"role": "user", "content": [audio], "name": None}]
    nothing = {"temperature": None, "truncate": None, "stream": None, "modalities": None, "stop": None}
    for path, body in (
        ("/v1/chat/completions", {"messages": inputs, "stream_options": {"include_usage": None}, **nothing}),
        ("/v1/chat/completions", {"messages": inputs, **nothing, "modalities": ["audio"], "audio": {"format": None}}),
        ("/v1/responses", {"input": inputs, "instructions": None, "text": {"format": None}, **nothing}),
        ("/v1/audio/speech", {"input": "hi", "response_format": None, "speed": None, "stream_format": None}),
    ):
        assert server.call(path, {"model": "small", **body})[0] == 200
    assert server.refused("/v1/audio/speech", {"model": "small", "input": None})[1] == "input: field required"


@pytest.mark.parametrize("format", ["wav", "pcm16", "flac", "mp3", "opus", "aac", "m4a"])
def test_chat_with_audio_in_and_out(
    client: Any, server: RunningServer, recording: bytes, recording_base64: str, format: str
) -> None:
    expected = server.omni.reply(io.BytesIO(recording))
    assert expected.audio is not None
    done = client.chat.completions.create(
        model="small",
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": format},
        messages=audio_messages(recording_base64),
    )
    (choice,) = done.choices
    assert choice.message.content is None
    assert choice.message.audio.transcript == expected.text
    data = base64.b64decode(choice.message.audio.data)
    if format == "pcm16":
        received, rate = np.frombuffer(data, "<i2"), expected.sample_rate
    elif format in ("aac", "m4a"):
        received, rate = audio_io.read_audio(data, expected.sample_rate), expected.sample_rate
    else:
        received, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    if format in ("wav", "pcm16", "flac"):
        assert rate == expected.sample_rate
        assert_same_audio(received, expected.audio)
    else:
        assert len(received) / rate == pytest.approx(expected.seconds, abs=0.1)
    assert choice.finish_reason == ("stop" if expected.finish_reason == "stop" else "length")
    assert done.usage.completion_tokens == expected.tokens.shape[1]
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def delta(chunk: Any) -> Any:
    return chunk.to_dict()["choices"][0]["delta"]


@pytest.mark.parametrize("format", ["wav", "pcm16"])
def test_chat_stream_equals_whole_answer(
    client: Any, server: RunningServer, recording: bytes, recording_base64: str, format: str
) -> None:
    expected = server.omni.reply(io.BytesIO(recording), seed=4, temperature=0.8)
    assert expected.audio is not None
    stream = client.chat.completions.create(
        model="small",
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": format},
        messages=audio_messages(recording_base64),
        stream=True,
        stream_options={"include_usage": True},
        seed=4,
        temperature=0.8,
    )
    chunks = list(stream)
    audio = [delta(c)["audio"] for c in chunks if c.choices and "audio" in delta(c)]
    assert "".join(part.get("transcript") or "" for part in audio) == expected.text
    data = b"".join(base64.b64decode(part["data"]) for part in audio if part.get("data"))
    if format == "wav":
        assert data[:HEADER] == streaming_wav_header(expected.sample_rate)
        data = data[HEADER:]
    assert_same_audio(np.frombuffer(data, "<i2"), expected.audio)
    assert len({part["id"] for part in audio}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens == expected.tokens.shape[1]


def test_chat_with_text_ignores_other_messages(client: Any, server: RunningServer) -> None:
    expected = server.omni.answer(text="hello")
    messages = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "hello"}]
    raw = client.chat.completions.with_raw_response.create(model="small", messages=messages)
    assert raw.parse().choices[0].message.content == expected.text
    assert raw.headers["x-omni-jax-ignored-messages"] == "1"
    stream = client.chat.completions.create(model="small", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text


def test_chat_max_completion_tokens_and_text_in_audio_out(client: Any, server: RunningServer) -> None:
    done = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hello"}], max_completion_tokens=1
    )
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == 1
    done = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
    )
    assert done.choices[0].message.audio.transcript == server.omni.reply(text="hello").text


def test_message_with_text_and_a_recording(
    client: Any, server: RunningServer, recording: bytes, recording_base64: str
) -> None:
    """The sample of OpenAI's guide: the recording is answered."""
    parts = [{"type": "text", "text": "What is in this recording?"}, *audio_messages(recording_base64)[0]["content"]]
    raw = client.chat.completions.with_raw_response.create(model="small", messages=[{"role": "user", "content": parts}])
    assert raw.parse().choices[0].message.content == server.omni.answer(recording).text
    assert raw.headers["x-omni-jax-ignored-text"] == "1"


def as_lines(data: str) -> str:
    return "\n".join(data[start : start + 76] for start in range(0, len(data), 76)) + "\r\n"


@pytest.mark.parametrize(
    "written",
    [
        as_lines,
        lambda data: f"data:audio/wav;base64,{data}",
        lambda data: f"data:audio/webm;codecs=opus;base64,{as_lines(data)}",
        lambda data: data.rstrip("="),
        lambda data: data.translate(str.maketrans("+/", "-_")),
    ],
    ids=["lines", "data URI", "data URI with parameters", "no padding", "URL-safe"],
)
def test_base64_as_clients_write_it(
    client: Any, server: RunningServer, recording: bytes, recording_base64: str, written: Callable[[str], str]
) -> None:
    assert len(recording_base64) % 4 == 0
    assert {"+", "/"} & set(recording_base64)
    done = client.chat.completions.create(model="small", messages=audio_messages(written(recording_base64)))
    assert done.choices[0].message.content == server.omni.answer(recording).text


def test_options_of_ours_as_extra_body(client: Any, server: RunningServer, recording: bytes) -> None:
    options = {"temperature": 1.0, "top_k": 3, "seed": 5}
    done = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "hello"}],
        temperature=1.0,
        seed=5,
        extra_body={"top_k": 3, "enforce_delay": False},
    )
    expected = server.omni.answer(text="hello", **options, enforce_delay=False)
    assert done.choices[0].message.content == expected.text
    assert expected.text != server.omni.answer(text="hello", temperature=1.0, seed=5).text
    transcript = client.audio.transcriptions.create(
        model="small", file=("a.wav", recording), temperature=1.0, extra_body={"top_k": 3, "seed": 5}
    )
    assert transcript.text == server.omni.transcribe(recording, **options).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt-4o"}, "model: expected 'small', found 'gpt-4o'"),
        ({"n": 2}, "n: not supported by this model"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "midi"}}, "'flac', 'ogg', 'opus'"),
        ({"stop": ["."]}, "stop: not supported by this model"),
        ({"temperature": 3}, "temperature: input should be less than or equal to 2, found 3"),
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected the last one to be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "found 'image_url'"),
        ({"modalities": ["text", "audio"]}, "audio: expected the format and voice"),
        ({"messages": audio_messages("data:audio/wav,abc")}, "expected a data URI in base64, found 'data:audio/wav'"),
        ({"messages": audio_messages("!!!")}, "input_audio.data: expected base64"),
        ({"messages": audio_messages("aGVsbG8=")}, "expected audio"),
        ({"messages": [{"role": "user", "content": "a" * 100_000}]}, "text: expected at most"),
    ],
)
def test_chat_refuses_invalid_requests(client: Any, change: dict[str, Any], message: str) -> None:
    request = {"model": "small", "messages": [{"role": "user", "content": "hello"}]} | change
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.chat.completions.create(**request)
    error: Any = caught.value.body
    assert message in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("chat/completions", {"temperature": -1}, "temperature", "expected a number, 0 to 100, found -1"),
        ("chat/completions", {"top_p": 0}, "top_p", "expected a number above 0 and at most 1, found 0"),
        ("chat/completions", {"seed": 2**32}, "seed", "expected a whole number"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens", "expected a whole number, 1 to 2^31-1, found 0"),
        ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens", "1 to 2^31-1, found 0"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 62}]}, None, "context of 64"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 9999}]}, "messages", "expected at most"),
        ("audio/speech", {"input": ""}, "input", "expected some text with a letter or a digit, found none"),
        ("chat/completions", {"messages": [{"role": "user", "content": "!!!"}]}, "messages", "found '!!!'"),
        ("audio/speech", {"input": " "}, "input", "expected some text with a letter or a digit, found ' '"),
        ("audio/speech", {"input": "!!!"}, "input", "expected some text with a letter or a digit, found '!!!'"),
        ("chat/completions", {"top_k": -1}, "top_k", "expected a whole number, 0 (all)"),
        ("chat/completions", {"top_k": "a"}, "top_k", "input should be a valid integer"),
        ("audio/speech", {"input": "a", "speed": 4.5}, "speed", "less than or equal to 4"),
        ("audio/speech", {"input": "a", "speed": 0.2}, "speed", "greater than or equal to 0.25"),
        ("responses", {"input": ""}, "input", "expected some text"),
        ("responses", {"input": []}, "input", "expected at least one message, found none"),
        ("responses", {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ("responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens", "1 to 2^31-1, found 0"),
        ("responses", {"input": [{"role": "assistant", "content": "a"}]}, "input", "to be the user's"),
        ("audio/speech", {"input": "a", "temperature": -1}, "temperature", "expected a number, 0 to 100"),
        ("audio/speech", {}, "input", "field required"),
    ],
)
def test_error_param_is_the_field_of_the_request(
    server: RunningServer, path: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    if path == "chat/completions":
        body = {"messages": [{"role": "user", "content": "hello"}], **body}
    status, error = server.error(f"/v1/{path}", {"model": "small", **body})
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert message in error["message"]
