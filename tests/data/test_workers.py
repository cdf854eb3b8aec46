"""What Python says at the end of a process that leaves shared memory behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVE_SHARED_MEMORY = "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=8)"


@pytest.mark.parametrize("prepared", [True, False])
def test_prepare_workers_silences_the_notice_of_leaked_shared_memory(prepared: bool) -> None:
    prepare = "from omni_jax.data.workers import prepare_workers; prepare_workers(); " if prepared else ""
    command = [sys.executable, "-c", prepare + LEAVE_SHARED_MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("leaked shared_memory" in done.stderr) != prepared
