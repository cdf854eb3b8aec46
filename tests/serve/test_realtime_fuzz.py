"""Streams of random events against `/v1/realtime`: nothing breaks, every answer ends, nothing is left behind."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
from collections import Counter
from typing import Any

import pytest
from websockets.asyncio.client import connect

from tests.serve.conftest import RunningServer, eventually
from tests.serve.realtime_client import Event, check_event, question

STREAMS, CLIENTS = 2000, 16
TEXTS = ("hello", "", "a" * 3000, "Wie geht's? \N{GRINNING FACE}", "\x00")
IDS = ("a", "b", "root", "", "x" * 65)


class Fuzzer:
    """Makes the events of one stream."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.beta = self.random.random() < 0.3
        speech = question("name")[:16_000].tobytes()
        self.sounds = (b"", b"\1", bytes(9600), speech, speech + bytes(24_000), self.random.randbytes(2000))

    def maybe(self, **fields: Any) -> dict[str, Any]:
        """Some of the fields."""
        return {name: value for name, value in fields.items() if self.random.random() < 0.5}

    def audio(self) -> str:
        return base64.b64encode(self.random.choice(self.sounds)).decode()

    def detection(self) -> Any:
        pick = self.random.choice
        # OpenAI's package has none for the beta.
        idle = None if self.beta else pick([None, 20])
        return pick([
            None,
            {"type": "server_vad", "silence_duration_ms": pick([0, 200, 500]), "idle_timeout_ms": idle},
            {"type": "server_vad", **self.maybe(threshold=0.3, create_response=False, interrupt_response=False)},
            {"type": "semantic_vad", "eagerness": pick(["low", "high"])},
        ])  # fmt: skip

    def session(self) -> dict[str, Any]:
        pick: Any = self.random.choice
        if self.beta:
            format = pick(["pcm16", "g711_ulaw", "g711_alaw", "mp3"])
            return self.maybe(
                modalities=pick([["text"], ["audio", "text"], []]),
                input_audio_format=format,
                output_audio_format=format,
                turn_detection=self.detection(),
                input_audio_transcription=pick([None, {"model": "whisper-1"}]),
                max_response_output_tokens=pick([1, 4]),
                temperature=pick([0.0, 0.8, 9]),
            )
        kind = {"type": pick(["audio/pcm", "audio/pcmu", "audio/pcma"])}
        return {"type": pick(["realtime", "realtime", "transcription"])} | self.maybe(
            output_modalities=pick([["text"], ["audio"], ["text", "audio"]]),
            instructions=pick(TEXTS),
            max_output_tokens=pick([1, 4]),
            audio={
                **self.maybe(output={"format": kind, "speed": pick([0.5, 1.0, 1.5, 3])}),
                "input": self.maybe(
                    format=kind, turn_detection=self.detection(), transcription=pick([None, {"model": "whisper-1"}])
                ),
            },
        )

    def item(self) -> dict[str, Any]:
        pick = self.random.choice
        contents = [
            {"type": "input_text", "text": pick(TEXTS)},
            {"type": "input_audio", "audio": self.audio()},
            {"type": "output_text", "text": pick(TEXTS)},
            {"type": "output_audio", "transcript": pick(TEXTS)},
        ]
        role = pick(["user", "user", "assistant", "system"])
        return {"type": "message", "role": role, "content": [pick(contents)], **self.maybe(id=pick(IDS))}

    def event(self) -> dict[str, Any]:
        pick = self.random.choice
        return pick([
            lambda: {"type": "input_audio_buffer.append", "audio": self.audio()},
            lambda: {"type": "input_audio_buffer.append", "audio": self.audio()},
            lambda: {"type": "input_audio_buffer.commit"},
            lambda: {"type": "input_audio_buffer.clear"},
            lambda: {"type": "conversation.item.create", "item": self.item(), **self.maybe(previous_item_id=pick(IDS))},
            lambda: {"type": f"conversation.item.{pick(['delete', 'retrieve'])}", "item_id": pick(IDS)},
            lambda: {
                "type": "conversation.item.truncate",
                "item_id": pick(IDS), "content_index": pick([0, 1]), "audio_end_ms": pick([0, 10**9]),
            },
            lambda: {"type": "response.create"},
            lambda: {
                "type": "response.create",
                "response": self.maybe(conversation="none", input=[self.item()], instructions=pick(TEXTS)),
            },
            lambda: {"type": "response.cancel"},
            lambda: {"type": "session.update", "session": self.session()},
        ])()  # fmt: skip

    def damaged(self, value: Any) -> Any:
        """A value with something else somewhere in it."""
        pick = self.random.choice
        if isinstance(value, dict) and value and self.random.random() < 0.8:
            name = pick(list(value))
            if name == "type" and self.random.random() < 0.5:
                return value
            return {**value, name: self.damaged(value[name])}
        if isinstance(value, list) and value and self.random.random() < 0.8:
            return [self.damaged(value[0]), *value[1:]]
        return pick([None, 0, -1, 2**70, 1.5, "x", "\N{SNOWMAN}", True, [], {}, [[]], {"type": "x"}, "x" * 10_000])

    def message(self) -> str | bytes:
        event = self.event()
        chance = self.random.random()
        if chance < 0.2:
            event = self.damaged(event)
        text = json.dumps(event)
        if chance > 0.97:
            others: list[str | bytes] = [text.encode(), text[:-1], "", "null", '{"type": "\\ud800"}']
            return self.random.choice(others)
        return text


async def run_stream(url: str, seed: int) -> Counter[str]:
    """One connection; the types of the events that came."""
    fuzzer = Fuzzer(seed)
    headers = {"OpenAI-Beta": "realtime=v1"} if fuzzer.beta else {}
    found: Counter[str] = Counter()
    address = f"{url.replace('http', 'ws')}/v1/realtime?model=small"
    async with connect(address, additional_headers=headers, max_size=None) as socket:
        started, ended = set(), set()

        async def receive() -> Event:
            async with asyncio.timeout(60):
                event: Event = json.loads(await socket.recv())
            check_event(event, beta=fuzzer.beta)
            found[event["type"]] += 1
            if event["type"] == "response.created":
                started.add(event["response"]["id"])
            elif event["type"] == "response.done":
                ended.add(event["response"]["id"])
                error = (event["response"]["status_details"] or {}).get("error") or {}
                assert error.get("code") != "failed", event
            elif event["type"] == "error":
                assert event["error"]["type"] == "invalid_request_error", event
            return event

        limits: dict[str, Any] = (
            {"max_response_output_tokens": 4} if fuzzer.beta else {"type": "realtime", "max_output_tokens": 4}
        )
        await socket.send(json.dumps({"type": "session.update", "session": limits}))
        for _ in range(fuzzer.random.randint(3, 15)):
            await socket.send(fuzzer.message())
        if fuzzer.random.random() < 0.3:
            # In the middle of it all.
            socket.transport.abort()
            return found
        # The connection still works, and every answer comes to its end.
        await socket.send(json.dumps({"type": "conversation.item.retrieve", "item_id": "no", "event_id": "last"}))
        while not ((event := await receive())["type"] == "error" and event["error"]["event_id"] == "last"):
            pass
        off: dict[str, Any] = (
            {"turn_detection": None}
            if fuzzer.beta
            else {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
        )
        await socket.send(json.dumps({"type": "session.update", "session": off}))
        while (await receive())["type"] != "session.updated":
            pass
        while started != ended:
            await receive()
    return found


async def run_streams(url: str, seeds: range) -> Counter[str]:
    found: Counter[str] = Counter()
    remaining = iter(seeds)

    async def client() -> None:
        for seed in remaining:
            try:
                found.update(await run_stream(url, seed))
            except Exception as error:
                error.add_note(f"seed {seed}")
                raise

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())
    return found


def check_streams(server: RunningServer, caplog: pytest.LogCaptureFixture, seeds: range) -> Counter[str]:
    found = asyncio.run(run_streams(server.url, seeds))
    eventually(lambda: server.metric("omni_realtime_sessions") == 0)
    server.wait_until_idle()
    assert server.service.engine.num_active == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    return found


def test_realtime_survives_random_events(conversation_server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    check_streams(conversation_server, caplog, range(STREAMS, STREAMS + 30))


@pytest.mark.slow
def test_realtime_survives_two_thousand_streams(
    conversation_server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    found = check_streams(conversation_server, caplog, range(STREAMS))
    for name in ("response.created", "input_audio_buffer.speech_started", "input_audio_buffer.committed", "error"):
        assert found[name] > 100, found
