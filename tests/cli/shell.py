"""Running `omni-jax` in this process and in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

import omni_jax
from omni_jax.cli.app import app

ROOT = Path(omni_jax.__file__).parents[1]
QUESTIONS = Path(omni_jax.__file__).parent / "assets" / "questions"
NAME, SUM, DAY = (QUESTIONS / f"{name}.wav" for name in ("name", "sum", "day"))
STEPS = 12
"""Enough for the delays of the codebooks and a few frames."""


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="omni-jax")


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "omni_jax.cli", *map(str, args)]


def shell(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, cwd=ROOT)


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process that has so many devices."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
