from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.shell import run, write_lines

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.slow
def test_evaluate_command(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "hello", "expected": "x"}, {"id": "b", "text": "again"}]
    manifest = write_lines(tmp_path / "m.jsonl", rows)
    command = ("evaluate", manifest, "--model", "tiny", "--max-steps", 12, "--out")
    done = run(*command, tmp_path / "one")
    assert done.exit_code == 0, done.output
    assert "untrained" in done.stdout
    assert (tmp_path / "one" / "report.html").is_file()
    again = run(*command, tmp_path / "two", "--against", tmp_path / "one")
    assert "## Against tiny" in again.stdout
    missing = write_lines(tmp_path / "missing.jsonl", [{"id": "a", "audio": "none.wav"}])
    failed = run("evaluate", missing, "--model", "tiny", "--out", tmp_path / "failed")
    assert failed.exit_code == 1
    assert "every case failed; the first: " in failed.stderr
    for wrong, message in (
        (["--asr-judge", "unknown"], "ASR judge: expected"),
        (["--suite", "librispeech"], "found no case"),
    ):
        refused = run(*command, tmp_path / "three", *wrong)
        assert refused.exit_code == 2
        assert message in refused.output
