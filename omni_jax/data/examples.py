"""Makes training examples of records: reads a record, checks that it can serve a task, and applies the prompts."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from omni_jax.config.model import ModelConfig
from omni_jax.config.run import DataConfig
from omni_jax.data.cached_features import CachedFeatures, StoredFeatures
from omni_jax.data.records import Exchange, Records, from_bytes, serves
from omni_jax.errors import PipelineError, RecordError
from omni_jax.prompts import (
    Example,
    History,
    after_history,
    example,
    history_room,
    make_history,
    max_speech_positions,
    speech_positions,
    speech_prompt,
    text_prompt,
)
from omni_jax.tasks import Task
from omni_jax.tokenizer import encode_text, num_rows
from omni_jax.vocab import NUM_STREAMS, Vocab

TASKS = tuple(Task)
"""The order of the tasks in `examples` of a batch."""
REASONS = ("unreadable", "unsuitable", "longer_than_encoder", "longer_than_row", "refused")
"""Why a record is skipped: it is damaged; it lacks what the task needs, although its source is configured to serve
it; its question is longer than the audio encoder's input; its example is longer than a row; or `omni_jax.prompts`
refuses it (its text is empty, or takes longer than its speech)."""

_NO_AUDIO = np.zeros(0, np.int16)


@dataclass(frozen=True)
class DrawnRecord:
    """The bytes of a record, and the task that it was drawn for."""

    task: Task
    source: int
    """Index of its source."""
    record: int
    """Index of the record in its source."""
    data: bytes | RecordError
    """An error if the record could not be read."""
    features: StoredFeatures | None = None
    """Of its question, if features are cached."""


class RecordsOfTask:
    """The records of a source, drawn for a task; a random access source of Grain.

    A record that cannot be read gives an error as its data, because an exception would end the Grain iterator.
    """

    def __init__(self, records: Records, task: Task, source: int, cache: CachedFeatures | None = None):
        self.records = records
        self.task = task
        self.source = source
        self.cache = cache if task.takes_audio else None
        self.versions = 1 if self.cache is None else self.cache.versions

    def __len__(self) -> int:
        """Every version of a record is drawn before any is drawn again."""
        return len(self.records) * self.versions

    def __getitem__(self, index: int) -> DrawnRecord:
        record, version = divmod(index, self.versions)
        data: bytes | RecordError
        features = None
        try:
            data = self.records[record]
            if self.cache is not None:
                features = self.cache.read(record, version)
        except RecordError as error:
            data = error
        return DrawnRecord(self.task, self.source, record, data, features)


class SkippedRecord(Exception):  # noqa: N818 - an outcome, not an error
    """A record that cannot be used.

    Attributes:
        reason: one of `REASONS`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ExampleBuilder:
    """Makes an example of a drawn record.

    Raises:
        PipelineError: the tokenizer has more tokens than the model.
    """

    data: DataConfig
    model: ModelConfig
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        size, limit = num_rows(self.tokenizer), self.model.vocab.text
        if size > limit:
            raise PipelineError(f"tokenizer: expected at most the model's {limit} tokens, found {size}")

    @functools.cached_property
    def vocab(self) -> Vocab:
        """The model's token layout."""
        return Vocab(self.model.vocab)

    @property
    def max_speech_positions(self) -> int:
        """Speech positions of a recording of the greatest length (A)."""
        return max_speech_positions(self.model)

    @property
    def cached(self) -> bool:
        """Whether questions are cached features instead of recordings."""
        return self.data.cached_features is not None

    @property
    def sound_name(self) -> str:
        """Name of the questions in a batch."""
        return "features" if self.cached else "sound"

    @property
    def sound_shape(self) -> tuple[int, ...]:
        """Shape of a question in a batch: [samples], or [frames, D] of cached features."""
        encoder = self.model.audio_encoder
        return (encoder.max_position, encoder.hidden_size) if self.cached else (encoder.max_samples,)

    @property
    def sound_dtype(self) -> Any:
        """Type of the questions in a batch."""
        cached = self.data.cached_features
        if cached is None:
            return np.int16
        return np.float32 if cached.dtype == "float32" else np.float16

    def build(self, drawn: DrawnRecord) -> dict[str, Any]:
        """The features of an example, as the packer takes them.

        Returns:
            `tokens`, `targets` int32 [T, 8] and `mask` bool [T, 8]; `speech_frame` int32 [T], the speech position
            (0..A-1) whose embedding replaces the tokens' at each position, -1 for none; `clip` int8 [1], or [0] for a
            text task; `task` int, index in `TASKS`; `sound` int16 [samples], or cached features [frames, D]; empty for
            a text task.

        Raises:
            SkippedRecord: the record cannot be used.
        """
        if isinstance(drawn.data, RecordError):
            raise SkippedRecord("unreadable", str(drawn.data))
        task = drawn.task
        try:
            decode = task.takes_audio and not self.cached
            exchange = from_bytes(drawn.data, codebook_size=self.model.vocab.audio, audio=decode)
        except RecordError as error:
            raise SkippedRecord("unreadable", str(error)) from None
        if drawn.features is not None:
            exchange = replace(exchange, question_audio=_NO_AUDIO)
        if task not in serves(exchange):
            raise SkippedRecord("unsuitable", f"it cannot serve {task}")
        audio = _NO_AUDIO if exchange.question_audio is None else exchange.question_audio
        samples = len(audio) if drawn.features is None else drawn.features.samples
        if samples > self.model.audio_encoder.max_samples:
            raise SkippedRecord("longer_than_encoder", f"its question has {samples} samples")
        built = self._apply_prompt(task, exchange, samples)
        length, max_length = built.tokens.shape[1], self.data.max_length
        if length > max_length:
            raise SkippedRecord("longer_than_row", f"its example takes {length} positions of {max_length}")
        speech_frame = np.full(length, -1, np.int32)
        start = built.speech_start
        speech_frame[start : start + built.speech_positions] = np.arange(built.speech_positions)
        return {
            "tokens": built.tokens.T,
            "targets": built.targets.T,
            "mask": built.mask.T,
            "speech_frame": speech_frame,
            "clip": np.ones(int(task.takes_audio), np.int8),
            "task": TASKS.index(task),
            "sound": audio if drawn.features is None else drawn.features.features,
        }

    def empty(self) -> dict[str, Any]:
        """An example without positions, which carries the counts of records skipped at the end of the data."""
        tokens = np.zeros((0, NUM_STREAMS), np.int32)
        return {
            "tokens": tokens,
            "targets": tokens,
            "mask": tokens.astype(bool),
            "speech_frame": np.zeros(0, np.int32),
            "clip": np.zeros(0, np.int8),
            "task": -1,
            "sound": _NO_AUDIO,
        }

    def _apply_prompt(self, task: Task, exchange: Exchange, samples: int) -> Example:
        max_frames, stack = self.model.audio_encoder.max_position, self.model.adapter.stack
        try:
            if task.takes_audio:
                prompt = speech_prompt(task, speech_positions(samples, max_frames, stack), self.vocab)
            else:
                question = exchange.answer_text if task is Task.T1A1 else exchange.question_text
                prompt = text_prompt(task, self._encode(question), self.vocab)
            trained: list[bool] = []
            if exchange.in_conversation and task not in (Task.A1T1, Task.T1A1):
                prompt = after_history(self._history(exchange, len(prompt)), prompt)
                trained = [turn.trained for turn in exchange.history]
            answer = exchange.question_text if task is Task.A1T1 else exchange.answer_text
            text = self._encode(answer) if task.outputs_text else []
            return example(prompt, text, exchange.answer_codes if task.outputs_audio else None, self.vocab, trained)
        except ValueError as error:
            raise SkippedRecord("refused", str(error)) from None

    def _history(self, exchange: Exchange, present: int) -> History:
        """What precedes an exchange whose prompt takes `present` positions; it has to fit a row, too."""
        room = history_room(min(self.model.trunk.max_position, self.data.max_length), present)
        turns = [(self._encode(turn.question), self._encode(turn.answer)) for turn in exchange.history]
        return make_history(self._encode(exchange.system), turns, room, self.vocab)

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text)
