"""A corpus prepared by Beam's workers is the corpus prepared here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omni_jax.data import beam
from omni_jax.data.prepare import prepare
from omni_jax.data.sources import TextQA, VoiceAssistant
from omni_jax.errors import ConfigError
from tests.data.test_prepare import lines
from tests.data.test_sources import voice_assistant, voice_assistant_row

TWO_WORKERS = ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


def test_two_workers_write_what_one_process_writes(tmp_path: Path) -> None:
    rows = [voice_assistant_row(question=f"{number}?", answer="" if number == 3 else "a") for number in range(6)]
    voice_assistant(tmp_path / "in", rows, row_group_size=1)
    source = VoiceAssistant(tmp_path / "in")
    here = prepare(source, tmp_path / "here")
    there = prepare(source, tmp_path / "there", beam=TWO_WORKERS)
    assert there == here
    assert there["exchanges"] == 5
    assert shards(tmp_path / "there") == shards(tmp_path / "here")

    # What is done stays done.
    kept, made = (tmp_path / "there" / f"{number:05d}.array_record" for number in (0, 1))
    os.utime(kept, (1, 1))
    (tmp_path / "there" / "00001.note.json").unlink()
    assert prepare(source, tmp_path / "there", beam=["--runner=DirectRunner"]) == here
    assert kept.stat().st_mtime == 1
    assert shards(tmp_path / "there") == shards(tmp_path / "here")
    assert made.is_file()


def test_workers_that_write_elsewhere_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path / "qa.jsonl", 3)
    monkeypatch.setattr(beam, "run", lambda *_: None)
    with pytest.raises(ConfigError, match=r"folder that\s+all of them share"):
        prepare(TextQA(tmp_path / "qa.jsonl"), tmp_path / "out", beam=[])
