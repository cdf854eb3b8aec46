"""Freed memory returns to the system."""

import subprocess
import sys

import pytest

from omni_jax.serve import malloc

PROGRAM = """
import sys
import numpy as np, psutil
from omni_jax.serve import malloc

if sys.argv[1] == "limited" and not malloc.limit_heap_growth():
    sys.exit(77)
large = np.ones(24 << 20, np.uint8)  # after which the library keeps blocks of up to 24 MiB
del large
before = psutil.Process().memory_info().rss
blocks, pins = [], []
for _ in range(64):
    blocks.append(np.ones(2 << 20, np.uint8))
    pins.append(bytearray(1000))
blocks.clear()
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def retained(mode: str) -> int:
    """MiB that a process still has of 128 MiB that it freed."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip("another C library")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_limit_heap_growth_returns_freed_memory() -> None:
    assert retained("default") > 64
    assert retained("limited") < 8


def test_limit_heap_growth_skips_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    assert not malloc.limit_heap_growth()
