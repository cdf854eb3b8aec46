"""Freed memory returns to the system."""

import subprocess
import sys

import pytest

from omni_jax.serve import malloc

PROGRAM = """
import ctypes, sys
import numpy as np
from omni_jax.serve import malloc

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

def free_in_heaps():  # what the library has freed and keeps; the kernel may have taken its pages meanwhile
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    return mallinfo2().fordblks

if sys.argv[1] == "limited" and not malloc.limit_heap_growth():
    sys.exit(77)
large = np.ones(24 << 20, np.uint8)  # after which the library keeps blocks of up to 24 MiB
del large
before = free_in_heaps()
blocks, pins = [], []
for _ in range(64):
    blocks.append(np.ones(2 << 20, np.uint8))
    pins.append(bytearray(1000))
blocks.clear()
print((free_in_heaps() - before) >> 20)
"""


def retained(mode: str) -> int:
    """MiB that a process still has of 128 MiB that it freed."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip("another C library")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_limit_heap_growth_returns_freed_memory() -> None:
    assert retained("default") > 16
    assert retained("limited") < 8


def test_limit_heap_growth_skips_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    assert not malloc.limit_heap_growth()
