from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_jax.api import Omni
from omni_jax.cli import demo
from tests.cli.shell import STEPS, SUM, run


def test_demo_answers_every_recording(
    tiny: Omni, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MAX_STEPS", STEPS)
    result = run("demo", "--model", "tiny", "--out", tmp_path / "new" / "demo")
    assert result.exit_code == 0, result.output
    assert "untrained" in result.stderr
    blocks = [block.splitlines() for block in result.stdout.strip().split("\n\n")]
    assert [block[0].split(",")[0] for block in blocks] == ["day.wav", "name.wav", "sum.wav"]
    for block in blocks:
        assert [line.split()[0] for line in block[-4:]] == ["transcript:", "answer:", "audio:", "timing:"]
    expected = tiny.reply(SUM, max_steps=STEPS)
    sound, _ = soundfile.read(tmp_path / "new" / "demo" / "sum.wav", dtype="float32")
    assert expected.audio is not None
    np.testing.assert_allclose(sound, np.clip(expected.audio, -1, 1), atol=1e-4)
    (tmp_path / "file").touch()
    refused = run("demo", "--model", "tiny", "--out", tmp_path / "file")
    assert (refused.exit_code, "--out" in refused.stderr) == (2, True)
