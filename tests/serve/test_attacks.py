"""The benchmark of attacks, with a small release."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_another_client_is_answered_under_attack(tiny_release: Path) -> None:
    chosen = ["keyless 30 MB first message", "3 million messages", "half-open connections", "tiny fragments", "pings"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "attacks"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MODEL": str(tiny_release), "ATTACKS": ",".join(chosen)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[-len(chosen) :]
    for name, line in zip(chosen, lines, strict=True):
        assert line.startswith(name)
        answered, worst, memory = line.removeprefix(name).split()
        assert answered == "12/12", line
        # Before there were limits it was seconds to minutes, and gigabytes.
        assert float(worst) < 2000, line
        assert float(memory) < 500, line
