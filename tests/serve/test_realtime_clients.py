"""What voice agents of others send over `/v1/realtime`, as it was recorded.

`make test-clients` runs the real ones: OpenAI's client and Agents SDK, Pipecat, LiveKit Agents. Any error event ends a
session of Pipecat but those of two codes, and one of LiveKit's is an error in its log.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.serve.conftest import HeldBatch, RunningServer
from tests.serve.realtime_client import Client, Event, question

PCM = {"type": "audio/pcm", "rate": 24_000}
SERVER_VAD = {"type": "server_vad", "silence_duration_ms": 300}
SESSIONS: dict[str, list[Event]] = {
    "openai-agents 0.24.0": [
        {
            "type": "realtime",
            "audio": {
                "input": {
                    "format": PCM,
                    "transcription": {"model": "gpt-4o-mini-transcribe"},
                    "turn_detection": {**SERVER_VAD, "interrupt_response": True},
                },
                "output": {"format": PCM, "voice": "ash"},
            },
            "instructions": "Be brief.",
            "model": "small",
            "output_modalities": ["audio"],
            "tools": [],
        }
    ],
    "pipecat-ai 1.14.0": [
        {
            "type": "realtime",
            "model": "small",
            "instructions": "Be brief.",
            "audio": {
                "input": {
                    "transcription": {"model": "gpt-realtime-whisper"},
                    "turn_detection": {**SERVER_VAD, "threshold": 0.5, "prefix_padding_ms": 300},
                }
            },
            "tools": [],
        }
    ],
    "livekit-plugins-openai 1.8.9": [
        {
            "type": "realtime",
            "audio": {
                "input": {
                    "format": PCM,
                    "noise_reduction": None,
                    "transcription": {"model": "whisper-1"},
                    "turn_detection": SERVER_VAD,
                },
                "output": {"format": PCM, "speed": 1.0, "voice": "marin"},
            },
            "max_output_tokens": "inf",
            "model": "small",
            "output_modalities": ["audio"],
            "tool_choice": "auto",
            "tracing": None,
        },
        {"type": "realtime", "instructions": "Be brief."},
        {"type": "realtime", "model": "small", "tools": []},
    ],
}
"""Updates of the session, by client."""
TEXT = [{"type": "input_text", "text": "hello"}]
TYPED: dict[str, tuple[Event, Event]] = {
    "openai-agents 0.24.0": ({"item": {"content": TEXT, "role": "user", "type": "message"}}, {}),
    "pipecat-ai 1.14.0": (
        {"item": {"id": "60060f1e438d466989efefee5193b5c5", "type": "message", "role": "user", "content": TEXT}},
        {"response": {"output_modalities": ["audio"]}},
    ),
    "livekit-plugins-openai 1.8.9": (
        {
            "item": {"content": TEXT, "role": "user", "type": "message", "id": "item_ae19d55cc624"},
            "previous_item_id": "root",
        },
        {"response": {"instructions": None, "metadata": {"client_event_id": "response_create_15af1b3a6e76"}}},
    ),
}
"""A typed question and the request for its answer."""


@pytest.mark.parametrize("name", SESSIONS)
def test_realtime_events_of_real_clients(conversation_server: RunningServer, name: str) -> None:
    with Client(conversation_server.url) as client:
        client.last("conversation.created")
        for number, session in enumerate(SESSIONS[name]):
            client.send("session.update", event_id=f"update_{number}", session=session)
            found = client.receive()
            assert found["type"] == "session.updated", found
        assert found["session"]["instructions"] == "Be brief."
        assert found["session"]["audio"]["input"]["turn_detection"]["silence_duration_ms"] == 300

        item, response = TYPED[name]
        client.send("conversation.item.create", event_id="create", **item)
        client.send("response.create", event_id="answer", **response)
        typed = without_errors(client.until("response.done"))
        assert typed[-1]["response"]["metadata"] == response.get("response", {}).get("metadata")
        answer = typed[-1]["response"]["output"][0]["id"]

        # Speech while the answer is played: each truncates it, and the Agents SDK retrieves it then.
        speech = np.concatenate([question("name"), np.zeros(24_000, np.int16)])
        client.append(speech.tobytes(), 4800)
        spoken = without_errors(client.until("input_audio_buffer.speech_started"))
        client.send("conversation.item.truncate", item_id=answer, content_index=0, audio_end_ms=100)
        client.send("conversation.item.retrieve", item_id=answer)
        spoken += without_errors(client.until("response.done"))
        asked = next(event["item_id"] for event in spoken if event["type"] == "input_audio_buffer.committed")
        transcripts = [event for event in spoken if event["type"].endswith("input_audio_transcription.completed")]
        if not transcripts:
            transcripts = [client.last("conversation.item.input_audio_transcription.completed")]
        assert [event["item_id"] for event in transcripts] == [asked]


def without_errors(events: list[Event]) -> list[Event]:
    assert not [event for event in events if event["type"] == "error"]
    return events


def test_realtime_errors_that_clients_know(conversation_server: RunningServer) -> None:
    """By code, and LiveKit's by how the message begins."""
    item: dict[str, Any] = {"item": {"type": "message", "role": "user", "content": TEXT, "id": "one"}}
    with Client(conversation_server.url) as client:
        client.last("conversation.created")
        cancel = client.error("response.cancel")
        assert cancel["code"] == "response_cancel_not_active"
        assert cancel["message"].startswith("Cancellation failed")
        assert client.error("input_audio_buffer.commit")["code"] == "input_audio_buffer_commit_empty"
        client.send("conversation.item.create", **item)
        client.last("conversation.item.done")
        assert client.error("conversation.item.create", **item)["code"] == "item_create_duplicate_item_id"
        with HeldBatch(conversation_server):
            client.send("response.create")
            client.send("response.create", event_id="mine")
            found = client.last("error")["error"]
        assert (found["event_id"], found["code"]) == ("mine", "conversation_already_has_active_response")
