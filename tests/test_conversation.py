"""Conversations: requests with a system text and past turns, through every way to answer."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.errors import ConfigError
from omni_jax.inference.async_engine import AsyncEngine
from omni_jax.inference.prefix_cache import PrefixCache
from omni_jax.inference.request import Request, Turn
from tests.inference.reference_decoder import small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TURNS = [Turn("Hi?", "Yes"), Turn("Two?", "No")]


@pytest.fixture(scope="module")
def omni() -> Omni:
    return small_omni(text_specials=7, conversation=True, max_position=128)


def recording(samples: int = 3000, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


def spoken(**fields: Any) -> Request:
    return Request(recording(), sample_rate=16_000, **fields)


def test_history_precedes_the_prompt(omni: Omni) -> None:
    request = omni.prepare(spoken(system="Bob", history=TURNS))
    plain = omni.prepare(spoken())
    text = request.prompt.tokens[7, : -len(plain.prompt)]
    words = bytes(token if token < 256 else 0 for token in text.tolist())
    assert len(words) == len("Bob" + "Hi?" + "Yes" + "Two?" + "No") + 2 * 5
    assert [int(token) for token in text if token >= 256] == [266, 260, 262, 260, 263, 260, 262, 260, 263, 260]
    np.testing.assert_array_equal(request.prompt.tokens[:, -len(plain.prompt) :], plain.prompt.tokens)
    assert request.prompt.speech_start == len(text) + 1
    as_pairs = omni.prepare(spoken(system="Bob", history=[("Hi?", "Yes"), {"question": "Two?", "answer": "No"}]))
    np.testing.assert_array_equal(as_pairs.prompt.tokens, request.prompt.tokens)


def test_without_history_prompts_are_those_of_a_first_turn(omni: Omni) -> None:
    plain = small_omni().prepare(spoken()).prompt.tokens
    for fields in ({}, {"system": "", "history": []}, {"history": [("", "")]}, {"history": [("!", "...")]}):
        np.testing.assert_array_equal(omni.prepare(spoken(**fields)).prompt.tokens, plain)


def test_history_changes_the_answer_and_reuse_does_not(omni: Omni) -> None:
    request = omni.prepare(spoken(system="Bob", history=TURNS), max_steps=20)
    first, again = omni.run([request])[0], omni.run([request])[0]
    assert len(omni._prefixes) == 1
    np.testing.assert_array_equal(first.tokens, again.tokens)
    other = omni.run([omni.prepare(spoken(), max_steps=20)])[0]
    assert first.tokens.tolist() != other.tokens.tolist()


def test_streams_and_the_async_engine_answer_turns_alike(omni: Omni) -> None:
    question = spoken(system="Bob", history=TURNS, transcribe_question=True)
    request = omni.prepare(question, max_steps=30)
    expected = omni.run([request])[0]
    transcript = omni.transcribe(recording(), sample_rate=16_000).text
    assert expected.question == transcript.strip()
    with AsyncEngine(omni, max_batch_size=2, prefix_cache_bytes=1 << 20) as engine:
        for chunks in (list(omni.stream_prepared(request)), list(engine.submit(request)), list(engine.submit(request))):
            reply = chunks[-1].reply
            assert reply is not None
            assert [chunk.reply for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            np.testing.assert_array_equal(reply.tokens, expected.tokens)
            assert (reply.text, reply.question) == (expected.text, expected.question)
            assert "".join(chunk.question for chunk in chunks) == expected.question
            assert "".join(chunk.text for chunk in chunks) == expected.text
        assert engine.num_requests == 0


def test_async_engine_remembers_histories(omni: Omni) -> None:
    request = omni.prepare(spoken(system="Bob", history=TURNS), max_steps=10)
    history = omni.prepare_history("Bob", TURNS)
    np.testing.assert_array_equal(history.tokens, request.prompt.history.tokens)
    expected = omni.run([request])[0]
    with AsyncEngine(omni, max_batch_size=1) as engine:
        for turns in (TURNS[:1], TURNS, TURNS):
            engine.remember(omni.prepare_history("Bob", turns))
        prefixes = engine._engine.prefixes
        deadline = time.monotonic() + 60
        while (known := prefixes.find(history)) is None or known.length < len(history):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        reply = list(engine.submit(request))[-1].reply
        assert reply is not None
        np.testing.assert_array_equal(reply.tokens, expected.tokens)
        with pytest.raises(ConfigError, match="the slots have 128"):
            engine.remember(omni.prepare_history("a" * 130, []))


def test_many_turns_with_transcripts_in_one_batch(omni: Omni) -> None:
    requests = [
        omni.prepare(Request(recording(seed=n), sample_rate=16_000, history=TURNS[:n], transcribe_question=n != 1))
        for n in range(3)
    ]
    alone = [omni.run([request])[0] for request in requests]
    together = omni.run(requests)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.question == other.question
    assert [reply.question is None for reply in together] == [False, True, False]


def test_oldest_turns_are_left_out_of_a_long_conversation(omni: Omni) -> None:
    turns = [Turn(f"question {n}", f"answer {n}") for n in range(9)]
    request = omni.prepare(spoken(system="Bob", history=turns))
    history = request.prompt.history
    assert 0 < history.first_turn < 9
    assert len(history) <= 64
    assert history.tokens[7, 0] == 266
    with pytest.raises(ConfigError, match=r"takes \d+ positions; expected at most the context of 128"):
        omni.prepare(spoken(system="a" * 130))


def test_model_without_conversations_takes_no_history() -> None:
    plain = small_omni()
    with pytest.raises(
        ConfigError, match="system: expected none: this model was not trained on conversations"
    ) as error:
        plain.prepare(spoken(system="Bob"))
    assert error.value.field == "system"
    with pytest.raises(ConfigError, match="history: expected none") as error:
        plain.prepare(spoken(history=TURNS))
    assert error.value.field == "history"
    assert plain.prepare(spoken(transcribe_question=True)).transcription is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": 3}, "system: expected a string, found int"),
        ({"history": "hello"}, "history: expected a list of turns, found str"),
        ({"history": ["a"]}, r"history\[0\]: expected a question and an answer, found 'a'"),
        ({"history": [("a", "b"), {"q": "a"}]}, r"history\[1\]: expected a question and an answer"),
        ({"history": [("a", 3)]}, r"history\[0\]: answer: expected a string, found int"),
        ({"transcribe_question": 1}, "transcribe_question: expected True or False, found 1"),
        ({"task": "A1T1", "system": "Bob"}, "system: expected none for task A1T1"),
        ({"task": "A1T1", "history": TURNS}, "history: expected none for task A1T1"),
        ({"task": "A1T1", "transcribe_question": True}, "expected a task that answers speech, found A1T1"),
        ({"audio": None, "text": "a", "transcribe_question": True}, "expected a task that answers speech, found T1A2"),
    ],
)
def test_wrong_conversation_fields_are_errors(omni: Omni, fields: dict[str, Any], message: str) -> None:
    request = {"audio": recording(), "sample_rate": 16_000, **fields}
    if request["audio"] is None:
        del request["sample_rate"]
    with pytest.raises(ConfigError, match=message):
        omni.prepare(request)


def test_fault_repeats_a_request_whose_transcription_is_queued(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    request = omni.prepare(spoken(transcribe_question=True), max_steps=20)
    expected = omni.run([request])[0]
    with AsyncEngine(omni, max_batch_size=1) as engine:
        advance = engine._engine.advance

        def fail(steps: int) -> Any:
            monkeypatch.setattr(engine._engine, "advance", advance)
            advance(steps)
            raise RuntimeError("a fault")

        monkeypatch.setattr(engine._engine, "advance", fail)
        handle = engine.submit(request)
        chunks = list(handle)
        assert handle.outcome == "done"
        reply = chunks[-1].reply
        assert reply is not None
        assert "".join(chunk.text for chunk in chunks) == reply.text
        np.testing.assert_array_equal(reply.tokens, expected.tokens)
        assert reply.question == expected.question


def test_omni_shares_no_prefixes_with_another(omni: Omni) -> None:
    other = small_omni(text_specials=7, conversation=True, max_position=128)
    other._prefixes = PrefixCache(0)
    request = omni.prepare(replace(spoken(), system="Bob", history=TURNS), max_steps=5)
    np.testing.assert_array_equal(omni.run([request])[0].tokens, other.run([request])[0].tokens)
    assert len(other._prefixes) == 0
