"""OpenAI's Responses API by its own client library: its answers are those of `Omni`."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest

from omni_jax.audio.encoding import streaming_wav_header
from tests.serve.conftest import RunningServer, assert_same_audio

SPOKEN = {"modalities": ["text", "audio"], "audio": {"format": "pcm16", "voice": "alloy"}}


def audio_input(data: str) -> Any:
    parts = [
        {"type": "input_text", "text": "Answer this."},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
    ]
    return [{"role": "system", "content": "Be nice."}, {"role": "user", "content": parts}]


def test_text(client: Any, server: RunningServer) -> None:
    expected = server.omni.answer(text="hello")
    response = client.responses.create(model="small", input="hello", instructions="Be nice.")
    assert response.output_text == expected.text
    assert response.status == ("completed" if expected.finish_reason == "stop" else "incomplete")
    assert response.usage.output_tokens == expected.tokens.shape[1]
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    short = client.responses.create(model="small", input="hello", max_output_tokens=1)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_audio_in_and_out(client: Any, server: RunningServer, recording: bytes, recording_base64: str) -> None:
    assert client.responses.create(model="small", input=audio_input(recording_base64)).output_text == (
        server.omni.answer(recording).text
    )
    expected = server.omni.reply(recording)
    response = client.responses.create(model="small", input=audio_input(recording_base64), extra_body=SPOKEN)
    text, audio = response.output[0].content
    assert (text.text, audio.transcript) == (expected.text, expected.text)
    assert_same_audio(np.frombuffer(base64.b64decode(audio.data), "<i2"), expected.audio)


@pytest.mark.parametrize("format", ["pcm16", "wav"])
def test_stream(client: Any, server: RunningServer, recording: bytes, recording_base64: str, format: str) -> None:
    expected = server.omni.reply(recording)
    extra = SPOKEN | {"audio": {"format": format}}
    stream = client.responses.create(model="small", input=audio_input(recording_base64), stream=True, extra_body=extra)
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.text
    data = b"".join(base64.b64decode(event.delta) for event in events if event.type == "response.audio.delta")
    if format == "wav":
        header = streaming_wav_header(expected.sample_rate)
        assert data.startswith(header)
        data = data[len(header) :]
    assert_same_audio(np.frombuffer(data, "<i2"), expected.audio)
    last = events[-1]
    assert last.type == f"response.{last.response.status}"
    assert last.response.output_text == expected.text


def test_stream_of_text(client: Any, server: RunningServer) -> None:
    with client.responses.stream(model="small", input="hello") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == server.omni.answer(text="hello").text


def test_messages_name_fields_as_clients_know_them(server: RunningServer) -> None:
    picture = {"type": "input_image", "image_url": "x"}
    for path, body, field in (
        ("/v1/responses", {"input": [{"role": "user", "content": [picture]}]}, "input.0.content.0"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ["Hi"]}]}, "messages.0.content.0"),
        ("/v1/audio/speech", {"input": "hi", "voice": ["a"]}, "voice"),
    ):
        status, message = server.refused(path, {"model": "small", **body})
        assert (status, message.partition(":")[0]) == (400, field)
    text, url = {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}
    mixed = {"model": "small", "messages": [{"role": "user", "content": [text, url]}]}
    assert "found 'image_url'" in server.refused("/v1/chat/completions", mixed)[1]


def test_only_text_format_is_supported(client: Any) -> None:
    for options in ({"format": {"type": "text"}}, {"verbosity": "low"}):
        assert client.responses.create(model="small", input="hello", text=options).output_text
    with pytest.raises(openai.BadRequestError, match=r"text\.format: expected type text, found 'json_object'"):
        client.responses.create(model="small", input="hello", text={"format": {"type": "json_object"}})
