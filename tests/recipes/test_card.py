"""The figures of nano: collected from evaluations, and equal in all texts that quote them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from omni_jax.errors import ConfigError
from omni_jax.evaluation.run import Evaluation, Result
from recipes.nano import card


def evaluation(*results: Result) -> Evaluation:
    speed = {"first_audio": 0.1234, "total": 0.5, "steps_per_second": 100.0, "real_time_factor": 0.25}
    return Evaluation("nano", "suite", None, True, list(results), speed)


def result(number: int, task: str, group: str, *, exact: float = 1.0, error: str = "") -> Result:
    scores = {"failed": float(bool(error)), "exact": exact, "wer_edits": 1.0 - exact, "wer_length": 4.0}
    return Result(str(number), task, group, "q", ["a"], "a", error=error, scores=scores)


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    """Evaluations with every section: three of four answers are right; of two sums one, of two products both."""
    sections: dict[str, set[str]] = {}
    for suite, section in card.ROWS.values():
        sections.setdefault(suite, set()).add(section)
    for suite, names in sections.items():
        results = []
        for section in sorted(names):
            task, _, group = section.partition(" ")
            results += [
                result(len(results) + number, task, group or kind, exact=exact)
                for number, (kind, exact) in enumerate([("sum", 0.0), ("sum", 1.0), ("product", 1.0), ("product", 1.0)])
            ]
        # A suite of one group has no sections for it.
        results += [result(99, section.split()[0], "other") for section in names if " " in section][:1]
        folder = tmp_path / "evaluated" / suite
        folder.mkdir(parents=True)
        evaluation(*results).save(folder)
    noise = [result(0, "A1A2", "noise", exact=0.0, error="no speech"), result(1, "A1A2", "noise", exact=0.0)]
    (tmp_path / "evaluated" / "noise").mkdir()
    evaluation(*noise, result(2, "A1A2", "noise")).save(tmp_path / "evaluated" / "noise")
    return tmp_path / "evaluated"


def test_collect_counts_answers(evaluated: Path) -> None:
    figures = card.collect(evaluated)
    assert figures["rows"].keys() == card.ROWS.keys()
    for row in figures["rows"].values():
        assert row["cases"] == 4
        assert row["exact"][0] == 0.75
        assert row["wer"][0] == 1 / 16
    assert figures["noise"] == {"cases": 3, "refused": 1, "taken for a question": 1}
    assert figures["kinds"] == {"product": {"asked": 2, "wrong": 0}, "sum": {"asked": 2, "wrong": 1}}
    assert figures["speed"]["first_audio"] == 0.123


def test_collect_leaves_out_rows_of_evaluations_that_are_missing(evaluated: Path) -> None:
    every = card.collect(evaluated)
    for suite in ("conversation_speech", "typos"):
        shutil.rmtree(evaluated / suite)
    figures = card.collect(evaluated)
    left_out = {name for name, (suite, _) in card.ROWS.items() if suite in ("conversation_speech", "typos")}
    assert len(left_out) == 4
    assert figures["rows"] == {name: row for name, row in every["rows"].items() if name not in left_out}
    table = card.rows_table(figures)
    assert "| A1A2 follow-ups, history from text | 4 | 75.0 %" in table
    assert not [name for name in left_out if name in table]
    shutil.rmtree(evaluated / "natural")
    with pytest.raises(ConfigError, match="natural"):
        card.collect(evaluated)


def test_write_puts_figures_into_texts(evaluated: Path, tmp_path: Path) -> None:
    for name in (*card.TEXTS, card.FIGURES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    places = "".join(f"<!-- card: {table} -->\nold\n<!-- end -->\nafterwards unchanged\n" for table in card.TABLES)
    for name in card.TEXTS:
        (tmp_path / name).write_text(places, encoding="utf-8")
    samples = [
        {"question": "Why?", "answer": "So.", "expected": "No."},
        {"question": "Who?", "answer": "I.", "expected": "I."},
    ]
    card.write(card.collect(evaluated) | {"samples": samples}, tmp_path)
    text = (tmp_path / card.TEXTS[0]).read_text(encoding="utf-8")
    assert "old\n" not in text
    assert text.count("afterwards unchanged") == len(card.TABLES)
    assert "| A1A2 questions, natural voices | 4 | 75.0 %" in text
    assert "| sum | 1 | 2 |" in text
    assert "| product |" not in text
    assert "first audio after 0.12 s" in text
    assert "**Why?** *So.* (expected: No.; [question](nano/sample1-question.wav)" in text
    assert "**Who?** *I.* (right; " in text
    card.write(card.read(tmp_path), tmp_path)
    assert (tmp_path / card.TEXTS[0]).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", card.TEXTS)
def test_texts_have_the_figures(name: str) -> None:
    text = (card.ROOT / name).read_text(encoding="utf-8")
    assert card.PLACE.search(text)
    assert card.fill(text, card.read()) == text
