"""`/v1/realtime` by OpenAI's own client, and event by event."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket as sockets
import threading
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soxr
from websockets.exceptions import ConnectionClosed, InvalidStatus

from omni_jax.api import Omni
from omni_jax.audio.raw import RawFormat
from omni_jax.config.model import AudioConfig
from omni_jax.errors import NoSpeechError
from omni_jax.inference.engine import Engine
from omni_jax.inference.request import Request, Turn
from omni_jax.serve.client_secrets import ClientSecrets
from omni_jax.serve.sessions import Service
from tests.serve.conftest import HeldBatch, RunningServer, assert_same_audio, eventually, run_server
from tests.serve.realtime_client import RATE, Client, Event, audio_bytes, joined, pcm, question

TRANSCRIPTION = "conversation.item.input_audio_transcription"


@pytest.fixture(scope="module")
def server(conversation_server: RunningServer) -> RunningServer:
    return conversation_server


@pytest.fixture(scope="module")
def omni(conversation_server: RunningServer) -> Omni:
    return conversation_server.omni


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url) as client:
        assert [client.receive()["type"], client.receive()["type"]] == ["session.created", "conversation.created"]
        yield client
    eventually(lambda: server.metric("omni_realtime_sessions") == 0)
    server.wait_until_idle()


def silence(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.zeros(int(seconds * rate), np.int16)


def push_to_talk(client: Client, samples: np.ndarray) -> list[Event]:
    """Ask, and receive the answer."""
    client.append(samples.tobytes())
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    return client.until("response.done")


def types_of(events: list[Event]) -> list[str]:
    """Types in order, repeated ones once; the first sound may come before the first text."""
    types = list(dict.fromkeys(event["type"] for event in events))
    deltas = [index for index, type in enumerate(types) if type.endswith(".delta")]
    for index, type in zip(deltas, sorted((types[index] for index in deltas), reverse=True), strict=True):
        types[index] = type
    return types


# OpenAI's own client. It uses websockets as it was before version 17.1.
openai_client_warns = pytest.mark.filterwarnings("ignore:connect.* must be used as a context manager")


@openai_client_warns
def test_realtime_openai_client_push_to_talk(server: RunningServer) -> None:
    samples = question("name")
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai_client,
        openai_client.realtime.connect(model="small") as connection,
    ):
        assert connection.recv().type == "session.created"
        connection.session.update(
            session={
                "type": "realtime",
                "audio": {"input": {"turn_detection": None, "transcription": {"model": "whisper-1"}}},
            }
        )
        for start in range(0, len(samples), 2400):
            piece = base64.b64encode(samples[start : start + 2400].tobytes()).decode()
            connection.input_audio_buffer.append(audio=piece)
        connection.input_audio_buffer.commit()
        connection.response.create()
        audio, transcript, asked = b"", "", None
        status = None
        for event in connection:
            if event.type == "response.output_audio.delta":
                audio += base64.b64decode(event.delta)
            elif event.type == "response.output_audio_transcript.delta":
                transcript += event.delta
            elif event.type == f"{TRANSCRIPTION}.completed":
                asked = event.transcript
            elif event.type == "response.done":
                status = event.response.status
            if status and asked is not None:
                break
    expected = server.omni.reply(samples, sample_rate=RATE)
    assert (status, transcript) == ("completed" if expected.finish_reason == "stop" else "incomplete", expected.text)
    assert_same_audio(pcm(audio), expected.audio)
    assert asked == server.omni.transcribe(samples, sample_rate=RATE).text


@openai_client_warns
def test_realtime_openai_client_server_vad(server: RunningServer) -> None:
    """Two questions with pauses: the server finds both, and answers each."""
    stream = np.concatenate([silence(0.5), question("name"), silence(1.0)])
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai_client,
        openai_client.realtime.connect(model="small") as connection,
    ):
        turns: list[Turn] = []
        connection.session.update(session={"type": "realtime", "max_output_tokens": 10})
        for _ in range(2):
            played = time.monotonic()
            for start in range(0, len(stream), 960):
                piece = base64.b64encode(stream[start : start + 960].tobytes()).decode()
                connection.input_audio_buffer.append(audio=piece)
            events = []
            for event in connection:
                events.append(event)
                if event.type == "response.done":
                    break
            found = [event.type for event in events if event.type.startswith("input_audio_buffer")]
            assert found == [f"input_audio_buffer.{name}" for name in ("speech_started", "speech_stopped", "committed")]
            committed = next(event for event in events if event.type == "input_audio_buffer.committed")
            connection.conversation.item.retrieve(item_id=committed.item_id)
            for event in connection:
                if event.type == "conversation.item.retrieved":
                    break
            samples = pcm(base64.b64decode(event.item.content[0].audio))
            expected = server.omni.generate(Request((RATE, samples), history=turns), max_steps=10)
            audio = b"".join(
                base64.b64decode(event.delta) for event in events if event.type == "response.output_audio.delta"
            )
            assert_same_audio(pcm(audio), expected.audio)
            # All of the first answer was played by then.
            turns.append(Turn(server.omni.transcribe(samples, sample_rate=RATE).text, expected.text))
            time.sleep(max(0, played + expected.seconds - time.monotonic()))


@openai_client_warns
def test_realtime_example_of_the_documentation(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page.split("## Realtime")[1].split("\n## ")[0], re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace('model="nano"', 'model="small"')
    code = code.replace("asyncio.sleep(0.02)", "asyncio.sleep(0)")
    monkeypatch.chdir(tmp_path)
    with wave.open("question.wav", "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(question("name").tobytes())
    exec(compile(code, "docs/serving.md", "exec"), {})
    with wave.open("answer.wav") as file:
        assert file.getnframes() > RATE
    assert capsys.readouterr().out


# Turns


def test_realtime_events_of_an_answer(client: Client, server: RunningServer) -> None:
    session = client.update(audio={"input": {"turn_detection": None}}, max_output_tokens=20)
    assert (session["audio"]["input"]["turn_detection"], session["max_output_tokens"]) == (None, 20)
    samples = question("name")
    events = push_to_talk(client, samples)
    assert types_of(events) == [
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_audio_transcript.delta",
        "response.output_audio.delta",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.done",
    ]
    assert len({event["event_id"] for event in events}) == len(events)
    expected = server.omni.reply(samples, sample_rate=RATE, max_steps=20)
    assert_same_audio(pcm(audio_bytes(events)), expected.audio)
    assert joined(events, "response.output_audio_transcript") == expected.text
    response = events[-1]["response"]
    assert (response["status"], response["status_details"]) == (
        ("completed", None)
        if expected.finish_reason == "stop"
        else ("incomplete", {"type": "incomplete", "reason": "max_output_tokens"})
    )
    assert response["output"][0]["content"] == [{"type": "output_audio", "transcript": expected.text}]
    assert response["usage"]["output_tokens"] == expected.tokens.shape[1]
    done = [event for event in events if event["type"] == "conversation.item.done"]
    assert [event["item"]["role"] for event in done] == ["user", "assistant"]
    assert [event["previous_item_id"] for event in done] == [None, done[0]["item"]["id"]]


@pytest.mark.parametrize(("type", "law"), [("audio/pcmu", "mulaw"), ("audio/pcma", "alaw")])
def test_realtime_g711(client: Client, server: RunningServer, type: str, law: Any) -> None:
    format = RawFormat(8000, law)
    data = format.encode(question("name", 8000))
    audio = {"input": {"turn_detection": None, "format": {"type": type}}, "output": {"format": {"type": type}}}
    assert client.update(audio=audio)["audio"]["input"]["format"] == {"type": type}
    events = push_to_talk(client, np.frombuffer(data, np.uint8))
    expected = server.omni.reply(format.decode(data), sample_rate=8000)
    assert expected.audio is not None
    assert joined(events, "response.output_audio_transcript") == expected.text
    found = format.decode(audio_bytes(events)) / 32768
    wanted = np.clip(soxr.resample(expected.audio, expected.sample_rate, 8000), -0.98, 0.98)
    assert len(found) == len(wanted)
    assert np.abs(found - wanted).max() < 0.05


def test_realtime_g711_server_vad(client: Client) -> None:
    format = RawFormat(8000, "mulaw")
    client.update(audio={"input": {"format": {"type": "audio/pcmu"}}})
    client.append(format.encode(np.concatenate([silence(0.5, 8000), question("day", 8000), silence(1, 8000)])), 160)
    events = client.until("response.done")
    started, stopped = (
        next(event for event in events if event["type"] == f"input_audio_buffer.speech_{name}")
        for name in ("started", "stopped")
    )
    seconds = len(question("day", 8000)) / 8000
    assert abs(started["audio_start_ms"] + 300 - 500) <= 200
    assert abs(stopped["audio_end_ms"] - 500 - (500 + seconds * 1000)) <= 250
    assert started["item_id"] == stopped["item_id"]
    assert events[-1]["response"]["status"] in ("completed", "incomplete")


@pytest.mark.parametrize(("create", "transcribe"), [(False, True), (True, False)])
def test_realtime_vad_create_response(client: Client, create: bool, transcribe: bool) -> None:
    detection = {"type": "server_vad", "silence_duration_ms": 300, "create_response": create}
    audio = {"turn_detection": detection, "transcription": {"model": "whisper-1"} if transcribe else None}
    client.update(audio={"input": audio})
    client.append(np.concatenate([question("name"), silence(1)]).tobytes())
    client.last("conversation.item.done")
    if transcribe:
        events = client.until(f"{TRANSCRIPTION}.completed")
        assert joined(events, TRANSCRIPTION) == events[-1]["transcript"]
        assert {event["type"] for event in events} == {f"{TRANSCRIPTION}.delta", f"{TRANSCRIPTION}.completed"}
    else:
        assert client.receive()["type"] == "response.created"


def ask_text(client: Client, text: str, **response: Any) -> list[Event]:
    client.add_text(text)
    client.send("response.create", response=response)
    return client.until("response.done")


def test_realtime_remembers(client: Client, server: RunningServer) -> None:
    """System text and past turns, spoken ones by their transcripts, are before the question."""
    client.update(instructions="Be brief.", audio={"input": {"turn_detection": None}}, max_output_tokens=10)
    samples, omni = question("name"), server.omni
    first = joined(push_to_talk(client, samples), "response.output_audio_transcript")
    assert first == omni.generate(Request((RATE, samples), system="Be brief."), max_steps=10).text
    # The transcript is not told to a client that has not asked for it.
    turns = [Turn(omni.transcribe(samples, sample_rate=RATE, truncate=True).text, first)]
    second = joined(ask_text(client, "hello"), "response.output_audio_transcript")
    assert second == omni.generate(Request(text="hello", system="Be brief.", history=turns), max_steps=10).text
    turns.append(Turn("hello", second))
    client.add_text("Speak slowly.", role="system")
    found = joined(ask_text(client, "hi", output_modalities=["text"]), "response.output_text")
    request = Request(text="hi", task="T1T2", system="Be brief. Speak slowly.", history=turns)
    assert found == omni.generate(request, max_steps=10).text


def test_realtime_prefills_only_what_is_new(client: Client, server: RunningServer) -> None:
    """The conversation is prefilled when an answer has ended, so that a turn prefills its question alone."""
    system, samples, omni = "Prefill what is new.", question("name"), server.omni
    client.update(instructions=system, audio={"input": {"turn_detection": None}}, max_output_tokens=6)
    answer = joined(push_to_talk(client, samples), "response.output_audio_transcript")
    turns = [Turn(omni.transcribe(samples, sample_rate=RATE, truncate=True).text, answer)]
    prefixes, history = server.service.engine._engine.prefixes, omni.prepare_history(system, turns)

    def known() -> int:
        found = prefixes.find(history)
        return 0 if found is None else found.length

    eventually(lambda: known() == len(history))
    events = ask_text(client, "hello")
    usage, found = events[-1]["response"]["usage"], joined(events, "response.output_audio_transcript")
    request = omni.prepare(Request(text="hello", system=system, history=turns))
    assert usage["input_tokens"] == len(request.prompt)
    assert usage["input_token_details"]["cached_tokens"] == len(history)
    expected = omni.generate(Request(text="hello", system=system, history=turns), max_steps=6)
    assert found == expected.text
    # So it does after a cut, by which the history has changed.
    item_id = push_to_talk(client, samples)[-1]["response"]["output"][0]["id"]
    client.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=0)
    client.last("conversation.item.truncated")
    history = omni.prepare_history(system, [*turns, Turn("hello", found), Turn(turns[0].question)])
    eventually(lambda: known() == len(history))


def test_realtime_remembers_what_was_played(client: Client, server: RunningServer) -> None:
    """An answer that the client cut is in the history up to the cut."""
    client.update(output_modalities=["audio"], max_output_tokens=40)
    item = client.add_text("one two three four five six", role="assistant")
    assert item["content"] == [{"type": "output_text", "text": "one two three four five six"}]
    events = ask_text(client, "hello")
    (spoken,) = events[-1]["response"]["output"]
    client.send("conversation.item.truncate", item_id=spoken["id"], content_index=0, audio_end_ms=0)
    client.last("conversation.item.truncated")
    found = joined(ask_text(client, "hi"), "response.output_audio_transcript")
    turns = [Turn("", "one two three four five six"), Turn("hello")]
    assert found == server.omni.generate(Request(text="hi", history=turns), max_steps=40).text


def test_realtime_without_memory(client: Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was not trained on conversations answers each turn on its own."""
    monkeypatch.setattr(Service, "remembers", False)
    client.update(instructions="Be brief.", output_modalities=["text"], max_output_tokens=10)
    for text in ("hello", "hi"):
        found = joined(ask_text(client, text), "response.output_text")
        assert found == server.omni.answer(text=text, max_steps=10).text


def test_realtime_speech_interrupts_and_truncates(client: Client, server: RunningServer) -> None:
    """At once, and what was not played by then is cut from the conversation."""
    client.update(output_modalities=["audio"])
    client.add_text("hello")
    client.send("response.create")
    events = client.until("response.done")
    sent = len(audio_bytes(events)) / 2 / RATE * 1000
    item_id = events[-1]["response"]["output"][0]["id"]
    time.sleep(0.2)
    client.append(np.concatenate([silence(0.2), question("name"), silence(1)]).tobytes())
    events = client.until("conversation.item.truncated")
    assert types_of(events) == ["input_audio_buffer.speech_started", "conversation.item.truncated"]
    truncated = events[-1]
    assert (truncated["item_id"], truncated["content_index"]) == (item_id, 0)
    assert 150 <= truncated["audio_end_ms"] < sent
    client.until("response.done")
    # The client knows better what was played.
    client.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=100)
    assert client.last("conversation.item.truncated")["audio_end_ms"] == 100
    client.send("conversation.item.retrieve", item_id=item_id)
    (part,) = client.last("conversation.item.retrieved")["item"]["content"]
    assert len(base64.b64decode(part["audio"])) == 100 * RATE // 1000 * 2
    # An answer that was played to its end is not cut.
    client.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=int(sent) + 100)
    assert client.last("error")["error"]["param"] == "audio_end_ms"


def test_realtime_speech_cancels_the_answer(client: Client, server: RunningServer) -> None:
    gate = HeldBatch(server)
    with gate:
        client.add_text("hello")
        client.send("response.create")
        gate.wait()
        client.append(np.concatenate([silence(0.2), question("name"), silence(1)]).tobytes())
        done = client.last("response.done")["response"]
        assert (done["status"], done["status_details"]) == (
            "cancelled",
            {"type": "cancelled", "reason": "turn_detected"},
        )
    assert client.last("response.done")["response"]["status"] in ("completed", "incomplete")


def test_realtime_without_interruption(client: Client, server: RunningServer) -> None:
    """The answer goes on, and the next one cannot begin."""
    client.update(audio={"input": {"turn_detection": {"type": "server_vad", "interrupt_response": False}}})
    gate = HeldBatch(server)
    with gate:
        client.add_text("hello")
        client.send("response.create")
        gate.wait()
        client.append(np.concatenate([silence(0.2), question("name"), silence(1)]).tobytes())
        assert client.last("error")["error"]["code"] == "conversation_already_has_active_response"
    assert client.last("response.done")["response"]["status"] in ("completed", "incomplete")


def test_realtime_idle_timeout(client: Client) -> None:
    """A user who says nothing after an answer is told once that the server waits."""
    detection = {"type": "server_vad", "idle_timeout_ms": 200}
    client.update(audio={"input": {"turn_detection": detection}}, max_output_tokens=12)
    client.append(np.concatenate([question("name"), silence(1)]).tobytes())
    first = client.last("response.done")
    client.append(silence(0.5).tobytes())
    events = client.until("response.done")
    triggered = next(event for event in events if event["type"] == "input_audio_buffer.timeout_triggered")
    committed = next(event for event in events if event["type"] == "input_audio_buffer.committed")
    assert triggered["item_id"] == committed["item_id"]
    assert committed["previous_item_id"] == first["response"]["output"][0]["id"]
    assert triggered["audio_end_ms"] >= triggered["audio_start_ms"]


def test_realtime_silence_is_answered_with_nothing(
    client: Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model that looks for speech. The client, which sends nothing while it is silent, gets no error."""
    monkeypatch.setattr(server.omni, "config", replace(server.omni.config, audio=AudioConfig(find_speech=True)))
    detection = {"type": "server_vad", "idle_timeout_ms": 200}
    audio = {"input": {"turn_detection": detection, "transcription": {"model": "small"}}}
    client.update(audio=audio, max_output_tokens=4)
    assert ask_text(client, "hello")[-1]["response"]["output"]
    events = client.until("response.done")
    assert types_of(events)[:2] == ["input_audio_buffer.timeout_triggered", "input_audio_buffer.committed"]
    response = events[-1]["response"]
    assert (response["status"], response["status_details"], response["output"]) == ("completed", None, [])
    transcript = next((event for event in events if event["type"] == f"{TRANSCRIPTION}.completed"), None)
    assert (transcript or client.last(f"{TRANSCRIPTION}.completed"))["transcript"] == ""
    # The user is not asked again and again, and an answer that is asked for says why there is none.
    time.sleep(0.5)
    client.send("response.create")
    events = client.until("response.done")
    assert types_of(events) == ["response.created", "response.done"]
    assert events[-1]["response"]["status_details"]["error"]["code"] == "no_speech"


def test_realtime_noise_is_answered_with_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn in which the model finds no speech."""

    def find_none(*_: object) -> Any:
        raise NoSpeechError("recording: expected speech, found none", seconds=1.0)

    monkeypatch.setattr(Omni, "_spans_to_hear", find_none)
    client.append(np.concatenate([question("name"), silence(1)]).tobytes())
    events = client.until("response.done")
    assert events[-1]["response"]["status"] == "completed"
    assert not [event for event in events if event["type"] in ("error", "response.output_item.added")]


def test_realtime_refuses_recordings_that_are_too_long(client: Client, server: RunningServer) -> None:
    client.update(audio={"input": {"turn_detection": None}})
    most = server.service.max_samples(None) / 16_000
    client.append(silence(most + 0.5).tobytes(), 48_000)
    events = client.until("error")
    assert types_of(events) == ["input_audio_buffer.cleared", "error"]
    assert events[-1]["error"]["code"] == "audio_too_long"
    assert push_to_talk(client, question("name"))[-1]["response"]["status"] in ("completed", "incomplete")


# Responses


def test_realtime_text_answers(client: Client, server: RunningServer) -> None:
    client.update(output_modalities=["text"])
    client.add_text("hello")
    client.send("response.create", response={"metadata": {"topic": "greeting"}})
    events = client.until("response.done")
    assert joined(events, "response.output_text") == server.omni.answer(text="hello").text
    assert events[-1]["response"]["metadata"] == {"topic": "greeting"}
    assert not audio_bytes(events)
    client.send("response.create", response={"output_modalities": ["audio"]})
    events = client.until("response.done")
    assert_same_audio(pcm(audio_bytes(events)), server.omni.reply(text="hello").audio)


def test_realtime_out_of_band_response(client: Client, server: RunningServer) -> None:
    """With input of its own, next to the conversation, which does not change."""
    item_id = client.add_text("hello", id="first")["id"]
    for given in (
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        [{"type": "item_reference", "id": item_id}],
    ):
        client.send("response.create", response={"conversation": "none", "input": given, "output_modalities": ["text"]})
        events = client.until("response.done")
        assert joined(events, "response.output_text") == server.omni.answer(text="hello").text
        assert events[-1]["response"]["conversation_id"] is None
        assert "conversation.item.added" not in types_of(events)
    # Without a message of the user, the instructions are answered.
    client.send("response.create", response={"input": [], "instructions": "greet", "output_modalities": ["text"]})
    events = client.until("response.done")
    assert joined(events, "response.output_text") == server.omni.answer(text="greet").text


def test_realtime_cancel(client: Client, server: RunningServer) -> None:
    cancelled = {"endpoint": "/v1/realtime", "outcome": "cancelled"}
    before = server.metric("omni_requests_total", **cancelled)
    assert client.error("response.cancel")["code"] == "response_cancel_not_active"
    gate = HeldBatch(server)
    with gate:
        client.add_text("hello")
        client.send("response.create")
        gate.wait()
        assert client.last("response.created")["response"]["status"] == "in_progress"
        client.send("response.create")
        assert client.last("error")["error"]["code"] == "conversation_already_has_active_response"
        client.send("response.cancel")
        done = client.last("response.done")["response"]
        assert done["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    assert server.metric("omni_requests_total", **cancelled) == before + 1
    # The next one answers as if there had been none.
    client.send("response.create")
    expected = server.omni.reply(text="hello")
    assert_same_audio(pcm(audio_bytes(client.until("response.done"))), expected.audio)


def test_realtime_cancel_before_it_begins(client: Client, server: RunningServer) -> None:
    cancelled = {"endpoint": "/v1/realtime", "outcome": "cancelled"}
    before = server.metric("omni_requests_total", **cancelled)
    client.add_text("hello")
    # Held, so that the whole answer does not come before the second event is read.
    with HeldBatch(server):
        client.send("response.create")
        client.send("response.cancel")
        events = client.until("response.done")
    assert (events[0]["type"], events[-1]["response"]["status"]) == ("response.created", "cancelled")
    assert server.metric("omni_requests_total", **cancelled) == before + 1


def test_realtime_failed_response(client: Client, server: RunningServer) -> None:
    """A question that cannot be answered fails alone."""
    refused = {"endpoint": "/v1/realtime", "outcome": "refused"}
    before = server.metric("omni_requests_total", **refused)
    client.send("response.create")
    done = client.last("response.done")["response"]
    assert done["status"] == "failed"
    assert "expected a message of the user" in done["status_details"]["error"]["message"]
    assert server.metric("omni_requests_total", **refused) == before + 1


def test_realtime_waits_until_the_programs_are_compiled(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()
    monkeypatch.setattr(Engine, "warm_up", lambda self, stop: compiled.wait(60))
    with run_server(omni, ready=False) as server, Client(server.url) as client:
        try:
            client.update(output_modalities=["text"])
            client.add_text("hello")
            client.send("response.create")
            assert client.last("response.created")["response"]["status"] == "in_progress"
            with pytest.raises(TimeoutError):
                client.socket.recv(timeout=0.5)
        finally:
            compiled.set()
        assert joined(client.until("response.done"), "response.output_text") == omni.answer(text="hello").text


def test_realtime_speed(client: Client, server: RunningServer) -> None:
    client.update(audio={"output": {"speed": 1.5}})
    client.add_text("hello")
    client.send("response.create")
    found = len(audio_bytes(client.until("response.done"))) / 2
    expected = server.omni.reply(text="hello").audio
    assert expected is not None
    assert found == pytest.approx(len(expected) / 1.5, rel=0.1)


# Items


def test_realtime_items(client: Client) -> None:
    ids = [client.add_text(text, id=text)["id"] for text in ("first", "third")]
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "second"}]}
    client.send("conversation.item.create", previous_item_id=ids[0], item=item)
    second = client.last("conversation.item.done")
    assert second["previous_item_id"] == "first"
    client.send("conversation.item.create", previous_item_id="root", item=item | {"id": "zero"})
    assert client.last("conversation.item.done")["previous_item_id"] is None
    client.send("conversation.item.delete", item_id="first")
    assert client.last("conversation.item.deleted")["item_id"] == "first"
    for action in ("delete", "retrieve", "truncate"):
        fields = {"content_index": 0, "audio_end_ms": 0} if action == "truncate" else {}
        error = client.error(f"conversation.item.{action}", item_id="first", **fields)
        assert (error["code"], error["param"]) == (f"item_{action}_invalid_item_id", "item_id")
    samples = question("name")
    part = {"type": "input_audio", "audio": base64.b64encode(samples.tobytes()).decode()}
    client.send("conversation.item.create", item={"type": "message", "role": "user", "content": [part]})
    spoken = client.last("conversation.item.done")["item"]
    assert spoken["content"] == [{"type": "input_audio", "transcript": None}]
    client.send("conversation.item.retrieve", item_id=spoken["id"])
    found = client.last("conversation.item.retrieved")["item"]["content"][0]["audio"]
    assert base64.b64decode(found) == samples.tobytes()


def test_realtime_large_items_do_not_hold_the_others(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item of megabytes is rendered in a thread, and sent in pieces."""
    data, run_large = np.random.default_rng(0).bytes(7 << 20), Service.run_large
    longest, done, beating = [0.0], threading.Event(), set()

    async def beat() -> None:
        # What the thread of the loop does between two turns of this task.
        before = time.thread_time()
        while not done.is_set():
            await asyncio.sleep(0)
            now = time.thread_time()
            longest[0], before = max(longest[0], now - before), now

    async def run(self: Service, work: Callable[[], Any]) -> Any:
        beating.add(asyncio.create_task(beat()))
        return await run_large(self, work)

    monkeypatch.setattr(Service, "run_large", run)
    with Client(server.url, max_size=None) as client:
        client.last("conversation.created")
        part = {"type": "input_audio", "audio": base64.b64encode(data).decode()}
        client.send("conversation.item.create", **message("user", part))
        item_id = client.last("conversation.item.done")["item"]["id"]
        client.send("conversation.item.retrieve", item_id=item_id)
        found = client.last("conversation.item.retrieved")["item"]["content"][0]["audio"]
        # Nothing else comes between the frames.
        client.send("conversation.item.retrieve", item_id=item_id)
        client.add_text("hello")
    done.set()
    assert base64.b64decode(found) == data
    assert 0 < longest[0] < 0.05


def message(role: str, *content: Any) -> dict[str, Any]:
    return {"item": {"type": "message", "role": role, "content": list(content)}}


@pytest.mark.parametrize(
    ("type", "fields", "param", "code"),
    [
        ("sing", {}, "type", "invalid_value"),
        ("input_audio_buffer.append", {}, "audio", "missing_required_parameter"),
        ("input_audio_buffer.append", {"audio": "!"}, "audio", "invalid_value"),
        ("input_audio_buffer.append", {"audio": 1}, "audio", "invalid_value"),
        ("input_audio_buffer.commit", {}, None, "input_audio_buffer_commit_empty"),
        ("conversation.item.create", message("user"), "item.content", "invalid_value"),
        (
            "conversation.item.create",
            message("system", {"type": "input_audio", "audio": ""}),
            "item.content.0.type",
            "invalid_value",
        ),
        (
            "conversation.item.create",
            message("user", {"type": "input_text"}),
            "item.content.0.text",
            "missing_required_parameter",
        ),
        (
            "conversation.item.create",
            message("user", {"type": "input_image", "image_url": "data:"}),
            "item.content.0.type",
            "invalid_value",
        ),
        ("conversation.item.create", {"item": {"type": "function_call_output"}}, "item.type", "invalid_value"),
        (
            "conversation.item.create",
            {**message("user", {"type": "input_text", "text": "a"}), "previous_item_id": "none"},
            "previous_item_id",
            "item_create_invalid_previous_item_id",
        ),
        ("session.update", {"session": {"audio": {"output": {"speed": 9}}}}, "session.audio.output.speed", None),
        ("session.update", {"session": {"output_modalities": ["text", "audio"]}}, "session.output_modalities", None),
        ("session.update", {"session": {"tools": [{"type": "function"}]}}, "session.tools", "unsupported"),
        ("session.update", {"session": {"model": "other"}}, "session.model", "model_not_found"),
        ("response.create", {"response": {"max_output_tokens": 0}}, "response.max_output_tokens", None),
        ("response.create", {"response": {"input": [{"type": "item_reference", "id": "x"}]}}, "item_id", None),
    ],
)
def test_realtime_errors(client: Client, type: str, fields: Event, param: str | None, code: str | None) -> None:
    """The connection stays open, and the settings as they were."""
    error = client.error(type, **fields)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["code"] == (code or error["code"])
    assert client.update()["audio"]["output"]["speed"] == 1.0


@pytest.mark.parametrize("text", ["{", "[]", '"\\ud800"', '{"type": NaN}', "[" * 10_000])
def test_realtime_invalid_messages(client: Client, text: str) -> None:
    client.socket.send(text)
    assert client.receive()["error"]["code"] == "invalid_json"
    client.socket.send(text.encode())
    assert client.receive()["error"]["code"] == "invalid_value"


# Sessions


def test_realtime_transcription_session(client: Client, server: RunningServer) -> None:
    client.send("session.update", session={"type": "transcription"})
    assert client.last("session.updated")["session"]["type"] == "transcription"
    samples = question("name")
    client.append(np.concatenate([samples, silence(1)]).tobytes())
    events = client.until(f"{TRANSCRIPTION}.completed")
    assert not [event for event in events if event["type"].startswith("response.")]
    client.send("conversation.item.retrieve", item_id=events[-1]["item_id"])
    (part,) = client.last("conversation.item.retrieved")["item"]["content"]
    found = pcm(base64.b64decode(part["audio"]))
    assert part["transcript"] == server.omni.transcribe(found, sample_rate=RATE).text
    assert "no responses" in client.error("response.create")["message"]


def test_realtime_transcription_intent(server: RunningServer) -> None:
    with Client(server.url, query="intent=transcription") as client:
        assert client.last("session.created")["session"]["type"] == "transcription"


@pytest.mark.parametrize("header", [True, False])
def test_realtime_beta(server: RunningServer, header: bool) -> None:
    """Older clients get the names and shapes of the beta: from the start, or once they have sent theirs."""
    with Client(server.url, beta=header) as client:
        client.last("conversation.created")
        client.beta = True
        session = client.update(
            modalities=["text", "audio"], voice="echo", input_audio_format="g711_ulaw", turn_detection=None
        )
        assert (session["modalities"], session["voice"], session["input_audio_format"], session["turn_detection"]) == (
            ["text", "audio"],
            "echo",
            "g711_ulaw",
            None,
        )
        data = RawFormat(8000, "mulaw").encode(question("name", 8000))
        events = push_to_talk(client, np.frombuffer(data, np.uint8))
        assert types_of(events) == [
            "input_audio_buffer.committed",
            "conversation.item.created",
            "response.created",
            "response.output_item.added",
            "response.content_part.added",
            "response.audio_transcript.delta",
            "response.audio.delta",
            "response.audio.done",
            "response.audio_transcript.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.done",
        ]
        expected = server.omni.reply(RawFormat(8000, "mulaw").decode(data), sample_rate=8000)
        assert_same_audio(pcm(audio_bytes(events, "response.audio")), expected.audio)
        assert events[-1]["response"]["output"][0]["content"] == [{"type": "audio", "transcript": expected.text}]
        assert events[-1]["response"]["modalities"] == ["text", "audio"]
        client.send("transcription_session.update", session={"input_audio_format": "pcm16"})
        assert client.last("transcription_session.updated")["session"]["input_audio_format"] == "pcm16"


def test_realtime_semantic_vad_and_unknown_fields(client: Client) -> None:
    """What other servers know is accepted; the session says what is in effect."""
    session = client.update(
        audio={
            "input": {
                "noise_reduction": {"type": "near_field"},
                "turn_detection": {"type": "semantic_vad", "eagerness": "high"},
            },
            "output": {"voice": "marin"},
        },
        tracing="auto",
        tools=[],
        tool_choice="auto",
        instructions="Be brief.",
    )
    assert session["audio"]["input"]["noise_reduction"] is None
    assert session["audio"]["input"]["turn_detection"] == {
        "type": "semantic_vad", "eagerness": "high", "create_response": True, "interrupt_response": True,
    }  # fmt: skip
    assert (session["audio"]["output"]["voice"], session["instructions"]) == ("marin", "Be brief.")


@pytest.mark.parametrize("query", ["model=other", "model="])
def test_realtime_model(server: RunningServer, query: str) -> None:
    with Client(server.url, query=query) as client:
        if query == "model=":
            assert client.receive()["session"]["model"] == "small"
            return
        assert client.receive()["error"]["code"] == "model_not_found"
        with pytest.raises(ConnectionClosed):
            client.receive()


def test_realtime_refuses_other_origins(server: RunningServer) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        Client(server.url, origin="http://elsewhere.example")
    with Client(server.url, origin=server.url) as client:
        assert client.receive()["type"] == "session.created"


def test_realtime_allowed_origins(omni: Omni) -> None:
    with run_server(omni, ready=False, allowed_origins=("https://app.example",)) as server:
        for origin in ("https://app.example", server.url):
            with Client(server.url, origin=origin) as client:
                assert client.receive()["type"] == "session.created"
        with pytest.raises(InvalidStatus, match="403"):
            Client(server.url, origin="https://app.example.org")


@openai_client_warns
def test_realtime_keys_and_client_secrets(omni: Omni) -> None:
    with run_server(omni, api_keys=("right",), max_batch_size=1) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            with pytest.raises(InvalidStatus, match="401"):
                Client(server.url, additional_headers=headers)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0) as openai_client:
            with openai_client.realtime.connect(model="small") as connection:
                assert connection.recv().type == "session.created"
            secret = openai_client.realtime.client_secrets.create(
                expires_after={"anchor": "created_at", "seconds": 60},
                session={"type": "realtime", "instructions": "Be brief.", "output_modalities": ["text"]},
            )
            beta = openai_client.beta.realtime.sessions.create(voice="echo")
            with pytest.raises(openai.BadRequestError, match="seconds"):
                openai_client.realtime.client_secrets.create(expires_after={"anchor": "created_at", "seconds": 1})
        assert secret.expires_at > time.time() + 50
        assert secret.session.instructions == "Be brief."
        assert (beta.voice, beta.client_secret.value[:3]) == ("echo", "ek_")
        # A browser has no headers.
        protocols = ["realtime", f"openai-insecure-api-key.{secret.value}"]
        with Client(server.url, subprotocols=protocols) as client:
            assert client.receive()["session"]["instructions"] == "Be brief."
            assert client.socket.subprotocol == "realtime"
        with (
            pytest.raises(openai.AuthenticationError),
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret.value, max_retries=0) as openai_client,
        ):
            openai_client.models.list()


def test_clients_are_counted_by_address_where_there_is_one_key(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those with a client secret that another one asked for."""
    create = ClientSecrets.create
    # As if a backend elsewhere asked for them.
    monkeypatch.setattr(ClientSecrets, "create", lambda self, client, *rest: create(self, "elsewhere", *rest))
    with run_server(omni, ready=False, api_keys=("one",), max_batch_size=1) as server:
        status, secret, _ = server.call(CLIENT_SECRETS, {}, Authorization="Bearer one")
        assert status == 200
        connections = server.server.config.open_connections  # type: ignore[attr-defined]
        before = connections.left("elsewhere")
        bearer = {"Authorization": f"Bearer {json.loads(secret)['value']}"}
        with Client(server.url, additional_headers=bearer) as client:
            client.last("conversation.created")
            assert connections.left("elsewhere") == before


def test_clients_are_counted_by_key(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are several keys: requests, sessions, what they hold and how many there are."""
    prepared_for, prepare = [], Service.prepare

    async def note_client(self: Service, *, client: str | None, **options: Any) -> Any:
        prepared_for.append(client)
        return await prepare(self, client=client, **options)

    monkeypatch.setattr(Service, "prepare", note_client)
    with run_server(omni, ready=False, api_keys=("one", "two"), max_batch_size=1, max_connections=8) as server:
        eventually(lambda: server.service.ready, 120)
        one, two = (server.service.client_of(("127.0.0.1", 1), key) for key in ("one", "two"))
        assert len({one, two, server.service.client_of(("127.0.0.1", 1))}) == 3
        bearer = {"Authorization": "Bearer one"}
        body = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 2}
        assert server.call("/v1/chat/completions", body, **bearer)[0] == 200
        status, secret, _ = server.call(CLIENT_SECRETS, {}, **bearer)
        assert (status, prepared_for) == (200, [one])
        connections = server.server.config.open_connections  # type: ignore[attr-defined]
        sessions = [json.loads(secret)["value"], "one", "two"]
        with contextlib.ExitStack() as closing:
            first, second, third = (
                closing.enter_context(Client(server.url, additional_headers={"Authorization": f"Bearer {key}"}))
                for key in sessions
            )
            for client in (first, second, third):
                client.last("conversation.created")
            assert (connections.left(one), connections.left(two)) == (0, 1)
            first.add_text("hello")
            # It is counted after the event is answered.
            eventually(lambda: server.service.bodies.left(one) < server.service.bodies.left(two))
            # A quarter of all connections are those of one key, wherever they come from.
            with (
                pytest.raises(ConnectionClosed, match="too many connections"),
                Client(server.url, additional_headers=bearer) as fourth,
            ):
                fourth.receive()
            third.add_text("hello")
        eventually(lambda: server.service.bodies.left(one) == server.service.bodies.left(two))
        eventually(lambda: connections.left(one) == connections.left(two) == 2)


# Clients that vanish


def test_realtime_disconnect_frees_all(server: RunningServer) -> None:
    gate = HeldBatch(server)
    with gate, Client(server.url) as client:
        client.update(audio={"input": {"turn_detection": {"type": "server_vad", "idle_timeout_ms": 60_000}}})
        client.add_text("hello")
        client.send("response.create")
        gate.wait()
        client.socket.socket.close()
        gate.release()
        eventually(lambda: server.metric("omni_realtime_sessions") == 0)
    server.wait_until_idle()
    assert server.service.engine.num_active == 0


def test_realtime_half_open_socket_is_closed(omni: Omni) -> None:
    """A client that answers no ping has vanished, though its connection was never closed."""
    with run_server(omni, idle_timeout=0.5, max_batch_size=1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with sockets.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(
                f"GET /v1/realtime?model=small HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            assert raw.recv(12) == b"HTTP/1.1 101"
            eventually(lambda: server.metric("omni_realtime_sessions") == 1)
            eventually(lambda: server.metric("omni_realtime_sessions") == 0)


# Clients that attack


BETA_SESSIONS = "/v1/realtime/sessions"
CLIENT_SECRETS = "/v1/realtime/client_secrets"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (BETA_SESSIONS, {"client_secret": {"expires_after": {"seconds": 1}}}, "client_secret.expires_after.seconds"),
        (BETA_SESSIONS, {"client_secret": "now"}, "client_secret"),
        (CLIENT_SECRETS, b'{"session": {"audio": {"output": {"voice": "\\ud800"}}}}', "hex escape"),
        (CLIENT_SECRETS, {"session": {"audio": {"output": {"voice": "v" * 513}}}}, "at most 512 characters"),
        (CLIENT_SECRETS, {"session": {"audio": {"output": {"voice": {"id": {}}}}}}, "voice"),
        ("/v1/responses", b'{"model": "small", "input": "hi", "instructions": "\\ud800"}', "hex escape"),
    ],
)
def test_bodies_that_cannot_be_answered_are_refused(
    server: RunningServer, path: str, body: Event | bytes, message: str
) -> None:
    status, found = server.refused(path, body)
    assert status == 400
    assert message in found


LONG: list[tuple[str, Event]] = [
    ("session.update", {"session": {"audio": {"output": {"voice": "v" * 100_000}}}}),
    ("session.update", {"session": {"audio": {"input": {"transcription": {"prompt": "p" * 100_000}}}}}),
    ("session.update", {"session": {"audio": {"input": {"turn_detection": {"idle_timeout_ms": 10**400}}}}}),
    ("response.create", {"response": {"input": [1] * 19_000}}),
    ("response.create", {"response": {"metadata": {"a": "m" * 1000}}}),
    ("conversation.item.create", {"item": {"type": "message", "role": "user", "content": [{"type": "x"}] * 3000}}),
    (
        "conversation.item.create",
        {"item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a" * 100_000}]}},
    ),
    ("conversation.item.delete", {"item_id": "i" * 100_000}),
]


@pytest.mark.parametrize(("type", "fields"), LONG)
def test_realtime_refuses_what_would_be_kept_and_repeated(client: Client, type: str, fields: Event) -> None:
    assert len(client.error(type, **fields)["message"]) < 500
    client.send(type, event_id="e" * 100_000, **fields)
    assert client.receive()["error"]["event_id"] is None


def test_realtime_recordings_of_responses_in_progress_are_counted(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording is in memory until it is answered, however many wait for their turn to be decoded."""

    async def wait(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(Service, "prepare", wait)
    recording = message("user", {"type": "input_audio", "audio": "A" * 70_000})
    with run_server(omni, ready=False, max_body_bytes=100_000) as server, contextlib.ExitStack() as closing:
        first, second, third = (closing.enter_context(Client(server.url)) for _ in range(3))

        def left() -> int:
            return server.service.bodies.left("127.0.0.1")

        for client in (first, second):
            client.send("response.create", response={"conversation": "none", "input": [recording["item"]]})
            client.last("response.created")
        # It stays so, as they wait.
        time.sleep(0.2)
        assert left() < 100_000
        third.send("response.create", response={"conversation": "none", "input": [recording["item"]]})
        assert third.last("error")["error"]["code"] == "busy"
        for client in (first, second):
            client.socket.close()
        eventually(lambda: left() == 200_000)
        # One that was deleted from the conversation is held until it is answered, too.
        third.send("conversation.item.create", **recording)
        item_id = third.last("conversation.item.done")["item"]["id"]
        third.send("response.create")
        third.send("conversation.item.delete", item_id=item_id)
        third.last("conversation.item.deleted")
        time.sleep(0.2)
        assert left() < 150_000
        third.send("response.cancel")
        third.last("response.done")
        eventually(lambda: left() > 190_000)
