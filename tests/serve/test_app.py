"""Routes, limits, errors and metrics of the server, and that no client can block the others."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.audio.encoding import encode
from omni_jax.errors import (
    AudioTooLongError,
    BusyError,
    CheckpointError,
    ClosedError,
    ConfigError,
    NoSpeechError,
    OmniError,
)
from omni_jax.inference.engine import Engine
from omni_jax.inference.generation import GenerationConfig
from omni_jax.serve.errors import RequestRefusedError
from omni_jax.serve.sessions import AnswerStream
from tests.serve.conftest import HeldBatch, RunningServer, eventually, run_server

HELLO = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
STREAM = HELLO | {"stream": True, "modalities": ["text", "audio"], "audio": {"voice": "a", "format": "pcm16"}}


def connect(server: RunningServer, timeout: float = 30) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def still_answers(server: RunningServer) -> bool:
    """Whether it answers a request correctly."""
    status, content, _ = server.call("/v1/chat/completions", HELLO)
    return (
        status == 200
        and json.loads(content)["choices"][0]["message"]["content"] == server.omni.answer(text="hello").text
    )


def test_healthz_readyz_and_metrics(server: RunningServer) -> None:
    assert server.call("/healthz")[:2] == (200, b'{"status":"ok"}')
    assert server.call("/readyz")[0] == 200
    before = server.metric("omni_requests_total", endpoint="/v1/audio/speech", outcome="done")
    first_audios = server.metric("omni_time_to_first_audio_seconds_count")
    steps = server.metric("omni_decode_steps_total")
    seconds = server.metric("omni_audio_seconds_total")
    expected = server.omni.read_aloud("read me")
    assert server.call("/v1/audio/speech", {"model": "small", "input": "read me", "response_format": "wav"})[0] == 200
    eventually(lambda: server.metric("omni_requests_total", endpoint="/v1/audio/speech", outcome="done") == before + 1)
    assert server.metric("omni_time_to_first_audio_seconds_count") == first_audios + 1
    assert server.metric("omni_decode_steps_total") == steps + expected.tokens.shape[1]
    assert server.metric("omni_audio_seconds_total") == pytest.approx(seconds + expected.seconds)
    status, content, headers = server.call("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = content.decode().splitlines()
    for line in ("omni_batch_slots 2.0", "omni_batch_slots_in_use 0.0", "omni_queue_length 0.0", "omni_ready 1.0"):
        assert line in lines
    # Those of two requests and their companion rows.
    assert {"omni_cache_pages 4.0", "omni_cache_pages_in_use 0.0"} <= set(lines)


def test_warm_up_compiles_everything(
    server: RunningServer, samples: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    import jax

    config = GenerationConfig(max_steps=20, temperature=0.5)
    requests = [
        server.omni.prepare({"text": "a" * length, "task": task, "config": config})
        for length in (1, 15, 40)
        for task in ("T1A1", "T1A2", "T1T2")
    ]
    requests += [
        server.omni.prepare({"audio": np.resize(samples, length), "sample_rate": 16_000, "task": task})
        for length in (400, server.omni.config.audio_encoder.max_samples)
        for task in ("A1A2", "A1T1", "A1T2")
    ]
    jax.config.update("jax_log_compiles", True)
    try:
        for gap in (0, 0.02):
            handles = []
            for request in requests:
                handles.append(server.service.engine.submit(request))
                time.sleep(gap)
            for handle in handles:
                assert [*handle][-1].reply is not None
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert not compiled


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
def test_answer_streams_are_freed_without_garbage_collection(server: RunningServer, body: Any) -> None:
    """They hold their audio; see also `omni_jax.serve.app._freeze_when_warmed_up`."""

    def count() -> int:
        return sum(isinstance(thing, AnswerStream) for thing in gc.get_objects())

    eventually(lambda: gc.get_freeze_count() > 0)
    gc.collect()
    before = count()
    gc.disable()
    try:
        for _ in range(3):
            assert server.call("/v1/chat/completions", body)[0] == 200
        eventually(lambda: count() == before)
    finally:
        gc.enable()


def test_errors_are_json_everywhere(server: RunningServer) -> None:
    assert server.refused("/nowhere") == (404, "GET /nowhere: Not Found")
    assert server.refused("/chat")[0] == 405
    status, message = server.refused("/v1/chat/completions", b"{")
    assert status == 400
    assert message.startswith("POST /v1/chat/completions: body: expected JSON, found ")
    assert server.refused("/v1/chat/completions", b"\xff\xfe")[0] == 400
    assert server.refused("/v1/chat/completions", b"[" * 10_000)[0] == 400
    assert server.refused("/v1/chat/completions", b"[" * 100_000)[0] == 413
    assert server.refused("/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"})[0] in (400, 422)
    assert still_answers(server)


@pytest.mark.parametrize(
    ("error", "status", "code", "outcome"),
    [
        (ConfigError("no"), 400, None, "refused"),
        (AudioTooLongError("no", max_seconds=1), 400, "audio_too_long", "refused"),
        (NoSpeechError("no", seconds=1), 400, "no_speech", "refused"),
        (BusyError("no"), 429, "busy", "busy"),
        (ClosedError("no"), 503, "closed", "refused"),
        (CheckpointError("no"), 500, "failed", "failed"),
        (RequestRefusedError(404, "no", code="model_not_found"), 404, "model_not_found", "refused"),
    ],
)
def test_status_of_every_error(
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    error: OmniError,
    status: int,
    code: str | None,
    outcome: str,
) -> None:
    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr(server.service, "submit", fail)
    before = server.metric("omni_requests_total", endpoint="/v1/chat/completions", outcome=outcome)
    found_status, body = server.error("/v1/chat/completions", HELLO)
    assert (found_status, body["code"], body["message"]) == (status, code, "no")
    assert server.metric("omni_requests_total", endpoint="/v1/chat/completions", outcome=outcome) == before + 1


def test_api_keys(omni: Omni) -> None:
    with run_server(omni, api_keys=("right", "other")) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert server.refused(path)[0] == 401
            assert server.refused(path, Authorization="Bearer wrong")[0] == 401
            assert server.refused(path, Authorization="Basic right")[0] == 401
            assert server.call(path, Authorization="Bearer right")[0] == 200
            assert server.call(path, Authorization="bearer other")[0] == 200
        assert server.refused("/v1/chat/completions", HELLO)[0] == 401
        for path in ("/", "/page/page.js", "/healthz", "/readyz"):
            assert server.call(path)[0] == 200
        assert server.call("/v1/models")[2]["www-authenticate"] == "Bearer"


def test_page_files_are_served_from_this_server_only(server: RunningServer) -> None:
    status, content, headers = server.call("/")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")
    for link in re.findall(r'(?:src|href)="([^"]+)"', content.decode()):
        assert link == "data:," or server.call(f"/{link}")[0] == 200
    assert server.refused("/page/../app.py")[0] == 404
    assert server.refused("/page/sessions.py")[0] == 404


def test_max_body_bytes(omni: Omni) -> None:
    with run_server(omni, max_body_bytes=10_000, idle_timeout=1) as server:
        status, message = server.refused("/chat", b" " * 10_001)
        assert (status, message) == (413, "expected a body of at most 10000 bytes, found 10001")
        with connect(server) as client:
            # One that does not announce its length.
            client.sendall(
                b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            client.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 413")
        with connect(server) as client:
            # One that announces more than it sends.
            client.sendall(post("/chat", b"{}").replace(b"Length: 2", b"Length: 2000"))
            assert client.recv(1000).startswith(b"HTTP/1.1 408")
        assert still_answers(server)


def test_max_audio_seconds_refuses_before_decoding(omni: Omni, tmp_path: Any) -> None:
    import base64

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(16_000 * 1800, np.int16), 16_000, format="FLAC")
    assert len(buffer.getvalue()) < 1 << 20
    with run_server(omni, max_audio_seconds=0.1) as server:
        hours = base64.b64encode(buffer.getvalue()).decode()
        status, message = server.refused("/chat", {"audio": hours})
        limit = "recording: expected a recording of at most 0.10 s, found 1800.00 s"
        assert (status, message) == (400, f"{limit}: shorten it, or use its beginning only (truncate)")
        long = base64.b64encode(encode(np.ones(2000, np.float32) / 2, 16_000, "wav")).decode()
        assert "at most 0.10 s, found 0.12 s" in server.refused("/chat", {"audio": long})[1]


def test_full_queue_gives_status_429(omni: Omni) -> None:
    with run_server(omni, max_batch_size=1, max_queue_size=1) as server, HeldBatch(server) as held:
        threads = [threading.Thread(target=server.call, args=("/v1/chat/completions", HELLO)) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: server.service.engine.num_requests == 2)
        status, content, headers = server.call("/v1/chat/completions", HELLO)
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert "try again later" in json.loads(content)["error"]["message"]
        assert server.metric("omni_requests_total", endpoint="/v1/chat/completions", outcome="busy") == 1
        held.release()
        for thread in threads:
            thread.join(60)
        assert still_answers(server)


def test_request_timeout(omni: Omni) -> None:
    with run_server(omni, request_timeout=0.2) as server, HeldBatch(server) as held:
        results: list[Any] = []
        bodies = [HELLO, STREAM]
        threads = [
            threading.Thread(target=lambda body=body: results.append(server.call("/v1/chat/completions", body)))
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        held.release()
        for thread in threads:
            thread.join(60)
        by_status = {status: content for status, content, _ in results}
        assert "not answered within 0.2 s" in json.loads(by_status[504])["error"]["message"]
        # A stream has begun with status 200: it ends with an error and without [DONE].
        assert b"not answered within 0.2 s" in by_status[200]
        assert b"[DONE]" not in by_status[200]
        server.wait_until_idle()


@pytest.mark.parametrize("body", [HELLO, STREAM])
def test_disconnect_frees_batch_slot(server: RunningServer, body: Any) -> None:
    before = server.metric("omni_requests_total", endpoint="/v1/chat/completions", outcome="cancelled")
    with HeldBatch(server) as held:
        with connect(server) as client:
            client.sendall(post("/v1/chat/completions", json.dumps(body).encode()))
            held.wait()
        labels = {"endpoint": "/v1/chat/completions", "outcome": "cancelled"}
        eventually(lambda: server.metric("omni_requests_total", **labels) == before + 1)
    server.wait_until_idle()
    assert still_answers(server)


def test_slow_clients_do_not_block_others(omni: Omni) -> None:
    with run_server(omni, idle_timeout=1) as server:
        silent = [connect(server) for _ in range(50)]
        begun = [connect(server) for _ in range(20)]
        for client in begun:
            client.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        slow = [connect(server) for _ in range(4)]
        for client in slow:
            # Asks for an answer and never reads it.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.sendall(post("/v1/chat/completions", json.dumps(STREAM).encode()))
        assert still_answers(server)
        server.wait_until_idle()
        for client in (*silent, *begun, *slow):
            client.close()
        assert still_answers(server)


def test_garbage_requests(server: RunningServer) -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        with connect(server) as client:
            client.sendall(random.bytes(int(random.integers(1, 3000))) + b"\r\n\r\n")
            client.settimeout(5)
            with contextlib.suppress(TimeoutError, ConnectionError):
                assert client.recv(100).startswith(b"HTTP/1.1 400") or not client.recv(100)
    assert still_answers(server)


def test_shutdown_finishes_active_requests(omni: Omni) -> None:
    results: list[Any] = []
    with run_server(omni) as server, HeldBatch(server) as held:
        thread = threading.Thread(target=lambda: results.append(server.call("/v1/chat/completions", STREAM)))
        thread.start()
        held.wait()
        # Leaving `run_server` stops the server while the answer is being decoded.
    thread.join(60)
    assert results[0][1].endswith(b"data: [DONE]\n\n")


def test_warming_up_gives_status_503(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(Engine, "warm_up", lambda self, stop: gate.wait(60))
    with run_server(omni, ready=False) as server:
        try:
            assert server.call("/healthz")[0] == 200
            assert server.call("/readyz")[:2] == (503, b'{"status":"warming up"}')
            assert server.refused("/v1/chat/completions", HELLO) == (
                503,
                "the model is still warming up; see /readyz",
            )
        finally:
            gate.set()
        eventually(lambda: server.call("/readyz")[0] == 200)


def test_failed_warm_up_is_reported_as_broken(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Engine, stop: Any) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(Engine, "warm_up", fail)
    with run_server(omni, ready=False) as server:
        eventually(lambda: server.call("/healthz")[:2] == (503, b'{"status":"broken"}'))
        assert server.call("/readyz")[:2] == (503, b'{"status":"broken"}')
        assert server.refused("/v1/chat/completions", HELLO) == (
            503,
            "no more requests: the model has failed",
        )


def test_head_requests(server: RunningServer) -> None:
    models = ("/v1/models", "/v1/models/", "/v1/models/small", "/v1/audio/voices", "/v1/audio/models")
    for path in ("/", "/page/page.js", "/healthz", "/readyz", "/metrics", "/openapi.json", *models):
        request = urllib.request.Request(server.url + path, method="HEAD")
        with urllib.request.urlopen(request, timeout=60) as response:
            assert (response.status, response.read()) == (200, b"")


def test_models_with_a_slash(server: RunningServer) -> None:
    assert server.call("/v1/models/")[1] == server.call("/v1/models")[1]


def test_allowed_origins(omni: Omni) -> None:
    """A page of an allowed origin may ask and read answers, errors too; its browser asks first, without a key."""
    with run_server(omni, allowed_origins=("https://app.example",), api_keys=("right",)) as server:
        ours = {"Origin": "https://app.example"}
        preflight = urllib.request.Request(
            server.url + "/v1/chat/completions",
            method="OPTIONS",
            headers=ours
            | {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            },
        )
        with urllib.request.urlopen(preflight, timeout=60) as response:
            assert response.headers["access-control-allow-origin"] == "https://app.example"
            assert "authorization" in response.headers["access-control-allow-headers"]
        status, _, headers = server.call("/v1/chat/completions", HELLO, **ours)
        assert (status, headers["access-control-allow-origin"]) == (401, "https://app.example")
        status, _, headers = server.call("/v1/chat/completions", HELLO, **ours, Authorization="Bearer right")
        assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
        other = {"Origin": "https://other.example", "Authorization": "Bearer right"}
        assert "access-control-allow-origin" not in server.call("/v1/models", **other)[2]


def test_log_says_when_the_server_is_ready(omni: Omni, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "omni_jax"), run_server(omni):
        pass
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("omni_jax")]
    assert messages[0].startswith("compiling what the first request needs")
    assert re.fullmatch(r"listening at http://127\.0\.0\.1:\d+", messages[1])
    assert re.fullmatch(r"ready after \d+\.\d s of compiling; the rest is compiled in the background", messages[2])
    assert messages[3] == "every program is compiled"


def test_access_log_has_one_line_for_a_request(omni: Omni, capfd: pytest.CaptureFixture[str]) -> None:
    with run_server(omni) as server, connect(server) as client:
        path = b"/%0aINFO:%20forged?a=%0d%0aINFO:%1b[2J"
        client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 404")
    output = "".join(capfd.readouterr())
    assert next(line for line in output.splitlines() if "forged" in line).count("GET") == 1
    assert not any(line.startswith("INFO: forged") or "\x1b[2J" in line for line in output.splitlines())


@pytest.mark.slow
def test_sigterm_while_compiling_ends_the_server_within_5_seconds(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "omni_jax.cli", "serve", "--model", "nano", "--port", "0"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "listening at" in line:
                    break
            time.sleep(3)
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            assert process.wait(30) == -signal.SIGTERM
            assert time.monotonic() - start < 5
            assert "ready after" not in process.stderr.read()
        finally:
            process.kill()
