"""`Request`: one thing to answer, checked without a model. Importing it imports no JAX."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from omni_jax.audio import io as audio_io
from omni_jax.errors import ConfigError
from omni_jax.inference.generation import GenerationConfig
from omni_jax.tasks import Task

if TYPE_CHECKING:
    import jax

Audio: TypeAlias = "str | Path | bytes | BinaryIO | np.ndarray | jax.Array | tuple[int, np.ndarray]"
"""A recording: the path of a file, its bytes, a binary file object; or samples, alone or as `(rate, samples)`.

Samples are float within -1..1, uint8, int16 or int32; [samples], [samples, channels] or [channels, samples].
"""


@dataclass(frozen=True)
class Turn:
    """A past turn of a conversation, as text: what was asked, and what was answered. Either may be empty."""

    question: str = ""
    answer: str = ""

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            if not isinstance(value := getattr(self, name), str):
                raise ConfigError(f"{name}: expected a string, found {type(value).__name__}", field=name)

    @classmethod
    def of(cls, source: Turn | Mapping[str, Any] | Sequence[str]) -> Turn:
        """A turn, a dict of its fields, or a question and an answer.

        Raises:
            ConfigError: it is something else.
        """
        if isinstance(source, Turn):
            return source
        if isinstance(source, Mapping) and set(source) <= {"question", "answer"}:
            return cls(**source)
        if isinstance(source, (tuple, list)) and len(source) == 2:
            return cls(*source)
        raise ConfigError(f"expected a question and an answer, found {reprlib.repr(source)}")


@dataclass(frozen=True)
class Request:
    """One thing to answer: exactly one of `audio` and `text`.

    Without a task, the answer is text and speech (A1A2 or T1A2). `system` and `history` need a model that was trained
    for conversations, and a task other than A1T1 and T1A1.
    """

    audio: Audio | None = None
    text: str | None = None
    task: Task | str | None = None
    sample_rate: int | None = None
    """Samples per second, when `audio` is an array without its rate; a file has its own."""
    truncate: bool = False
    """Use only the beginning of a recording that is too long for the audio encoder, instead of refusing it."""
    config: GenerationConfig | None = None
    """None: the defaults, or the config that the caller gives for all requests."""
    name: str = field(default="array", kw_only=True)
    """What error messages call an array."""
    system: str | None = field(default=None, kw_only=True)
    """Text that a conversation begins with, such as a name or a manner."""
    history: Sequence[Turn] = field(default=(), kw_only=True)
    """The turns before this one, the oldest first; anything that `Turn.of` takes."""
    transcribe_question: bool = field(default=False, kw_only=True)
    """Whether the model also transcribes the recording, next to the answer: `Chunk.question`, `Reply.question`."""

    def __post_init__(self) -> None:
        if not isinstance(self.system, str | None):
            raise ConfigError(f"system: expected a string, found {type(self.system).__name__}", field="system")
        if isinstance(self.history, str) or not isinstance(self.history, Sequence):
            found = type(self.history).__name__
            raise ConfigError(f"history: expected a list of turns, found {found}", field="history")
        turns = []
        for index, turn in enumerate(self.history):
            try:
                turns.append(Turn.of(turn))
            except ConfigError as error:
                raise ConfigError(f"history[{index}]: {error}", field="history") from None
        object.__setattr__(self, "history", tuple(turns))
        if not isinstance(self.transcribe_question, bool):
            raise ConfigError(
                f"transcribe_question: expected True or False, found {self.transcribe_question!r}",
                field="transcribe_question",
            )
        if not isinstance(self.config, GenerationConfig | None):
            found = type(self.config).__name__
            raise ConfigError(
                f"config: expected a GenerationConfig or a dict of options, found {found}", field="config"
            )

    @classmethod
    def of(cls, source: Request | Mapping[str, Any] | str | Path) -> Request:
        """A request, a dict of its fields, or the path of a recording as a request.

        Raises:
            ConfigError: it is something else, or has unknown fields.
        """
        if isinstance(source, Request):
            return source
        if isinstance(source, (str, Path)):
            return cls(audio=source)
        if not isinstance(source, Mapping):
            raise ConfigError(
                f"request: expected a Request, a dict of its fields or a path, found {type(source).__name__}"
            )
        known = cls.__dataclass_fields__
        if unknown := [str(name) for name in source if name not in known]:
            raise ConfigError(
                f"request: expected some of {', '.join(known)}, found {', '.join(unknown)}", field=unknown[0]
            )
        values = dict(source)
        if isinstance(values.get("config"), Mapping):
            values["config"] = GenerationConfig.from_dict(values["config"])
        return cls(**values)

    def resolve_task(self) -> Task:
        """The task, checked against the input. Needs no model, so that bad requests are refused before one is loaded.

        Raises:
            ConfigError: there is no such task, it does not fit the input, or there is not exactly one input.
        """
        if (self.audio is None) == (self.text is None):
            found = "neither" if self.text is None else "both"
            raise ConfigError(f"request: expected either audio or text, found {found}")
        default = Task.T1A2 if self.audio is None else Task.A1A2
        try:
            task = Task(self.task or default)
        except ValueError:
            raise ConfigError(f"task: expected one of {', '.join(Task)}, found {self.task!r}", field="task") from None
        if task.takes_audio != (self.audio is not None):
            expected, found = ("audio", "text") if task.takes_audio else ("text", "audio")
            raise ConfigError(f"task {task}: expected {expected}, found {found}", field="task")
        if task in (Task.A1T1, Task.T1A1):
            for name in ("system", "history"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}: expected none for task {task}, which depends on nothing else", field=name
                    )
        if self.transcribe_question and (task is Task.A1T1 or not task.takes_audio):
            raise ConfigError(
                f"transcribe_question: expected a task that answers speech, found {task}", field="transcribe_question"
            )
        return task

    @property
    def _is_file(self) -> bool:
        """Whether the recording is a file, or its bytes: something with a sample rate of its own."""
        return isinstance(self.audio, (str, Path, bytes, bytearray, memoryview)) or hasattr(self.audio, "read")

    @property
    def source_name(self) -> str:
        """What error messages call the recording."""
        source: Any = self.audio
        return audio_io.source_name(source) if self._is_file else self.name

    def samples(self, max_samples: int) -> np.ndarray:
        """The recording, f32 [samples] at 16 kHz.

        Args:
            max_samples: the limit, which `truncate` applies to.

        Raises:
            AudioError: it cannot be used, or is too long.
            ConfigError: its sample rate is missing or given twice.
        """
        source: Any = self.audio
        rate = self.sample_rate
        name = self.source_name
        if rate is not None and (self._is_file or isinstance(source, tuple)):
            raise ConfigError(f"sample_rate: expected none, as {name} has its own, found {rate}", field="sample_rate")
        if self._is_file:
            max_seconds = max_samples / audio_io.SAMPLE_RATE
            audio = audio_io.read_audio(source, max_seconds=max_seconds, truncate=self.truncate)
        else:
            if isinstance(source, tuple):
                rate, source = _rate_and_array(source)
            if rate is None:
                raise ConfigError(
                    "sample_rate: expected the samples per second of the array, found none", field="sample_rate"
                )
            if not isinstance(rate, Real):
                raise ConfigError(f"sample_rate: expected a number, found {rate!r}", field="sample_rate")
            audio = audio_io.to_mono(source, rate, name=name)
        return audio_io.check_duration(audio, max_samples, truncate=self.truncate, name=name)


def _rate_and_array(source: tuple[Any, ...]) -> tuple[int, Any]:
    """The two things of a tuple: SciPy and Gradio have the rate first, soundfile and librosa the samples."""
    if len(source) == 2:
        for rate, array in (source, source[::-1]):
            if isinstance(rate, (int, np.integer)) and np.ndim(array):
                return int(rate), array
    found = ", ".join(type(value).__name__ for value in source)
    raise ConfigError(f"audio: expected a tuple of a rate and an array, found ({found})", field="audio")
