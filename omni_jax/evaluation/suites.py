"""Suites: lists of questions with their right answers, from manifests and from benchmarks as they are downloaded.

Nothing is downloaded. A case whose recording is missing stays in the suite, and counts as failed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from omni_jax.config.load import build_config
from omni_jax.data.readers import corpus_files, open_parquet, read_parquet
from omni_jax.data.sources import librispeech
from omni_jax.errors import ConfigError, OmniError
from omni_jax.inference.request import Request, Turn
from omni_jax.input_files import parse_json
from omni_jax.tasks import Task


@dataclass(frozen=True)
class RecordedTurn(Turn):
    """A past turn whose question was spoken: what the model gets is its own transcript of the recording."""

    audio: Path = field(kw_only=True)


@dataclass(frozen=True)
class Case:
    """One question of a suite."""

    id: str
    """Unique in its suite."""
    task: Task
    audio: Path | bytes | None = None
    """A recording's file, or its content."""
    text: str = ""
    """The question, where there is no recording."""
    expected: tuple[str, ...] = ()
    """The right answers, any of which counts; empty: only the audio of the answer is measured."""
    question: str = ""
    """Transcript of the recording, for the report."""
    group: str = ""
    """Metrics are also given for each group."""
    system: str = ""
    """Text that the conversation begins with."""
    history: tuple[Turn, ...] = ()
    """The turns before the question, the oldest first; of a `RecordedTurn`, the question is for the report."""

    def request(self) -> Request:
        """As a request."""
        audio = io.BytesIO(self.audio) if isinstance(self.audio, bytes) else self.audio
        return Request(audio, self.text or None, self.task, system=self.system, history=self.history)


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class _PastTurn:
    """A turn in the history of a manifest's line."""

    question: str = ""
    answer: str = ""
    audio: str = ""

    def to_turn(self, folder: Path) -> Turn:
        if self.audio:
            return RecordedTurn(self.question, self.answer, audio=folder / self.audio)
        return Turn(self.question, self.answer)


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class _Row:
    """A line of a manifest."""

    id: str
    task: str = ""
    audio: str = ""
    text: str = ""
    expected: str | list[str] = ""
    question: str = ""
    group: str = ""
    system: str | None = None
    history: list[_PastTurn] | None = None

    @pydantic.field_validator("history", mode="before")
    @classmethod
    def _take_pairs(cls, turns: Any) -> Any:
        """A question and an answer are a turn, too, as in `Request`."""
        if not isinstance(turns, list):
            return turns
        pairs = [isinstance(turn, list) and len(turn) == 2 for turn in turns]
        return [
            dict(zip(("question", "answer"), turn, strict=True)) if pair else turn
            for turn, pair in zip(turns, pairs, strict=True)
        ]


def manifest(path: Path) -> Iterator[Case]:
    """JSON lines: `id`, `audio` (relative to the manifest) or `text`, `task`, `expected` (one or several), `group`.

    And `system` and `history`, whose turns have `question`, `answer` and `audio`.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                values = parse_json(line)
            except ValueError as error:
                raise ConfigError(f"{place}: expected a JSON object, found {error}") from None
            row = build_config(_Row, values, place)
            audio = path.parent / row.audio if row.audio else None
            turns = tuple(turn.to_turn(path.parent) for turn in row.history or ())
            request = Request(audio, row.text or None, row.task or None, system=row.system, history=turns)
            try:
                task = request.resolve_task()
            except ConfigError as error:
                raise error.prefixed(place) from None
            expected = (row.expected,) if isinstance(row.expected, str) else tuple(row.expected)
            answers = tuple(filter(None, expected))
            system = row.system or ""
            yield Case(row.id, task, audio, row.text, answers, row.question, row.group, system, turns)


def libri(path: Path) -> Iterator[Case]:
    """LibriSpeech's `test-clean` and the like, as A1T1."""
    for listing in sorted(path.rglob("*.trans.txt")):
        for audio, text, _ in librispeech(listing.parent):
            yield Case(audio.stem, Task.A1T1, audio, expected=(text,), question=text, group=path.name)


def voicebench(path: Path) -> Iterator[Case]:
    """VoiceBench: a folder of parquet files with `prompt`, `audio` and, if there is a right answer, `reference`.

    Columns: https://huggingface.co/datasets/hlt-lab/voicebench
    """
    for file in corpus_files(path, ".parquet"):
        group = file.parent.name
        groups = range(open_parquet(file, ("prompt", "audio")).num_row_groups)
        for number, row in enumerate(read_parquet(file, groups, batch_size=16)):
            audio = row["audio"].get("bytes") if isinstance(row["audio"], dict) else None
            expected = (row["reference"],) if row.get("reference") else ()
            id = f"{group}-{file.stem}-{number}"
            yield Case(id, Task.A1A2, audio or b"", "", expected, row["prompt"], group)


def uro_bench(path: Path) -> Iterator[Case]:
    """URO-Bench: a folder with `test.jsonl`, or several of them: `source_wav`, `source_text`, `target_text`."""
    listings = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    for listing in listings:
        group = listing.parent.name
        with listing.open(encoding="utf-8") as lines:
            for number, line in enumerate(filter(str.strip, lines)):
                row = parse_json(line)
                target = row.get("target_text") or ()
                expected = (target,) if isinstance(target, str) else tuple(target)
                audio = listing.parent / row["source_wav"]
                yield Case(f"{group}-{number:04d}", Task.A1A2, audio, "", expected, row["source_text"], group)


def open_audio_bench(path: Path) -> Iterator[Case]:
    """Llama Questions, Web Questions and TriviaQA as in OpenAudioBench: `NAME/NAME.csv` and `NAME/audios/*.wav`.

    Columns: question (Questions), answer (Answer, answers, answer_normalized_value and its aliases), audio_filename.
    """
    for listing in sorted(path.rglob("*.csv")):
        group = listing.stem
        with listing.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                question = row.get("question") or row.get("Questions") or ""
                answers = [row.get("Answer") or "", row.get("answer_normalized_value") or ""]
                answers += (row.get("answers") or "").split(";")
                answers += (row.get("answer_normalized_aliases") or "").split(",")
                expected = tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
                name = row.get("audio_filename")
                if not name:
                    raise ConfigError(f"{listing} line {number + 2}: expected the column audio_filename, found none")
                audio = listing.parent / "audios" / name
                yield Case(f"{group}-{number:04d}", Task.A1A2, audio, "", expected, question, group)


SUITES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "manifest": manifest,
    "librispeech": libri,
    "voicebench": voicebench,
    "uro_bench": uro_bench,
    "open_audio_bench": open_audio_bench,
}


def read(name: str, path: Path) -> list[Case]:
    """All cases of a suite.

    Raises:
        ConfigError: there are none, a line can't be used, or two have the same id.
    """
    if not path.exists():
        raise ConfigError(f"{path}: expected a {name} suite, there is no such file or folder")
    try:
        cases = list(SUITES[name](path))
    except OmniError:
        raise
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: expected a {name} suite, found {error!r}") from None
    if not cases:
        raise ConfigError(f"{path}: expected a {name} suite, found no case in it")
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise ConfigError(f"{path}: expected ids that differ, found {case.id!r} twice")
        seen.add(case.id)
    return cases
