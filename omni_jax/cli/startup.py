"""What a process sets up before it imports JAX."""

from __future__ import annotations

import os
import signal
from pathlib import Path

ACCELERATORS = ("accel*", "vfio/*", "nvidia*", "kfd", "dxg")
"""Device files of TPUs (two drivers), NVIDIA GPUs, AMD GPUs, and the GPUs that Windows shares with WSL2."""


def end_on_sigint() -> None:
    """Let Ctrl-C end the process at once, which the shell reports as exit code 130.

    Python's own handler waits for a compilation to end and raises inside JAX, which may swallow it. No file is left
    half-written: all appear whole or not at all.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next run need not compile them again.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names another folder, empty it turns the cache off.
    Programs for several virtual CPU devices are not kept: read back from the cache, their collectives can run in
    another order on each device and deadlock (jax 0.10.2).
    """
    virtual = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or virtual:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "omni_jax" / "compiled"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if os.access(cache, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def silence_libtpu(devices: Path = Path("/dev")) -> None:
    """Tell JAX to use the CPU on a machine without accelerators, where libtpu is installed for `compile` alone.

    JAX would use the CPU anyway, after libtpu has logged several lines about the TPU that it did not find.

    Args:
        devices: the folder of device files.
    """
    if not any(found for pattern in ACCELERATORS for found in devices.glob(pattern)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
