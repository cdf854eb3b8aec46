"""Conversations in the form of chat completions."""

from __future__ import annotations

from typing import Any

import pytest

from omni_jax.errors import ConfigError
from omni_jax.inference.messages import from_messages, to_messages
from omni_jax.inference.request import Turn


def test_messages_become_turns() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "Hello.", "weight": 0},
        {"role": "user", "content": "One,"},
        {"role": "user", "content": [{"type": "text", "text": "two?"}]},
        {"role": "assistant", "content": "Three.", "weight": 1},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Four?"},
    ]
    system, turns, trained = from_messages(messages)
    assert system == "Be kind. Be brief."
    assert turns == [Turn("", "Hello."), Turn("One,"), Turn("two?", "Three."), Turn("Four?")]
    assert trained == [False, False, True, False]
    assert from_messages(to_messages(system, turns))[:2] == (system, turns)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages: expected a list, found str"),
        (["a"], r"messages\[0\]: expected an object, found str"),
        ([{"role": "tool", "content": "a"}], r"messages\[0\].role: expected system"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: expected a text"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], r"messages\[0\].content: expected a text"),
    ],
)
def test_other_messages_are_errors(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_messages(messages)
