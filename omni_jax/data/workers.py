"""What this process sets up before Grain starts worker processes."""

from __future__ import annotations

import sys
from multiprocessing import resource_tracker

import absl.flags

IGNORE_LEAKS = "ignore:resource_tracker:UserWarning"


def prepare_workers() -> None:
    """Let Grain start workers, and let Python say nothing about the batches that are left at the end.

    Workers read ahead. At the end of a run their last batches are in shared memory that no process has opened yet.
    Python's resource tracker frees it, and warns of a leak where there is none. The tracker is a process with the
    warning options of this one.
    """
    if not absl.flags.FLAGS.is_parsed():
        # Grain's workers read absl flags, which raises unless they are parsed; omni_jax does not use them.
        absl.flags.FLAGS.mark_as_parsed()
    if IGNORE_LEAKS not in sys.warnoptions:
        sys.warnoptions.append(IGNORE_LEAKS)
    resource_tracker.ensure_running()
