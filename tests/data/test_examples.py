"""Examples made of single records, and the reasons for which records are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from omni_jax.config.model import PRESETS
from omni_jax.config.run import DataConfig, SourceConfig
from omni_jax.data.examples import REASONS, TASKS, DrawnRecord, ExampleBuilder, RecordsOfTask, SkippedRecord
from omni_jax.data.records import Exchange, PastTurn, Records, RecordWriter, to_bytes
from omni_jax.errors import PipelineError, RecordError
from omni_jax.tasks import Task
from tests import models

MODEL = PRESETS["tiny"]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> ExampleBuilder:
    tokenizer = Tokenizer.from_file(str(models.tokenizer_files(tmp_path_factory.mktemp("tokenizer"))[0]))
    return ExampleBuilder(DataConfig(sources=(SourceConfig("x"),), tasks={"A1A2": 1}, max_length=160), MODEL, tokenizer)


def exchange(**changes: Any) -> Exchange:
    values = {
        "question_text": "is it?",
        "question_audio": np.full(6400, 9, np.int16),
        "answer_text": "so",
        "answer_codes": np.zeros((12, 7), int),
    }
    return Exchange(**values | changes)


def drawn(data: bytes | RecordError, task: Task = Task.A1A2) -> DrawnRecord:
    return DrawnRecord(task, 0, 3, data)


def test_build_speech_task(builder: ExampleBuilder) -> None:
    """6400 samples take 6400 / 320 + 1 = 21 speech positions, after one position that begins the input."""
    features = builder.build(drawn(to_bytes(exchange())))
    assert features["speech_frame"][:23].tolist() == [-1, *range(21), -1]
    assert (features["speech_frame"][22:] == -1).all()
    assert features["clip"].shape == (1,)
    assert TASKS[features["task"]] is Task.A1A2
    np.testing.assert_array_equal(features["sound"], np.full(6400, 9))
    length = len(features["speech_frame"])
    assert {features[name].shape for name in ("tokens", "targets", "mask")} == {(length, 8)}


def test_build_text_task(builder: ExampleBuilder) -> None:
    features = builder.build(drawn(to_bytes(exchange()), Task.T1T2))
    assert (features["speech_frame"] == -1).all()
    assert features["clip"].shape == features["sound"].shape == (0,)


def test_empty_example_has_the_same_features(builder: ExampleBuilder) -> None:
    empty, features = builder.empty(), builder.build(drawn(to_bytes(exchange())))
    assert set(empty) == set(features)
    for name in set(features) - {"task"}:
        assert empty[name].dtype == features[name].dtype
        assert empty[name].shape == (0, *features[name].shape[1:])


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (RecordError("no such record"), "unreadable", "no such record"),
        (b"junk", "unreadable", "truncated"),
        (to_bytes(exchange(answer_text="")), "unsuitable", "it cannot serve A1A2"),
        (to_bytes(exchange(question_audio=np.zeros(32001, np.int16))), "longer_than_encoder", "32001 samples"),
        (to_bytes(exchange(answer_codes=np.zeros((150, 7), int))), "longer_than_row", "positions of 160"),
        (to_bytes(exchange(answer_text="word " * 40)), "refused", "speech at least as long as its text"),
    ],
)
def test_skipped_record_has_a_reason(builder: ExampleBuilder, data: Any, reason: str, message: str) -> None:
    with pytest.raises(SkippedRecord, match=message) as caught:
        builder.build(drawn(data))
    assert caught.value.reason == reason
    assert reason in REASONS


def test_tokenizer_larger_than_the_model_is_refused(builder: ExampleBuilder) -> None:
    small = models.replace(MODEL, vocab=models.replace(MODEL.vocab, text=270))
    with pytest.raises(PipelineError, match=r"^tokenizer: expected at most the model's 270 tokens, found \d+$"):
        ExampleBuilder(builder.data, small, builder.tokenizer)


def test_records_of_task_turn_errors_into_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write(exchange())
    records = RecordsOfTask(Records(tmp_path), Task.A1T1, 2)
    assert len(records) == 1
    assert records[0] == DrawnRecord(Task.A1T1, 2, 0, to_bytes(exchange()))

    def fail(*_: object) -> bytes:
        raise RecordError("damaged")

    monkeypatch.setattr(Records, "__getitem__", fail)
    assert isinstance(records[0].data, RecordError)


HISTORY = (PastTurn("who?", "me", True), PastTurn("not?", "so", False))


def test_build_turn_of_a_conversation(builder: ExampleBuilder) -> None:
    """History as text, then the present turn as it is without one; trained past answers count, too."""
    turn = exchange(system="a b", history=HISTORY)
    plain, built = builder.build(drawn(to_bytes(exchange()))), builder.build(drawn(to_bytes(turn)))
    past = len(built["tokens"]) - len(plain["tokens"])
    text = [builder.tokenizer.encode(text).ids for text in ("a b", "who?", "me", "not?", "so")]
    assert past == sum(map(len, text)) + 2 * 5
    assert (built["tokens"][:past, :7] == MODEL.vocab.audio + 1).all()
    for name in ("tokens", "targets", "mask"):
        np.testing.assert_array_equal(built[name][past:], plain[name])
    np.testing.assert_array_equal(built["speech_frame"], [-1] * past + plain["speech_frame"].tolist())
    begin = sum(map(len, text[:2])) + 2 * 2 + 1
    counted = np.flatnonzero(built["mask"][:past, 7])
    assert counted.tolist() == list(range(begin - 1, begin + len(text[2])))
    assert built["targets"][counted, 7].tolist() == [*text[2], MODEL.vocab.text]


@pytest.mark.parametrize("task", [Task.A1T1, Task.T1A1])
def test_transcripts_and_reading_aloud_have_no_history(builder: ExampleBuilder, task: Task) -> None:
    plain = builder.build(drawn(to_bytes(exchange()), task))
    built = builder.build(drawn(to_bytes(exchange(system="a b", history=HISTORY)), task))
    for name, value in plain.items():
        np.testing.assert_array_equal(built[name], value)


def test_oldest_turns_are_left_out_of_a_row(builder: ExampleBuilder) -> None:
    history = tuple(PastTurn("question " * 4, "answer " * 3, True) for _ in range(9))
    built = builder.build(drawn(to_bytes(exchange(history=history))))
    assert len(built["tokens"]) <= 160
    assert built["mask"][:, 7].sum() > len("so")
    with pytest.raises(SkippedRecord, match="positions of 160"):
        builder.build(drawn(to_bytes(exchange(system="word " * 40))))
