"""Keeps the memory of a process that runs for weeks where it was after the first minute.

Buffers of every size come and go in a batch that people join and leave. The allocator of the GNU C library keeps what
is given back, in a heap for each of a dozen threads, for blocks that then don't fit: that looks like a leak for an
hour.
"""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
THRESHOLD = 256 << 10
"""Bytes from which a block is the system's, not the heap's, and goes back to it at once. Left alone the library raises
this with every large block, up to 32 MiB."""
HEAPS = 2


def keep_flat() -> bool:
    """Tell the allocator, if it is the GNU C library's, to give memory back; to be called before threads start.

    Returns:
        Whether it does.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_ARENA_MAX, HEAPS) and mallopt(_M_MMAP_THRESHOLD, THRESHOLD))
