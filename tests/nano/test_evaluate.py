"""The examination: asked rightly, counted rightly."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from nano import evaluate, listen
from omni_jax import Omni
from omni_jax.config.model import PRESETS
from omni_jax.data.records import Exchange, RecordWriter
from omni_jax.errors import UntrainedWarning


@pytest.fixture(scope="module")
def omni() -> Omni:
    with pytest.warns(UntrainedWarning):
        return Omni.untrained("tiny")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("held_out_seen", "read_held_out"):
        with RecordWriter(tmp_path / name) as writer:
            for number in range(3):
                sound = None if name.startswith("read") else rng.integers(-5000, 5000, 8000).astype(np.int16)
                question = "" if sound is None else f"Number {number}?"
                codes = rng.integers(0, 64, (3, 7))
                writer.write(Exchange(question, sound, f"Number {number}.", codes, "nano sum pair"))
    return tmp_path


@pytest.mark.parametrize("task", ["A1A2", "A1T1", "T1A1"])
def test_a_task_is_asked_and_its_sound_kept(omni: Omni, records: Path, tmp_path: Path, task: str):
    name = "read_held_out" if task == "T1A1" else "held_out_seen"
    entries = evaluate.examine(omni, records, evaluate.Examination(task, name), 10, 2, tmp_path)
    expected = "question" if task == "A1T1" else "answer"
    texts = {"question": "Number {}?", "answer": "Number {}."}
    assert sorted(entry["expected"] for entry in entries) == [texts[expected].format(number) for number in range(3)]
    files = [tmp_path / entry["file"] for entry in entries if "file" in entry]
    assert len(files) == (0 if task == "A1T1" else 2)
    assert all(file.is_file() for file in files)
    assert entries[0]["kind"] == "sum"
    assert entries[0]["held_out"] == "pair"


def entry(expected: str, decode_text: str, kind: str = "sum", held_out: str = "pair") -> dict[str, object]:
    return {"kind": kind, "held_out": held_out, "question": "?", "expected": expected, "written": decode_text}


def test_scores_are_counted_by_what_was_held_out():
    entries = [
        entry("Two plus two is four.", "Two plus two is four."),
        entry("Two plus two is four.", "Two plus two is five."),
        entry("Moo.", "moo", "sound", "phrasing"),
    ]
    scores = evaluate.scores(entries)
    assert scores["exact"] == pytest.approx(1 / 3, abs=1e-4)
    assert scores["wer"] == pytest.approx(1 / 11, abs=1e-4)
    assert scores["exact_by"] == {"pair": 0.5, "sum": 0.5, "phrasing": 0.0, "sound": 0.0}
    assert evaluate.scores([entry("Read this.", "")]) == {"count": 1}


def test_the_table_says_what_was_written_and_heard(tmp_path: Path):
    found = {
        "speed": {"first_sound": 0.25, "total": 0.5, "real_time_factor": 0.2},
        "examinations": {
            "A1T2 held_out_seen": [entry("Moo.", "Moo.", "sound"), entry("Four.", "Five.")],
            "A1A2 held_out_seen": [
                {**entry("Moo.", "Moo.", "sound"), "file": "a.wav"},
                {**entry("Two, one.", "Two, one.", "count"), "file": "b.wav"},
                {**entry("Three, two.", "Three, two.", "count"), "file": "c.wav"},
                entry("Woof.", "Woof.", "sound"),
            ],
            "T1A1 read_held_out": [{**entry("A cat.", "", "sentence"), "file": "d.wav"}],
        },
    }
    (tmp_path / evaluate.ANSWERS).write_text(json.dumps(found))
    assert "| A1T2 held_out_seen | 2 | 50.0% | 50.0% |  |  |" in evaluate.table(tmp_path)
    assert "as heard |\n|---|---|\n" not in evaluate.table(tmp_path)
    said = [("a", "Moo.", "Moon."), ("b", "Two, one.", "2 1"), ("c", "Three, two.", "3 or 2.")]
    recordings = [
        {"file": f"{name}.wav", "group": "A1A2 held_out_seen", "text": text, "heard": heard}
        for name, text, heard in said
    ]
    recordings.append({"file": "d.wav", "group": "T1A1 read_held_out", "text": "A cat.", "heard": "A cap."})
    summary = {"T1A1 read_held_out": {"recordings": 1, "wer": 0.125, "exact": 0.0}}
    heard = {"summary": summary, "recordings": recordings}
    (tmp_path / listen.HEARD).write_text(json.dumps(heard))
    table = evaluate.table(tmp_path)
    assert "| T1A1 read_held_out | 1 |  |  | 1 | 12.5% |" in table
    assert "first sound after 0.25 s" in table
    assert "| sound | 100% | 100% |" in table
    # One word too many for four.
    assert table.endswith("| WER as heard | A1A2 held_out_seen |\n|---|---|\n| count | 25% |\n| sound | 100% |")


def test_the_clock_times_streamed_answers(omni: Omni, records: Path):
    times = evaluate.clock(omni, records, 1)
    assert 0 < times["first_sound"] <= times["total"]
    assert times["real_time_factor"] > 0


def test_what_was_heard_of_another_model_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stub = SimpleNamespace(config=PRESETS["nano"])
    monkeypatch.setattr(evaluate.Omni, "load", lambda name: stub)
    monkeypatch.setattr(evaluate, "EXAMINATIONS", (evaluate.Examination("T1A1", "read_held_out"),))
    monkeypatch.setattr(evaluate, "examine", lambda *arguments: [])
    (tmp_path / listen.HEARD).write_text("{}")
    result = CliRunner().invoke(evaluate.app, ["ask", "nano", "--out", str(tmp_path), "--only", "t1a1"])
    assert result.exit_code == 2
    assert "expected some of T1A1, found t1a1" in result.output
    assert (tmp_path / listen.HEARD).exists()
    result = CliRunner().invoke(evaluate.app, ["ask", "nano", "--out", str(tmp_path), "--only", "T1A1"])
    assert result.exit_code == 0
    assert not (tmp_path / listen.HEARD).exists()
