from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni_jax.cli import startup

ROOT = Path(__file__).parents[2]


def test_enable_compilation_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    startup.enable_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ  # tests have virtual devices
    monkeypatch.delenv("XLA_FLAGS")
    startup.enable_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "omni_jax" / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    startup.enable_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == ""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    startup.enable_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    ("device", "platforms"),
    [("null", "cpu"), ("accel0", None), ("vfio/0", None), ("nvidia0", None), ("kfd", None), ("dxg", None)],
)
def test_silence_libtpu_only_without_accelerators(
    device: str, platforms: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    startup.silence_libtpu(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") == platforms


def test_silence_libtpu_keeps_the_users_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    startup.silence_libtpu(tmp_path)
    assert os.environ["JAX_PLATFORMS"] == "tpu"


@pytest.mark.parametrize("script", ["train.py", "convert_weights.py"])
def test_scripts_silence_libtpu_as_the_commands_do(script: str) -> None:
    code = f"""
import runpy, sys
from omni_jax.cli import startup
startup.silence_libtpu = lambda: print("silenced")
sys.argv = ["{script}", "--help"]
runpy.run_path("{script}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "silenced" in done.stdout, done.stderr
