"""What is given back goes back to the system."""

import subprocess
import sys

import pytest

from omni_jax.serve import malloc

PROGRAM = """
import sys
import numpy as np, psutil
from omni_jax.serve import heap

if sys.argv[1] == "flat" and not heap.keep_flat():
    sys.exit(77)
del_first = np.ones(24 << 20, np.uint8)  # after which the library keeps blocks of up to 24 MiB
del del_first
before = psutil.Process().memory_info().rss
blocks, pins = [], []
for _ in range(64):
    blocks.append(np.ones(2 << 20, np.uint8))
    pins.append(bytearray(1000))
blocks.clear()
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def kept(how: str) -> int:
    """MiB that a process still has of 128 given back."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip("another C library")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_nothing_is_kept_that_was_given_back() -> None:
    assert kept("as it is") > 64
    assert kept("flat") < 8


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    assert not malloc.keep_flat()
