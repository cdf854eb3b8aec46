"""Conversations as the messages of a chat completion. Importing it imports no JAX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omni_jax.errors import ConfigError
from omni_jax.inference.request import Turn


def to_messages(system: str, turns: Iterable[Turn]) -> list[dict[str, str]]:
    """A system text and turns as the messages of a chat completion."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        for role, text in (("user", turn.question), ("assistant", turn.answer)):
            if text:
                messages.append({"role": role, "content": text})
    return messages


def from_messages(messages: Any) -> tuple[str, list[Turn], list[bool]]:
    """System text and turns of the messages of a chat completion.

    A message of the user begins a turn; one of the assistant ends it, or is a turn without a question. Messages of the
    roles `system` and `developer`, joined by a space, are the system text, wherever they are. A content is a text, or a
    list of parts of a `text` each.

    Returns:
        The system text, the turns, and whether each turn's answer counts in training: not if its `weight` is 0.

    Raises:
        ConfigError: they have another form.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ConfigError(f"messages: expected a list, found {type(messages).__name__}", field="messages")
    system: list[str] = []
    turns: list[Turn] = []
    trained: list[bool] = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ConfigError(f"{place}: expected an object, found {type(message).__name__}", field="messages")
        role, text = message.get("role"), _content(message.get("content"), place)
        if role in ("system", "developer"):
            system.append(text)
        elif role == "user":
            turns.append(Turn(text))
            trained.append(False)
        elif role == "assistant":
            if not turns or turns[-1].answer:
                turns.append(Turn())
                trained.append(False)
            turns[-1] = replace(turns[-1], answer=text)
            trained[-1] = message.get("weight") != 0
        else:
            raise ConfigError(
                f"{place}.role: expected system, developer, user or assistant, found {role!r}", field="messages"
            )
    return " ".join(system), turns, trained


def _content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return " ".join(text.strip() for text in texts if text)
    raise ConfigError(f"{place}.content: expected a text, or a list of parts of a text each", field="messages")
