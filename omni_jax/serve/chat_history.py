"""The messages of a chat before the last one, as the system text and the turns that the model takes.

Clients send all messages with each request: recordings of earlier turns again, and earlier answers in speech by their
id. A recording is transcribed by the model itself, once; the texts of answers in speech are kept by their id.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from omni_jax.errors import OmniError
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.messages import from_messages
from omni_jax.inference.request import Turn
from omni_jax.serve.openai_schema import AudioPart, Message, TextPart
from omni_jax.serve.sessions import Base64, Service
from omni_jax.tasks import Task

MAX_TEXTS = 4096
"""Most texts that are kept; the least recently used are dropped."""
MAX_RECORDINGS = 16
"""Most recordings of earlier turns that are transcribed for a request: the latest."""


class TextCache:
    """Texts by a key; the least recently used are dropped."""

    def __init__(self, size: int = MAX_TEXTS):
        """Begin without texts.

        Args:
            size: most texts that are kept.
        """
        self._size = size
        self._texts: OrderedDict[str, str] = OrderedDict()

    def put(self, key: str, text: str) -> None:
        """Keep a text."""
        self._texts[key] = text
        self._texts.move_to_end(key)
        if len(self._texts) > self._size:
            self._texts.popitem(last=False)

    def get(self, key: str) -> str | None:
        """The text of a key; None if it is not kept."""
        if key in self._texts:
            self._texts.move_to_end(key)
        return self._texts.get(key)


@dataclass
class ChatHistory:
    """What was said before the last message."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    ignored: int = 0
    """Messages that are not in it."""


async def read_history(
    service: Service, client: str | None, texts: TextCache, messages: Sequence[Message], endpoint: str
) -> ChatHistory:
    """System text and turns of the messages before the last one; none for a model that takes none.

    Args:
        service: transcribes recordings.
        client: see `Service.client_of`.
        texts: of answers in speech, and of recordings.
        messages: before the last one.
        endpoint: that transcriptions are counted for.
    """
    if not service.remembers:
        return ChatHistory(ignored=len(messages))
    recordings = [part for message in messages for part in _parts(message) if isinstance(part, AudioPart)]
    used = {id(part) for part in recordings[-MAX_RECORDINGS:]}
    known, ignored = [], 0
    for message in messages:
        found = []
        for part in _parts(message):
            if isinstance(part, TextPart):
                found.append(part.text)
            elif id(part) in used:
                found.append(await _transcribe(service, client, texts, part, endpoint))
        if isinstance(message.content, str):
            found.append(message.content)
        if message.audio is not None and not any(found):
            found.append(texts.get(message.audio.id) or "")
        text = " ".join(text for text in found if text)
        if text and message.role not in ("tool", "function"):
            known.append({"role": message.role, "content": text})
        else:
            ignored += 1
    system, turns, _ = from_messages(known)
    return ChatHistory(system, turns, ignored)


def _parts(message: Message) -> list[TextPart | AudioPart]:
    content = message.content if isinstance(message.content, list) else []
    return [part for part in content if isinstance(part, TextPart | AudioPart)]


async def _transcribe(service: Service, client: str | None, texts: TextCache, part: AudioPart, endpoint: str) -> str:
    """What is said in a recording of an earlier turn; nothing if it cannot be used."""
    key = hashlib.sha256(part.input_audio.data.encode(errors="replace")).hexdigest()
    if (text := texts.get(key)) is None:
        try:
            data = Base64(part.input_audio.data, "input_audio.data")
            prepared = await service.prepare(client=client, audio=data, task=Task.A1T1, config=GenerationConfig())
            answer = service.submit(prepared, endpoint)
            try:
                text = (await answer.wait()).text
            finally:
                answer.close()
        except OmniError as error:
            service.metrics.count_error(endpoint, error)
            return ""
        texts.put(key, text)
    return text
