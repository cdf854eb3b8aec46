"""The manifest job as a library function. `tests/cli/test_batch.py` has the rest of its behavior."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.batch import BatchSummary, answer_manifest, read_rows
from omni_jax.errors import ConfigError, FolderInUseError, UntrainedWarning
from omni_jax.inference.generation import GenerationConfig
from omni_jax.inference.request import Request, Turn
from tests.inference.reference_decoder import small_omni

CONFIG = GenerationConfig(max_steps=3)


@pytest.fixture(scope="module")
def tiny() -> Omni:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        return Omni.untrained("tiny")


def write_manifest(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answer_manifest(tiny: Omni, tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        {"id": "a", "text": "hello"},
        {"id": "b"},
        {"id": "c", "text": "hello", "task": "T1T2", "max_steps": None, "temperature": 1.0, "seed": 4},
    )
    progress: list[tuple[int, int]] = []
    loads: list[str] = []

    def load() -> Omni:
        loads.append("tiny")
        return tiny

    def job(model_id: str = "tiny") -> BatchSummary:
        return answer_manifest(
            load, manifest, tmp_path / "out", model_id=model_id, config=CONFIG, max_batch_size=2,
            progress=lambda done, total: progress.append((done, total)),
        )  # fmt: skip

    path = tmp_path / "out" / "answers.jsonl"
    assert job() == BatchSummary(path, num_rows=3, num_answered=2, num_kept=0, num_failed=1)
    assert progress == [(0, 3), (3, 3)]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["id"] for record in records] == ["a", "b", "c"]
    assert records[0]["text"] == tiny.reply(text="hello", max_steps=3).text
    assert records[1]["error"] == "m.jsonl line 2: request: expected either audio or text, found neither"
    assert records[2]["text"] == tiny.answer(text="hello", max_steps=3, temperature=1.0, seed=4).text

    # The failed row needs no model to fail again.
    assert job() == BatchSummary(path, num_rows=3, num_answered=0, num_kept=2, num_failed=1)
    assert loads == ["tiny"]
    assert job("another") == BatchSummary(path, num_rows=3, num_answered=2, num_kept=0, num_failed=1)


def test_a_row_that_fails_does_not_stop_the_others(tiny: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["hello", "unprepared", "bad", "good morning"]
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        *({"id": text, "text": text, "task": "T1T2"} for text in texts),
        {"id": "k", "text": "a", "top_k": 10**12},
        {"id": "t", "text": "a", "temperature": 1000},
    )
    with manifest.open("a") as file:
        file.write('{"id": "deep", "text": ' + "[" * 100_000 + "\n")
    prepare, run = tiny.prepare, tiny.run

    def failing_prepare(request: Any) -> Any:
        if request.text == "unprepared":
            raise OverflowError("too large")
        return prepare(request)

    bad = prepare({"text": "bad", "task": "T1T2"})

    def failing_run(requests: Any, max_batch_size: int = 8) -> Any:
        if any(np.array_equal(request.prompt.tokens, bad.prompt.tokens) for request in requests):
            raise MemoryError("no room\nat all")
        return run(requests, max_batch_size)

    monkeypatch.setattr(tiny, "prepare", failing_prepare)
    monkeypatch.setattr(tiny, "run", failing_run)
    out = tmp_path / "out"
    summary = answer_manifest(lambda: tiny, manifest, out, model_id="tiny", config=CONFIG, max_batch_size=2)
    assert (summary.num_answered, summary.num_failed) == (2, 5)
    records = [json.loads(line) for line in summary.path.read_text().splitlines()]
    errors = [record.get("error") for record in records]
    assert errors[0] is errors[3] is None
    assert errors[1] == "m.jsonl line 2: could not be prepared: OverflowError: too large"
    assert errors[2] == "could not be answered: MemoryError: no room"
    assert "top_k: expected a whole number, 0 (all) to 2^31-1, found 1000000000000" in errors[4]
    assert "temperature: expected a number, 0 to 100" in errors[5]
    assert "line 7: expected a JSON object" in errors[6]


def test_answer_manifest_overwrites_nothing_if_the_model_cannot_be_loaded(tiny: Omni, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"id": "a", "text": "x", "task": "T1T2"})
    out = tmp_path / "out"
    answer_manifest(lambda: tiny, manifest, out, model_id="tiny", config=CONFIG)
    before = (out / "answers.jsonl").read_bytes()

    def fail() -> Omni:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        answer_manifest(fail, manifest, out, model_id="other", config=CONFIG)
    assert (out / "answers.jsonl").read_bytes() == before


def test_answer_manifest_drops_damaged_answers_and_refuses_a_pipe_of_them(tiny: Omni, tmp_path: Path) -> None:
    manifest, out = write_manifest(tmp_path / "m.jsonl", {"id": "a", "text": "x", "task": "T1T2"}), tmp_path / "out"
    path = answer_manifest(lambda: tiny, manifest, out, model_id="tiny", config=CONFIG).path
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "audio": 5}) + "\n" + json.dumps(record)[:-9])
    assert answer_manifest(lambda: tiny, manifest, out, model_id="tiny", config=CONFIG).num_answered == 1
    assert json.loads(path.read_text()) == record
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"answers\.jsonl: expected earlier answers, found a pipe"):
        answer_manifest(lambda: tiny, manifest, out, model_id="tiny", config=CONFIG)


def test_answer_manifest_refuses_a_folder_that_another_job_writes_to(tiny: Omni, tmp_path: Path) -> None:
    manifest, out = write_manifest(tmp_path / "m.jsonl", {"id": "a", "text": "x", "task": "T1T2"}), tmp_path / "out"

    def load() -> Omni:
        # A second job starts while this one loads its model.
        with pytest.raises(FolderInUseError, match="found `omni-jax batch` of "):
            answer_manifest(lambda: tiny, manifest, out, model_id="tiny", config=CONFIG)
        return tiny

    assert answer_manifest(load, manifest, out, model_id="tiny", config=CONFIG).num_answered == 1
    assert [path.name for path in out.iterdir()] == ["answers.jsonl"]


def test_answer_manifest_takes_its_share_of_the_rows(tiny: Omni, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", *({"id": f"{n}", "text": "x", "task": "T1T2"} for n in range(3)))
    for index in range(2):
        summary = answer_manifest(
            lambda: tiny, manifest, tmp_path / "out", model_id="tiny", config=CONFIG, process_index=index,
            num_processes=2,
        )  # fmt: skip
        ids = [json.loads(line)["id"] for line in summary.path.read_text().splitlines()]
        assert ids == [["0", "2"], ["1"]][index]


def test_row_options_override_the_defaults(tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        {"id": "a", "audio": "a.wav"},
        {"id": "b", "audio": "b.wav", "truncate": False, "task": "A1T1", "top_k": 5, "batch_parallel": False},
    )
    defaults = Request(task="A1T2", truncate=True, config=GenerationConfig(seed=3))
    first, second = (row.request for row in read_rows(manifest, tmp_path / "out", defaults))
    assert first == Request(tmp_path / "a.wav", task="A1T2", truncate=True, config=GenerationConfig(seed=3))
    config = GenerationConfig(seed=3, top_k=5, batch_parallel=False)
    assert second == Request(tmp_path / "b.wav", task="A1T1", truncate=False, config=config)


def test_rows_with_a_history_are_answered_with_it(tmp_path: Path) -> None:
    omni = small_omni(text_specials=7, conversation=True, max_position=128)
    config = GenerationConfig(max_steps=20, temperature=2)
    turn, question = {"question": "Hi?", "answer": "Yes"}, {"text": "Two?", "task": "T1T2"}
    rows: list[dict[str, Any]] = [
        {"id": "first", **question},
        {"id": "told", **question, "system": "Bob", "history": [turn]},
        {"id": "empty", **question, "system": None, "history": None},
    ]

    def job(*rows: dict[str, Any], omni: Omni = omni, model_id: str = "talker") -> BatchSummary:
        manifest = write_manifest(tmp_path / "m.jsonl", *rows)
        return answer_manifest(lambda: omni, manifest, tmp_path / "out", model_id=model_id, config=config)

    summary = job(*rows)
    records = [json.loads(line) for line in summary.path.read_text().splitlines()]
    told = omni.generate(Request(text="Two?", task="T1T2", system="Bob", history=[Turn("Hi?", "Yes")]), config=config)
    assert records[1]["text"] == told.text
    assert records[0]["text"] == records[2]["text"] != told.text
    assert job(*rows).num_kept == 3
    rows[1]["history"] = [{**turn, "answer": "No"}]
    assert job(*rows).num_kept == 2

    assert job(rows[1], omni=small_omni(), model_id="plain").num_failed == 1
    (record,) = map(json.loads, summary.path.read_text().splitlines())
    assert record["error"] == (
        "system: expected none: this model was not trained on conversations (conversation of its config)"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"history": 0}, "m.jsonl line 1: history: expected a list of turns, found int"),
        ({"history": [["Hi?", "Yes"], "x" * 9000]}, "m.jsonl line 1: history[1]: expected a question and an"),
        ({"history": [{"question": 1}]}, "m.jsonl line 1: history[0]: question: expected a string, found int"),
        ({"system": 5}, "m.jsonl line 1: system: Input should be a valid string, found 5"),
        ({"history": [["Hi?", "Yes"]], "task": "T1A1"}, "m.jsonl line 1: history: expected none for task T1A1"),
    ],
)  # fmt: skip
def test_histories_that_are_none_are_errors_of_their_rows(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", {"id": "a", "text": "x", **fields})
    (row,) = read_rows(manifest, tmp_path / "out", Request(config=CONFIG))
    assert row.error.startswith(message)
    assert len(row.error) < 200


def test_rows_whose_ids_differ_in_case_have_different_wav_files(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", *({"id": id, "text": "x"} for id in ("A", "a")))
    rows = read_rows(manifest, tmp_path, Request(config=CONFIG))
    assert len({row.wav.casefold() for row in rows}) == 2


def test_rows_that_a_parser_would_fail_at_are_errors_of_these_rows(tmp_path: Path) -> None:
    good = '{"id": "good", "text": "hello"}'
    bad = {
        "[" * 100_000: "more than 64 levels",
        '{"id": "a", "text": ' + '{"a":' * 100_000: "more than 64 levels",
        '{"id": "a", "text": "x", "seed": ' + "9" * 10_000 + "}": "a number of 10000 digits",
        '{"id": "a", "text": "x", "temperature": NaN}': "NaN, which is not JSON",
        '{"id": "a", "text": "x", "text": "y"}': "the key 'text' twice",
        '{"id": "a", "text": "x", "' + "k" * 100_000 + '": 1}': "Unexpected keyword argument",
        '{"id": "a", "text": ' + json.dumps(["x"] * 100_000) + "}": "Input should be a valid string",
    }
    (tmp_path / "m.jsonl").write_text("\n".join([good, *bad]))
    first, *rows = read_rows(tmp_path / "m.jsonl", tmp_path / "out", Request(config=CONFIG))
    assert first.request is not None
    for number, (row, message) in enumerate(zip(rows, bad.values(), strict=True), 2):
        assert row.error.startswith(f"m.jsonl line {number}: ")
        assert message in row.error
        assert len(row.error) < 1000


def test_manifest_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(ConfigError, match=r"m\.jsonl: expected a manifest or a folder, found a pipe"):
        read_rows(tmp_path / "m.jsonl", tmp_path / "out", Request(config=CONFIG))
