"""Whose recordings are decoded when, and how much of them is in memory."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
from typing import Any

import pytest

from omni_jax.api import Omni
from omni_jax.serve import sessions
from tests.serve.conftest import HeldBatch, eventually, run_server
from tests.serve.realtime_client import Client
from tests.serve.test_app import post


def test_recordings_of_a_client_are_decoded_one_at_a_time(
    omni: Omni, recording_base64: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread cannot be ended, so a recording that was canceled is waited for, by its client alone."""
    begun: list[bool] = []
    gate, prepare = threading.Event(), omni.prepare

    def slow_prepare(*args: Any, **options: Any) -> Any:
        begun.append(True)
        assert gate.wait(60)
        return prepare(*args, **options)

    body = json.dumps({"audio": recording_base64, "max_tokens": 2}).encode()
    part = {"type": "input_audio", "audio": recording_base64}
    item = {"type": "message", "role": "user", "content": [part]}
    with run_server(omni) as server, Client(server.url) as client:
        monkeypatch.setattr(omni, "prepare", slow_prepare)
        client.send("conversation.item.create", item=item)
        for _ in range(3):
            client.send("response.create")
            client.last("response.created")
            eventually(lambda: len(begun) == 1)
            client.send("response.cancel")
            assert client.last("response.done")["response"]["status"] == "cancelled"
        time.sleep(0.3)
        assert len(begun) == 1
        with socket.create_connection(("127.0.0.1", server.port), timeout=60, source_address=("127.0.0.2", 0)) as other:
            other.sendall(post("/chat", body))
            eventually(lambda: len(begun) == 2)
            gate.set()
            assert other.recv(100).startswith(b"HTTP/1.1 200")
        assert server.call("/chat", body)[0] == 200
        monkeypatch.undo()
        server.wait_until_idle()


def test_recordings_in_memory_are_bounded(omni: Omni, recording_base64: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SECONDS_PER_CLIENT", 0)
    body = {"audio": recording_base64, "max_tokens": 2}
    with run_server(omni, max_audio_seconds=0.4) as server:
        left = server.service.recordings.left
        assert left("127.0.0.1") == 6400
        with HeldBatch(server) as held:
            threads = [threading.Thread(target=server.call, args=("/chat", body)) for _ in range(2)]
            for thread in threads:
                thread.start()
            eventually(lambda: left("127.0.0.1") == 400)
            status, error = server.error("/chat", body)
            assert (status, error["code"]) == (429, "busy")
            assert "long recordings" in error["message"]
            held.release()
            for thread in threads:
                thread.join(60)
        # By reference counting alone.
        gc.disable()
        try:
            eventually(lambda: left("127.0.0.1") == 6400)
        finally:
            gc.enable()
        assert server.call("/chat", body)[0] == 200
