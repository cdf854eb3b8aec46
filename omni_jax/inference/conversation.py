"""`Conversation`: several turns with one model, which remembers what was said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from omni_jax.errors import ConfigError
from omni_jax.inference.answer import Chunk, Reply
from omni_jax.inference.engine import PreparedRequest
from omni_jax.inference.messages import from_messages, to_messages
from omni_jax.inference.request import Audio, Request, Turn
from omni_jax.tasks import Task
from omni_jax.text.played import played_text


class Model(Protocol):
    """What a conversation needs of a model; `omni_jax.Omni` is one."""

    def prepare(self, inputs: Request, **options: Any) -> PreparedRequest:
        """See `Omni.prepare`."""

    def run(self, requests: Sequence[PreparedRequest]) -> list[Reply]:
        """See `Omni.run`."""

    def stream_prepared(self, request: PreparedRequest) -> Iterator[Chunk]:
        """See `Omni.stream_prepared`."""


@dataclass
class SpokenTurn:
    """A turn while it is answered, and after it.

    What counts as said is what was played. Of an answer that came to its end this is all, unless `cut` says otherwise;
    of one that did not, what its audio covers so far, by the rule of `played_text`.
    """

    question: str = ""
    text: str = ""
    """All that the model wrote."""
    seconds: float = 0.0
    """Of audio, so far."""
    spoken: bool = True
    """Whether there is audio at all."""
    complete: bool = False
    cut: float | None = None
    """Seconds that were played before the answer was interrupted."""

    def add(self, chunk: Chunk) -> None:
        """Take a chunk of the answer."""
        self.question += chunk.question
        self.text += chunk.text
        self.seconds += len(chunk.audio) / chunk.sample_rate
        if chunk.reply is not None:
            self.complete = True

    def said(self) -> Turn:
        """The turn as the history has it."""
        if not self.spoken or (self.complete and self.cut is None):
            return Turn(self.question, self.text)
        played = self.seconds if self.cut is None else min(self.cut, self.seconds)
        return Turn(self.question, played_text(self.text, played, self.seconds if self.complete else None))


class Conversation:
    """Several turns with a model that was trained on conversations; make one with `Omni.conversation`.

    A spoken question enters the history as the model's own transcript of it, which is decoded next to the answer.

    Attributes:
        system: text that the conversation begins with; empty for none.
    """

    def __init__(self, model: Model, system: str = "", history: Iterable[Turn | Sequence[str]] = ()):
        """Begin, or go on after some turns.

        Raises:
            ConfigError: a turn has not a question and an answer.
        """
        self._model = model
        self.system = system
        self._turns = [SpokenTurn(turn.question, turn.answer, complete=True) for turn in map(Turn.of, history)]

    @property
    def history(self) -> tuple[Turn, ...]:
        """The turns so far; of an interrupted answer only what was played."""
        return tuple(turn.said() for turn in self._turns)

    def __repr__(self) -> str:
        """Short: the number of turns."""
        return f"<Conversation, {len(self._turns)} turns>"

    def reply(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        task: Task | str | None = None,
        sample_rate: int | None = None,
        truncate: bool = False,
        **options: Any,
    ) -> Reply:
        """Answer a recording or a text as the next turn.

        Args:
            audio: what is asked, or else `text`.
            text: what is asked.
            task: A1A2 or T1A2 by default; A1T2 or T1T2 for an answer in text only.
            sample_rate: see `Request`.
            truncate: see `Request`.
            **options: fields of `GenerationConfig`.

        Raises:
            AudioError, ConfigError: see `Omni.generate`. The history stays as it was.
        """
        request = self._prepare(Request(audio, text, task, sample_rate, truncate), options)
        (reply,) = self._model.run([request])
        question = text if text is not None else reply.question or ""
        self._turns.append(SpokenTurn(question, reply.text, reply.seconds, reply.audio is not None, complete=True))
        return reply

    def stream(
        self,
        audio: Audio | None = None,
        *,
        text: str | None = None,
        task: Task | str | None = None,
        sample_rate: int | None = None,
        truncate: bool = False,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Answer while decoding; arguments and errors as of `reply`.

        The turn is in the history from its first chunk on. To interrupt the answer stop reading, and say with
        `interrupt` how much was played: without that, all the audio that was read counts as played.
        """
        request = self._prepare(Request(audio, text, task, sample_rate, truncate), options)
        turn = SpokenTurn(text or "", spoken=request.task.outputs_audio)
        return self._read(turn, self._model.stream_prepared(request))

    def _read(self, turn: SpokenTurn, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks):
            if not number:
                self._turns.append(turn)
            turn.add(chunk)
            yield chunk

    def interrupt(self, seconds: float) -> Turn:
        """Cut the last answer at what was played.

        Args:
            seconds: of its audio that were played.

        Returns:
            The turn as it is now; see `played_text` for the rule.

        Raises:
            ConfigError: there is no turn yet.
        """
        if not self._turns:
            raise ConfigError("interrupt: expected an answer to interrupt, found none")
        self._turns[-1].cut = seconds
        return self._turns[-1].said()

    def save(self, path: str | Path) -> None:
        """Write system text and history as one line of JSON, in the form of chat completions (`messages`).

        `Omni.conversation` reads it, and `omni-jax prepare text` makes training data of such lines.
        """
        line = json.dumps({"messages": to_messages(self.system, self.history)}, ensure_ascii=False)
        Path(path).write_text(line + "\n", encoding="utf-8")

    def _prepare(self, request: Request, options: Mapping[str, Any]) -> PreparedRequest:
        spoken = request.audio is not None
        request = replace(request, system=self.system, history=self.history, transcribe_question=spoken)
        return self._model.prepare(request, **options)


def load_conversation(path: str | Path) -> tuple[str, list[Turn]]:
    """The system text and the turns of a file of `Conversation.save`.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a saved conversation, found {error}") from None
    if not isinstance(values, dict) or "messages" not in values:
        raise ConfigError(f"{path}: expected a saved conversation, found no messages")
    try:
        system, turns, _ = from_messages(values["messages"])
    except ConfigError as error:
        raise error.prefixed(str(path)) from None
    return system, turns
