"""`Conversation`: history, interruption, saving, and the form of chat messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.errors import ConfigError
from omni_jax.inference.conversation import Conversation, SpokenTurn
from omni_jax.inference.request import Request, Turn
from omni_jax.text.played import played_text
from tests.inference.reference_decoder import small_omni

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def omni() -> Omni:
    return small_omni(text_specials=7, conversation=True, max_position=128)


def recording(seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=3000)).astype(np.float32)


def test_conversation_is_requests_with_its_history(omni: Omni) -> None:
    talk = omni.conversation(system="Bob")
    first = talk.reply(recording(0), sample_rate=16_000, max_steps=20)
    assert talk.history == (Turn(first.question or "", first.text),)
    second = talk.reply(text="and?", max_steps=20)
    expected = omni.generate(Request(text="and?", system="Bob", history=talk.history[:1]), max_steps=20)
    np.testing.assert_array_equal(second.tokens, expected.tokens)
    chunks = list(talk.stream(recording(1), sample_rate=16_000, max_steps=20))
    request = Request(recording(1), sample_rate=16_000, system="Bob", history=talk.history[:2])
    reply = chunks[-1].reply
    assert reply is not None
    np.testing.assert_array_equal(reply.tokens, omni.generate(request, max_steps=20).tokens)
    transcripts = [omni.transcribe(recording(seed), sample_rate=16_000).text.strip() for seed in (0, 1)]
    assert [turn.question for turn in talk.history] == [transcripts[0], "and?", transcripts[1]]
    assert [turn.answer for turn in talk.history] == [first.text, second.text, reply.text]
    assert repr(talk) == "<Conversation, 3 turns>"


def test_failed_turn_leaves_the_history_as_it_was(omni: Omni) -> None:
    talk = omni.conversation(history=[("a", "b")])
    with pytest.raises(ConfigError, match="expected some text"):
        talk.reply(text="")
    with pytest.raises(ConfigError, match="either audio or text"):
        talk.stream()
    stream = talk.stream(text="hi", max_steps=20)
    assert talk.history == (Turn("a", "b"),), "not before its first chunk"
    next(stream)
    assert [turn.question for turn in talk.history] == ["a", "hi"]


def test_interruption_cuts_the_history_at_what_was_played() -> None:
    turn = SpokenTurn("q", "one two three", seconds=13.0, complete=True)
    assert turn.said() == Turn("q", "one two three")
    turn.cut = 8.0
    assert turn.said() == Turn("q", "one two")
    turn.cut = 99.0
    assert turn.said() == Turn("q", "one two three")
    unfinished = SpokenTurn("q", "one two three four", seconds=0.5)
    assert unfinished.said() == Turn("q", "one two"), "text leads: only what the audio covers was said"
    unfinished.cut = 0.2
    assert unfinished.said() == Turn("q", "one")
    assert SpokenTurn("q", "one two", spoken=False).said() == Turn("q", "one two")


def test_stream_that_is_left_early_keeps_what_was_read(omni: Omni) -> None:
    talk = omni.conversation()
    text, seconds = "", 0.0
    for chunk in talk.stream(recording(2), sample_rate=16_000):
        text += chunk.text
        seconds += len(chunk.audio) / chunk.sample_rate
        if seconds:
            break
    assert talk.history[0].answer == played_text(text, seconds)
    assert talk.interrupt(0.0).answer == ""
    assert talk.history[0].answer == ""
    talk.reply(text="next", max_steps=5)
    assert len(talk.history) == 2
    with pytest.raises(ConfigError, match="interrupt: expected an answer"):
        omni.conversation().interrupt(1.0)


def test_save_and_load_conversation(omni: Omni, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk = omni.conversation(system="Bob", history=[("What is it?", "A “test”."), ("", "Hm."), ("So?", "")])
    talk.save(path)
    again = omni.conversation(path)
    assert (again.system, again.history) == (talk.system, talk.history)
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "Bob"}
    with pytest.raises(ConfigError, match="load: expected no system text"):
        omni.conversation(path, system="Eve")
    for content, message in (("{", "expected a saved conversation"), ("[]", "found no messages"), (None, "No such")):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            omni.conversation(path)


def test_model_without_conversations_begins_none() -> None:
    with pytest.raises(ConfigError, match="expected a model that was trained on conversations"):
        small_omni().conversation()


def test_turns_of_another_form_are_errors(omni: Omni) -> None:
    with pytest.raises(ConfigError, match="expected a question and an answer"):
        Conversation(omni, history=["abc"])
