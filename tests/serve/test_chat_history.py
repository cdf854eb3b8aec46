"""Chat completions with all their messages, by OpenAI's own client."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from omni_jax.audio.encoding import encode
from omni_jax.audio.io import SAMPLE_RATE, from_pcm16
from omni_jax.inference.request import Request, Turn
from omni_jax.serve.chat_history import TextCache
from tests.serve.conftest import RunningServer
from tests.serve.realtime_client import question

IGNORED = "x-omni-jax-ignored-messages"


@pytest.fixture
def client(conversation_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{conversation_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> tuple[Any, str | None]:
    """The answer's message, and how many messages were ignored."""
    response = client.chat.completions.with_raw_response.create(
        model="small", messages=list(messages), max_completion_tokens=10, **options
    )
    return response.parse().choices[0].message, response.headers.get(IGNORED)


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def recorded(data: bytes) -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    return message("user", [part])


def test_chat_takes_system_and_past_turns(client: openai.OpenAI, conversation_server: RunningServer) -> None:
    found, ignored = ask(
        client,
        message("system", "Be brief."),
        message("user", [{"type": "text", "text": "hello"}]),
        message("assistant", "hi there"),
        message("developer", "Speak slowly."),
        message("user", "and then"),
    )
    request = Request(
        text="and then", task="T1T2", system="Be brief. Speak slowly.", history=[Turn("hello", "hi there")]
    )
    assert found.content == conversation_server.omni.generate(request, max_steps=10).text
    assert ignored is None


@pytest.mark.parametrize("stream", [False, True])
def test_chat_takes_spoken_turns_by_transcript_and_id(
    client: openai.OpenAI, conversation_server: RunningServer, stream: bool
) -> None:
    omni = conversation_server.omni
    wav = encode(from_pcm16(question("name", SAMPLE_RATE)), SAMPLE_RATE, "wav")
    spoken: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    if stream:
        asked: list[Any] = [recorded(wav)]
        chunks = client.chat.completions.create(
            model="small", messages=asked, max_completion_tokens=10, stream=True, **spoken
        )
        deltas = [chunk.model_dump()["choices"][0]["delta"] for chunk in chunks]
        audio = [delta["audio"] for delta in deltas if delta.get("audio")]
        first, audio_id = "".join(part.get("transcript") or "" for part in audio), audio[0]["id"]
    else:
        answer, _ = ask(client, recorded(wav), **spoken)
        first, audio_id = answer.audio.transcript, answer.audio.id
    expected = omni.generate(Request(wav), max_steps=10).text
    assert first == expected
    messages = [recorded(wav), message("assistant", None, audio={"id": audio_id}), message("user", "and then")]
    found, ignored = ask(client, *messages)
    history = [Turn(omni.transcribe(wav).text, expected)]
    assert found.content == omni.generate(Request(text="and then", task="T1T2", history=history), max_steps=10).text
    assert ignored is None
    # The transcript is kept.
    before = conversation_server.metric("omni_requests_total", endpoint="/v1/chat/completions", outcome="done")
    ask(client, *messages)
    after = conversation_server.metric("omni_requests_total", endpoint="/v1/chat/completions", outcome="done")
    assert after == before + 1


def test_chat_counts_messages_without_text(client: openai.OpenAI, conversation_server: RunningServer) -> None:
    found, ignored = ask(
        client,
        message("assistant", None, audio={"id": "audio_unknown"}),
        recorded(b"no recording"),
        message("user", "hello"),
    )
    assert found.content == conversation_server.omni.answer(text="hello", max_steps=10).text
    assert ignored == "2"


def test_text_cache_drops_the_least_recently_used() -> None:
    cache = TextCache(2)
    cache.put("a", "1")
    cache.put("b", "2")
    assert cache.get("a") == "1"
    cache.put("c", "3")
    assert [cache.get(key) for key in "abc"] == ["1", None, "3"]
