"""64 Realtime sessions at once, with the small model: `MINUTES=10 pytest -m slow tests/serve/test_realtime_load.py`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from benchmarks.serve import free_port
from benchmarks.sessions import SESSIONS, conversation, hold
from tests.models import quick_compile
from tests.serve.conftest import conversation_omni
from tests.serve.realtime_client import question


@pytest.mark.slow
def test_realtime_sessions_held_for_a_long_time() -> None:
    """Answers are those of `Omni`, memory stays level, and sessions that vanish leave nothing."""
    with quick_compile():
        omni = conversation_omni()
        conversations = [
            conversation(omni, asked)
            for asked in ([question("name"), "hello", question("day")], ["hi", question("sum")], ["hello", "hi", "how"])
        ]
    port, seconds = free_port(), 60 * float(os.environ.get("MINUTES", "0.5"))
    command = [sys.executable, "-m", "tests.serve.small_server", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "warmed up\n"
            result = asyncio.run(hold(port, server.pid, conversations, seconds))
        finally:
            server.terminate()
            server.wait(60)
    print(result.outcomes, f"memory {result.growth:+.2%}", [round(size) for size in result.memory])
    assert {*result.outcomes} == {"correct", "vanished"}
    assert result.outcomes["correct"] >= SESSIONS
    # In half a minute, a few samples of it vary.
    assert result.growth < (0.02 if "MINUTES" in os.environ else 0.1)
    assert not any(result.left.values())
