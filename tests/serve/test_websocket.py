"""Live talk over a real WebSocket."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from omni_jax.inference.answer import Reply
from tests.serve.conftest import Held, Running, assert_same_sound, eventually, running


def dial(server: Running, **options: Any) -> ClientConnection:
    return connect(server.url.replace("http", "ws") + "/live", **options)


def say(socket: ClientConnection, **message: Any) -> None:
    socket.send(json.dumps(message))


def hear(socket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(timeout=60))
    return message


def turn(socket: ClientConnection, number: int) -> list[dict[str, Any]]:
    """The messages of a turn, up to its end."""
    messages = []
    while True:
        message = hear(socket)
        assert message["turn"] == number
        messages.append(message)
        if message["type"] == "end":
            return messages


def same(messages: list[dict[str, Any]], expected: Reply) -> None:
    assert messages[-1] | {"turn": 0} == {
        "type": "end", "turn": 0, "outcome": "done", "finish_reason": expected.finish_reason,
    }  # fmt: skip
    assert "".join(message["text"] for message in messages if message["type"] == "text") == expected.text
    data = b"".join(base64.b64decode(message["data"]) for message in messages if message["type"] == "audio")
    silence = np.zeros(0, np.float32)
    assert_same_sound(np.frombuffer(data, "<i2"), silence if expected.audio is None else expected.audio)


@pytest.fixture
def socket(server: Running) -> Iterator[ClientConnection]:
    with dial(server) as socket:
        say(socket, type="start")
        assert hear(socket) == {
            "type": "ready",
            "model": "small",
            "trained": True,
            "sample_rate": server.omni.config.codec.sample_rate,
            "max_audio_seconds": server.omni.config.audio_encoder.max_samples / 16_000,
        }
        yield socket
    server.idle()


def speak(socket: ClientConnection, sound: np.ndarray) -> None:
    samples = audio_io.to_pcm16(sound)
    for start in range(0, len(samples), 700):
        socket.send(samples[start : start + 700].tobytes())


def test_speech_text_and_what_the_start_asks_for(socket: ClientConnection, server: Running, sound: np.ndarray) -> None:
    said = audio_io.to_pcm16(sound)
    speak(socket, sound)
    say(socket, type="end")
    messages = turn(socket, 1)
    same(messages, server.omni.reply(said, sample_rate=16_000))
    timing = [message for message in messages if message["type"] == "timing"]
    assert 0 < timing[-1]["first_sound_seconds"] <= timing[-1]["total_seconds"] + 1
    say(socket, type="text", text="hello")
    same(turn(socket, 2), server.omni.reply(text="hello"))


def test_settings_can_change_between_questions(socket: ClientConnection, server: Running, sound: np.ndarray) -> None:
    say(socket, type="start", task="A1T1", sample_rate=8000, options={"max_steps": 3})
    speak(socket, sound)
    say(socket, type="end")
    same(turn(socket, 1), server.omni.transcribe(audio_io.to_pcm16(sound), sample_rate=8000, max_steps=3))


def test_another_rate_begins_another_question(socket: ClientConnection, server: Running, sound: np.ndarray) -> None:
    say(socket, type="start", task="A1T1", options={"max_steps": 3})
    speak(socket, sound)
    say(socket, type="start", task="A1T1", sample_rate=8000, options={"max_steps": 3})
    speak(socket, sound)
    say(socket, type="end")
    same(turn(socket, 1), server.omni.transcribe(audio_io.to_pcm16(sound), sample_rate=8000, max_steps=3))


def test_speaking_again_interrupts(socket: ClientConnection, server: Running, sound: np.ndarray) -> None:
    say(socket, type="start", options={"temperature": 1.0, "seed": 1})
    before = server.figure("omni_requests_total", endpoint="/live", outcome="cancelled")
    say(socket, type="text", text="hello")
    speak(socket, sound)
    say(socket, type="end")
    first = turn(socket, 1)
    expected = server.omni.reply(audio_io.to_pcm16(sound), sample_rate=16_000, temperature=1.0, seed=1)
    same(turn(socket, 2), expected)
    # The first answer may have been quicker than the interruption.
    assert first[-1]["outcome"] in ("cancelled", "done")
    if first[-1]["outcome"] == "cancelled":
        eventually(lambda: server.figure("omni_requests_total", endpoint="/live", outcome="cancelled") == before + 1)


def test_an_answer_can_be_stopped(socket: ClientConnection, server: Running) -> None:
    gate = Held(server)
    with gate:
        say(socket, type="text", text="hello")
        gate.wait()
        say(socket, type="cancel")
        assert turn(socket, 1)[-1]["outcome"] == "cancelled"
    server.idle()
    say(socket, type="text", text="hello")
    same(turn(socket, 2), server.omni.reply(text="hello"))


def test_who_vanishes_gives_the_slot_back(server: Running) -> None:
    gate = Held(server)
    with gate, dial(server) as socket:
        say(socket, type="start")
        say(socket, type="text", text="hello")
        gate.wait()
        socket.socket.close()
        gate.release()
    server.idle()
    assert server.service.live.occupied == 0


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("{", "expected JSON"),
        ('{"type": "text", "text": "\\ud800"}', "expected JSON"),
        ("[]", "should be an object"),
        ('{"type": "sing"}', "type"),
        ('{"type": "start", "sample_rate": 1}', "sample_rate"),
        ('{"type": "start", "task": "A2A2"}', "task"),
        ('{"type": "start", "loud": true}', "loud"),
        (b"\0", "whole samples"),
        (b"\0\0" * 10_000_000, "at most"),
    ],
)
def test_bad_messages_are_told_and_forgiven(
    socket: ClientConnection, server: Running, message: str | bytes, found: str
) -> None:
    socket.send(message)
    answer = hear(socket)
    assert answer["type"] == "error"
    assert found in answer["message"]
    say(socket, type="text", text="hello")
    same(turn(socket, 1), server.omni.reply(text="hello"))


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ({"type": "end"}, "at least 20 ms"),
        ({"type": "text", "text": ""}, "expected some text"),
    ],
)
def test_questions_that_cannot_be_answered(socket: ClientConnection, order: dict[str, Any], found: str) -> None:
    say(socket, **order)
    messages = turn(socket, 1)
    assert found in messages[0]["message"]
    assert messages[-1]["outcome"] == "refused"


def test_options_that_do_not_exist(socket: ClientConnection) -> None:
    say(socket, type="start", options={"loud": True})
    say(socket, type="text", text="hello")
    messages = turn(socket, 1)
    assert "found ['loud']" in messages[0]["message"]
    assert messages[-1]["outcome"] == "refused"


def test_another_page_may_not_talk(server: Running) -> None:
    with pytest.raises(Exception, match="403"), dial(server, origin="http://elsewhere.example"):
        pass
    with dial(server, origin=server.url) as socket:
        say(socket, type="start")
        assert hear(socket)["type"] == "ready"


def test_keys(omni: Omni) -> None:
    with running(omni, api_keys=("right", "other")) as server:
        for start in ({"type": "start"}, {"type": "start", "api_key": "wrong"}, {"type": "text", "text": "a"}):
            with dial(server) as socket:
                say(socket, **start)
                assert hear(socket)["type"] == "error"
                with pytest.raises(ConnectionClosed):
                    hear(socket)
                assert socket.close_code == 1008
        with dial(server) as socket:
            say(socket, type="start", api_key="other")
            assert hear(socket)["type"] == "ready"
