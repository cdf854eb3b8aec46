"""The items of a Realtime conversation, and what of them a response answers."""

from __future__ import annotations

import asyncio
import base64
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from omni_jax.audio.raw import RawFormat
from omni_jax.errors import ConfigError
from omni_jax.inference.messages import from_messages
from omni_jax.inference.request import Turn
from omni_jax.serve.realtime_schema import RAW_FORMATS, ItemParam, invalid
from omni_jax.serve.sessions import Base64
from omni_jax.text.played import played_text

ContentType = Literal["input_text", "input_audio", "output_text", "output_audio"]

MAX_ITEMS = 1024
"""Of a conversation; the oldest are dropped."""
PART_BYTES = 1024
"""What a part of an item keeps besides its text and audio. Thousands of empty ones are not for nothing."""


def new_id(kind: str) -> str:
    """An id that no other object has."""
    return f"{kind}_{secrets.token_hex(10)}"


class PlaybackClock:
    """How much of an answer a client has played that plays audio as it comes."""

    def __init__(self) -> None:
        self._sent, self._end = 0.0, 0.0

    def send(self, seconds: float) -> None:
        """So much more audio was sent."""
        self._end = max(self._end, time.monotonic()) + seconds
        self._sent += seconds

    @property
    def remaining(self) -> float:
        """Seconds until all that was sent has been played."""
        return max(0.0, self._end - time.monotonic())

    @property
    def played_ms(self) -> int:
        """Milliseconds that have been played."""
        return int(max(0.0, self._sent - self.remaining) * 1000)


@dataclass
class Part:
    """A part of an item's content."""

    type: ContentType
    text: str | None = None
    """The text, or the transcript of the audio; None until it is known."""
    audio: bytearray = field(default_factory=bytearray)
    """Raw samples; empty once they have been dropped."""
    format: RawFormat = RAW_FORMATS["audio/pcm"]
    seconds: float = 0.0
    """Duration of the audio."""
    cut_seconds: float | None = None
    """What was played of an answer that was interrupted."""
    complete: bool = True
    """Whether the answer was decoded to its end."""
    transcription: asyncio.Task[None] | None = None
    """Transcribes the recording; None before it was begun."""

    @property
    def is_audio(self) -> bool:
        """Whether it is a recording or spoken."""
        return self.type.endswith("audio")

    @property
    def kept_text(self) -> str:
        """The text, of an interrupted answer what was spoken by then; see `played_text`."""
        text, cut = self.text or "", self.cut_seconds
        if self.complete and cut is None:
            return text
        # The text of an answer that did not come to its end is ahead of its audio.
        return played_text(text, self.seconds if cut is None else cut, self.seconds if self.complete else None)

    def render(self, *, with_audio: bool = False) -> dict[str, Any]:
        """As events have it."""
        if not self.is_audio:
            return {"type": self.type, "text": self.text or ""}
        transcript = self.text if self.cut_seconds is None else self.kept_text
        audio = {"audio": base64.b64encode(self.kept_audio).decode()} if with_audio else {}
        return {"type": self.type, "transcript": transcript, **audio}

    @property
    def kept_audio(self) -> bytes:
        """The audio, of an interrupted answer what was played."""
        return bytes(self.audio if self.cut_seconds is None else self.audio[: self.format.size(self.cut_seconds)])

    async def wait_for_transcript(self) -> None:
        """Wait until the recording has been transcribed, if that was begun."""
        if self.transcription is not None:
            await asyncio.wait([self.transcription])


@dataclass(eq=False)
class Item:
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    parts: list[Part]
    id: str = field(default_factory=lambda: new_id("item"))
    status: Literal["in_progress", "completed", "incomplete"] = "completed"

    def render(self, *, with_audio: bool = False) -> dict[str, Any]:
        """As events have it."""
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": [part.render(with_audio=with_audio) for part in self.parts],
        }

    @property
    def text(self) -> str:
        """All that was said or written."""
        return " ".join(part.kept_text for part in self.parts if part.kept_text)

    @property
    def audio(self) -> Part | None:
        """The last recording in it."""
        return next((part for part in reversed(self.parts) if part.is_audio), None)

    @property
    def num_bytes(self) -> int:
        """Bytes that it keeps."""
        return sum(PART_BYTES + len(part.audio) + sys.getsizeof(part.text) for part in self.parts)


@dataclass
class Context:
    """What a response answers, and what was said before."""

    asked: Item | None
    """The last message of the user; None if there is none."""
    before: list[Item]
    """Items before it, or all."""

    @classmethod
    def of(cls, items: list[Item]) -> Context:
        """The context that items are."""
        for index in reversed(range(len(items))):
            if items[index].role == "user":
                return cls(items[index], items[:index])
        return cls(None, items)

    async def history(self, instructions: str) -> tuple[str, list[Turn]]:
        """System text and past turns, once all recordings that are being transcribed have been."""
        for item in self.before:
            for part in item.parts:
                await part.wait_for_transcript()
        said = [("system", instructions), *((item.role, item.text) for item in self.before)]
        system, turns, _ = from_messages([{"role": role, "content": text} for role, text in said if text])
        return system, turns


def make_item(param: ItemParam, format: RawFormat, prefix: str = "item") -> Item:
    """An item that a client has sent.

    Args:
        param: the client's item.
        format: of recordings in it.
        prefix: of field names in messages.

    Raises:
        RequestRefusedError: its content does not fit its role.
    """
    if not param.content:
        raise invalid(f"{prefix}.content: expected at least one part, found none", f"{prefix}.content")
    parts = []
    for index, content in enumerate(param.content):
        where = f"{prefix}.content.{index}"
        speaks = param.role == "assistant"
        kind = {"text": "output_text" if speaks else "input_text", "audio": "output_audio"}.get(
            content.type, content.type
        )
        allowed = {"system": ["input_text"], "user": ["input_text", "input_audio"]}.get(
            param.role, ["output_text", "output_audio"]
        )
        if kind not in allowed:
            raise invalid(
                f"{where}.type: expected {' or '.join(allowed)} in a message of the {param.role}, found {content.type}",
                f"{where}.type",
            )
        name = "audio" if kind == "input_audio" else "transcript" if kind == "output_audio" else "text"
        if getattr(content, name) is None:
            raise invalid(f"{where}.{name}: field required", f"{where}.{name}", "missing_required_parameter")
        if kind == "input_audio":
            data = decode_samples(content.audio or "", format, f"{where}.audio")
            part = Part("input_audio", content.transcript, bytearray(data), format, format.seconds(len(data)))
        else:
            # The audio of an answer is not taken: only its text can be a part of the history.
            part = Part("input_text" if kind == "input_text" else "output_text", getattr(content, name))
        parts.append(part)
    return Item(param.role, parts, param.id or new_id("item"))


def decode_samples(data: str, format: RawFormat, field: str) -> bytes:
    """Whole samples of base64.

    Raises:
        RequestRefusedError: it is not base64, or has no samples.
    """
    try:
        decoded = Base64(data, field).decode()
    except ConfigError as error:
        raise invalid(str(error), field) from None
    return bytes(decoded[: len(decoded) // format.sample_bytes * format.sample_bytes])


class Conversation:
    """The items of a conversation, in order. The oldest lose their audio, and are dropped, where there are too many.

    Attributes:
        id: of the conversation.
    """

    def __init__(self, max_bytes: int):
        """Begin a conversation.

        Args:
            max_bytes: of texts and audio.
        """
        self.id = new_id("conv")
        self._max_bytes = max_bytes
        self._items: list[Item] = []

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def find(self, item_id: str, action: str) -> Item:
        """An item by its id.

        Raises:
            RequestRefusedError: there is none.
        """
        for item in self._items:
            if item.id == item_id:
                return item
        message = f"item_id: expected an item of the conversation, found {item_id!r:.100}"
        raise invalid(message, "item_id", f"item_{action}_invalid_item_id")

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Add an item.

        Args:
            item: to add.
            after: id of the item before it; `root`: it is the first; None: the last.

        Returns:
            The id of the item before it.

        Raises:
            RequestRefusedError: there is no such item, or one with this id exists.
        """
        ids = [other.id for other in self._items]
        if item.id in ids:
            message = f"item.id: expected a new id, found {item.id!r}, which exists"
            raise invalid(message, "item.id", "item_create_duplicate_item_id")
        index = len(ids)
        if after == "root":
            index = 0
        elif after is not None:
            if after not in ids:
                message = f"previous_item_id: expected an item of the conversation, found {after!r:.100}"
                raise invalid(message, "previous_item_id", "item_create_invalid_previous_item_id")
            index = ids.index(after) + 1
        self._items.insert(index, item)
        self.limit_memory(item)
        return ids[index - 1] if index else None

    @property
    def num_bytes(self) -> int:
        """Bytes that its items keep."""
        return sum(item.num_bytes for item in self._items)

    def drop_audio(self) -> None:
        """Drop the audio of all items."""
        for item in self._items:
            for part in item.parts:
                part.audio = bytearray()

    def limit_memory(self, newest: Item) -> None:
        """Drop audio of the oldest items but `newest`, and then the oldest items, until there is room."""
        size = self.num_bytes
        for item in self._items:
            for part in item.parts:
                if size > self._max_bytes and item is not newest:
                    size -= len(part.audio)
                    part.audio = bytearray()
        for item in list(self._items):
            if (size > self._max_bytes or len(self._items) > MAX_ITEMS) and item is not newest:
                size -= item.num_bytes
                self._items.remove(item)

    def previous(self, item: Item) -> str | None:
        """The id of the item before an item; None if it is the first, or no item of the conversation."""
        before = None
        for other in self._items:
            if other is item:
                return before
            before = other.id
        return None

    def delete(self, item_id: str) -> None:
        """Remove an item; see `find`."""
        self._items.remove(self.find(item_id, "delete"))

    def truncate(self, item_id: str, content_index: int, audio_end_ms: int) -> None:
        """Cut an answer at what was played; a second time corrects the first.

        Raises:
            RequestRefusedError: there is no such audio, or it is shorter.
        """
        item = self.find(item_id, "truncate")
        if item.role != "assistant":
            message = f"item_id: expected a message of the assistant, found one of the {item.role}"
            raise invalid(message, "item_id")
        if content_index >= len(item.parts) or not item.parts[content_index].is_audio:
            raise invalid(f"content_index: expected a part with audio, found {content_index}", "content_index")
        part = item.parts[content_index]
        # Players count samples, and round.
        if audio_end_ms > part.seconds * 1000 + 1:
            message = f"audio_end_ms: expected at most {int(part.seconds * 1000)}, found {audio_end_ms}"
            raise invalid(message, "audio_end_ms")
        part.cut_seconds = audio_end_ms / 1000
