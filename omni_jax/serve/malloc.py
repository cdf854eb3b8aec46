"""Limits on how much freed memory the C allocator keeps, for a process that runs for weeks.

A server allocates and frees buffers of many sizes from many threads. The GNU C library keeps freed blocks in one heap
(arena) per thread, where later requests of another size cannot use them, so resident memory grows for about an hour as
if there were a leak.
"""

from __future__ import annotations

import ctypes
import platform

# Parameters of `mallopt`, from malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8

MMAP_THRESHOLD = 256 << 10
"""Blocks of this many bytes or more are mapped and unmapped one by one. By default the library raises its threshold
with every large block that is freed, up to 32 MiB."""

MAX_ARENAS = 2
"""Heaps that threads share."""


def limit_heap_growth() -> bool:
    """Make the GNU C library return freed memory to the system. Call it before threads start.

    Returns:
        Whether it is in effect; False with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_ARENA_MAX, MAX_ARENAS) and mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD))
