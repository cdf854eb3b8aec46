from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.cli.records import beam_options
from omni_jax.errors import ConfigError
from tests.cli.shell import run, write_lines


def test_beam_options() -> None:
    assert beam_options(None, 2, None) is None
    assert beam_options("DataflowRunner", 2, ["--project=p"]) == ["--runner=DataflowRunner", "--project=p"]
    assert beam_options("DirectRunner", 1, None) == ["--runner=DirectRunner", "--direct_num_workers=1"]
    assert "--direct_running_mode=multi_processing" in (beam_options("DirectRunner", 2, None) or ())
    with pytest.raises(ConfigError, match="expected --runner before options for it, found --project=p"):
        beam_options(None, 2, ["--project=p"])


def test_prepare_of_a_source_from_which_nothing_is_left_exits_with_1(tmp_path: Path) -> None:
    rows = [{"question_text": "q"}, {"question_text": "q", "answer_text": "a"}]
    done = run("prepare", "manifest", write_lines(tmp_path / "m.jsonl", rows), "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    done = run("prepare", "manifest", write_lines(tmp_path / "n.jsonl", rows[:1]), "--out", tmp_path / "none")
    assert done.exit_code == 1
    assert "rejected, serves no task: 1" in done.stderr
    assert "no row could be used" in done.stderr
