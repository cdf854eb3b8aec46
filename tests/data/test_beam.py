"""Preparing a corpus with Beam's workers gives the same files as in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import omni_jax.data
from omni_jax.data import beam
from omni_jax.data.prepare import prepare
from omni_jax.data.sources import TextQA, VoiceAssistant
from omni_jax.errors import ConfigError, MissingExtraError
from tests.data.test_prepare import write_questions
from tests.data.test_sources import voice_assistant, voice_assistant_row

TWO_WORKERS = ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


def test_beam_writes_the_same_shards_and_resumes(tmp_path: Path) -> None:
    rows = [voice_assistant_row(question=f"{number}?", answer="" if number == 3 else "a") for number in range(6)]
    voice_assistant(tmp_path / "in", rows, row_group_size=1)
    source = VoiceAssistant(tmp_path / "in")
    here = prepare(source, tmp_path / "here")
    there = prepare(source, tmp_path / "there", beam=TWO_WORKERS)
    assert there == here
    assert there["exchanges"] == 5
    assert shards(tmp_path / "there") == shards(tmp_path / "here")

    # Resuming writes only the shard without a manifest.
    kept, removed = (tmp_path / "there" / f"{number:05d}.array_record" for number in (0, 1))
    os.utime(kept, (1, 1))
    (tmp_path / "there" / "00001.manifest.json").unlink()
    assert prepare(source, tmp_path / "there", beam=["--runner=DirectRunner"]) == here
    assert kept.stat().st_mtime == 1
    assert shards(tmp_path / "there") == shards(tmp_path / "here")
    assert removed.is_file()


def test_beam_workers_without_shared_folder_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "qa.jsonl", 3)
    monkeypatch.setattr(beam, "run", lambda *_: None)
    with pytest.raises(ConfigError, match=r"folder that\s+all of them share"):
        prepare(TextQA(tmp_path / "qa.jsonl"), tmp_path / "out", beam=[])


def test_missing_beam_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "qa.jsonl", 3)
    # Both: the submodule that an earlier test has imported is an attribute of its package.
    monkeypatch.delattr(omni_jax.data, "beam")
    monkeypatch.setitem(sys.modules, "omni_jax.data.beam", None)
    with pytest.raises(MissingExtraError, match=r"Apache Beam.*pip install 'omni-jax\[beam\]'") as caught:
        prepare(TextQA(tmp_path / "qa.jsonl"), tmp_path / "out", beam=[])
    assert caught.value.extra == "beam"
