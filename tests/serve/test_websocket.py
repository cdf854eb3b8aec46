"""`/live` over a real WebSocket."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import encode
from omni_jax.inference.answer import Reply
from omni_jax.inference.engine import Engine
from tests.serve.conftest import HeldBatch, RunningServer, assert_same_audio, eventually, run_server


def open_socket(server: RunningServer, **options: Any) -> ClientConnection:
    return connect(server.url.replace("http", "ws") + "/live", **options)


def send(socket: ClientConnection, **message: Any) -> None:
    socket.send(json.dumps(message))


def receive(socket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(timeout=60))
    return message


def receive_turn(socket: ClientConnection, number: int) -> list[dict[str, Any]]:
    """The messages of a turn, up to its end."""
    messages = []
    while True:
        message = receive(socket)
        assert message["turn"] == number
        messages.append(message)
        if message["type"] == "end":
            return messages


def assert_answer(messages: list[dict[str, Any]], expected: Reply) -> None:
    assert messages[-1] | {"turn": 0} == {
        "type": "end", "turn": 0, "outcome": "done", "finish_reason": expected.finish_reason,
    }  # fmt: skip
    assert "".join(message["text"] for message in messages if message["type"] == "text") == expected.text
    data = b"".join(base64.b64decode(message["data"]) for message in messages if message["type"] == "audio")
    silence = np.zeros(0, np.float32)
    assert_same_audio(np.frombuffer(data, "<i2"), silence if expected.audio is None else expected.audio)


@pytest.fixture
def socket(server: RunningServer) -> Iterator[ClientConnection]:
    with open_socket(server) as socket:
        send(socket, type="start")
        assert receive(socket) == {
            "type": "ready",
            "model": "small",
            "trained": True,
            "sample_rate": server.omni.config.codec.sample_rate,
            "max_audio_seconds": server.omni.config.audio_encoder.max_samples / 16_000,
            "max_file_bytes": (32 << 20) * 3 // 4 - 1024,
        }
        assert receive(socket) == {"type": "state", "state": "ready"}
        yield socket
    server.wait_until_idle()


def send_audio(socket: ClientConnection, samples: np.ndarray) -> None:
    pcm = audio_io.to_pcm16(samples)
    for start in range(0, len(pcm), 700):
        socket.send(pcm[start : start + 700].tobytes())


def test_live_answers_audio_and_text(socket: ClientConnection, server: RunningServer, samples: np.ndarray) -> None:
    pcm = audio_io.to_pcm16(samples)
    send_audio(socket, samples)
    send(socket, type="end")
    messages = receive_turn(socket, 1)
    assert_answer(messages, server.omni.reply(pcm, sample_rate=16_000))
    timing = [message for message in messages if message["type"] == "timing"]
    assert 0 < timing[-1]["first_audio_seconds"] <= timing[-1]["total_seconds"] + 1
    send(socket, type="text", text="hello")
    assert_answer(receive_turn(socket, 2), server.omni.reply(text="hello"))


def test_live_messages_may_end_within_a_sample(
    socket: ClientConnection, server: RunningServer, samples: np.ndarray
) -> None:
    pcm = audio_io.to_pcm16(samples)
    data = pcm.tobytes()
    for start in range(0, len(data), 333):
        socket.send(data[start : start + 333])
    send(socket, type="end")
    assert_answer(receive_turn(socket, 1), server.omni.reply(pcm, sample_rate=16_000))
    # Half a sample is none.
    socket.send(data + b"\1")
    send(socket, type="end")
    assert_answer(receive_turn(socket, 2), server.omni.reply(pcm, sample_rate=16_000))


def test_live_file_and_transcript(socket: ClientConnection, server: RunningServer, samples: np.ndarray) -> None:
    """A file of any format is answered, and its transcript is sent with the answer."""
    data = encode(samples, 16_000, "flac")
    send(socket, type="start", transcript=True)
    send(socket, type="file", data=base64.b64encode(data).decode())
    messages = receive_turn(socket, 1)
    if not any(message["type"] == "transcript" for message in messages):
        messages.insert(0, receive(socket))
    transcripts = [message for message in messages if message["type"] == "transcript"]
    assert transcripts == [{"type": "transcript", "turn": 1, "text": server.omni.transcribe(data).text}]
    assert_answer([message for message in messages if message["type"] != "transcript"], server.omni.reply(data))


def test_live_refuses_damaged_files(socket: ClientConnection) -> None:
    for data, found in (("!", "data: expected base64"), ("aGVsbG8=", "expected audio")):
        send(socket, type="file", data=data)
        error, end = receive_turn(socket, 1 if data == "!" else 2)
        assert found in error["message"]
        assert error["code"] == (None if data == "!" else "bad_audio")
        assert end["outcome"] == "refused"


def test_live_waits_until_the_programs_are_compiled(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()
    monkeypatch.setattr(Engine, "warm_up", lambda self, stop: compiled.wait(60))
    with run_server(omni, ready=False) as server, open_socket(server) as socket:
        try:
            send(socket, type="start")
            assert receive(socket)["type"] == "ready"
            assert receive(socket) == {"type": "state", "state": "warming up"}
            send(socket, type="text", text="hello")
        finally:
            compiled.set()
        assert receive(socket) == {"type": "state", "state": "ready"}
        assert_answer(receive_turn(socket, 1), omni.reply(text="hello"))


def test_live_start_changes_task_rate_and_options(
    socket: ClientConnection, server: RunningServer, samples: np.ndarray
) -> None:
    send(socket, type="start", task="A1T1", sample_rate=8000, options={"max_steps": 3})
    send_audio(socket, samples)
    send(socket, type="end")
    assert_answer(
        receive_turn(socket, 1), server.omni.transcribe(audio_io.to_pcm16(samples), sample_rate=8000, max_steps=3)
    )


def test_live_new_sample_rate_discards_recording(
    socket: ClientConnection, server: RunningServer, samples: np.ndarray
) -> None:
    send(socket, type="start", task="A1T1", options={"max_steps": 3})
    send_audio(socket, samples)
    send(socket, type="start", task="A1T1", sample_rate=8000, options={"max_steps": 3})
    send_audio(socket, samples)
    send(socket, type="end")
    assert_answer(
        receive_turn(socket, 1), server.omni.transcribe(audio_io.to_pcm16(samples), sample_rate=8000, max_steps=3)
    )


def test_live_audio_interrupts_answer(socket: ClientConnection, server: RunningServer, samples: np.ndarray) -> None:
    send(socket, type="start", options={"temperature": 1.0, "seed": 1})
    before = server.metric("omni_requests_total", endpoint="/live", outcome="cancelled")
    send(socket, type="text", text="hello")
    send_audio(socket, samples)
    send(socket, type="end")
    first = receive_turn(socket, 1)
    expected = server.omni.reply(audio_io.to_pcm16(samples), sample_rate=16_000, temperature=1.0, seed=1)
    assert_answer(receive_turn(socket, 2), expected)
    # The first answer may have ended before the interruption.
    assert first[-1]["outcome"] in ("cancelled", "done")
    if first[-1]["outcome"] == "cancelled":
        eventually(lambda: server.metric("omni_requests_total", endpoint="/live", outcome="cancelled") == before + 1)


def test_live_cancel(socket: ClientConnection, server: RunningServer) -> None:
    gate = HeldBatch(server)
    with gate:
        send(socket, type="text", text="hello")
        gate.wait()
        send(socket, type="cancel")
        assert receive_turn(socket, 1)[-1]["outcome"] == "cancelled"
    server.wait_until_idle()
    send(socket, type="text", text="hello")
    assert_answer(receive_turn(socket, 2), server.omni.reply(text="hello"))


def test_live_disconnect_frees_batch_slot(server: RunningServer) -> None:
    gate = HeldBatch(server)
    with gate, open_socket(server) as socket:
        send(socket, type="start")
        send(socket, type="text", text="hello")
        gate.wait()
        socket.socket.close()
        gate.release()
    server.wait_until_idle()
    assert server.service.engine.num_active == 0


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
        (b"\0\0" * 10_000_000, "at most"),
    ],
)
def test_live_continues_after_invalid_message(
    socket: ClientConnection, server: RunningServer, message: str | bytes, found: str
) -> None:
    socket.send(message)
    answer = receive(socket)
    assert answer["type"] == "error"
    assert found in answer["message"]
    send(socket, type="text", text="hello")
    assert_answer(receive_turn(socket, 1), server.omni.reply(text="hello"))


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"type": "end"}, "at least 20 ms"),
        ({"type": "text", "text": ""}, "expected some text"),
    ],
)
def test_live_refuses_empty_requests(
    socket: ClientConnection, server: RunningServer, message: dict[str, Any], found: str
) -> None:
    before = server.metric("omni_requests_total", endpoint="/live", outcome="refused")
    send(socket, **message)
    messages = receive_turn(socket, 1)
    assert found in messages[0]["message"]
    assert messages[-1]["outcome"] == "refused"
    assert server.metric("omni_requests_total", endpoint="/live", outcome="refused") == before + 1


@pytest.mark.parametrize(
    ("options", "found"), [({"loud": True}, "found loud"), ({"top_k": 2**40}, f"top_k: expected .* found {2**40}")]
)
def test_live_refuses_invalid_options(socket: ClientConnection, options: dict[str, Any], found: str) -> None:
    """At once; the settings before stay."""
    send(socket, type="start", options=options)
    message = receive(socket)
    assert (message["type"], message["turn"]) == ("error", None)
    assert re.search(found, message["message"])
    send(socket, type="text", text="hello")
    assert receive_turn(socket, 1)[-1]["outcome"] == "done"


def test_live_truncates_if_asked(socket: ClientConnection, server: RunningServer) -> None:
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, 10_000).astype(np.float32)
    data = base64.b64encode(encode(audio, 16_000, "flac")).decode()
    for turn, truncate in enumerate((False, True), 1):
        send(socket, type="start", truncate=truncate)
        send(socket, type="file", data=data)
        assert receive_turn(socket, turn)[-1]["outcome"] == ("done" if truncate else "refused")


def test_live_refuses_other_origins(server: RunningServer) -> None:
    with pytest.raises(Exception, match="403"), open_socket(server, origin="http://elsewhere.example"):
        pass
    with open_socket(server, origin=server.url) as socket:
        send(socket, type="start")
        assert receive(socket)["type"] == "ready"


@pytest.mark.parametrize(("allowed", "refused"), [("https://app.example", "https://app.example.org"), ("*", None)])
def test_live_allowed_origins(omni: Omni, allowed: str, refused: str | None) -> None:
    with run_server(omni, allowed_origins=(allowed,)) as server:
        for origin in ("https://app.example", server.url):
            with open_socket(server, origin=origin) as socket:
                send(socket, type="start")
                assert receive(socket)["type"] == "ready"
        if refused:
            with pytest.raises(Exception, match="403"), open_socket(server, origin=refused):
                pass


def test_live_api_keys(omni: Omni) -> None:
    with run_server(omni, api_keys=("right", "other")) as server:
        for start in ({"type": "start"}, {"type": "start", "api_key": "wrong"}, {"type": "text", "text": "a"}):
            with open_socket(server) as socket:
                send(socket, **start)
                assert receive(socket)["type"] == "error"
                with pytest.raises(ConnectionClosed):
                    receive(socket)
                assert socket.close_code == 1008
        with open_socket(server) as socket:
            send(socket, type="start", api_key="other")
            assert receive(socket)["type"] == "ready"
