from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.audio.io import to_pcm16
from omni_jax.cli import serve
from omni_jax.errors import ConfigError
from omni_jax.serve import app, binding, sessions
from tests.cli.shell import ROOT, command, run


@pytest.fixture
def served(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Name of the model, settings, host and port of each server that was run."""
    found: list[Any] = []

    class Server:
        def __init__(self, service: tuple[str, sessions.Settings]):
            self.given = service

        def run(self, sockets: list[tuple[str, int]]) -> None:
            found.extend((*self.given, *address) for address in sockets)

    monkeypatch.setattr(sessions, "Service", lambda omni, name, settings: (name, settings))
    monkeypatch.setattr(app, "make_server", Server)
    monkeypatch.setattr(binding, "bind", lambda *address: contextlib.nullcontext([address]))
    monkeypatch.setattr(serve, "limit_heap_growth", lambda: None)
    return found


def test_serve_passes_every_option(served: list[Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("one\n\n two \n")
    options = {
        "--max-batch-size": 3,
        "--max-queue-size": 5,
        "--max-audio-seconds": 1.5,
        "--max-body-bytes": 2048,
        "--request-timeout": 7,
        "--idle-timeout": 6,
        "--api-key-file": keys,
        "--host": "0.0.0.0",
        "--port": 0,
        "--public-url": "https://omni.example/talk/",
        "--allow-host": "Omni.lan",
        "--trusted-proxy": "127.0.0.1",
        "--max-connections": 50,
        "--cache-memory": 1.5,
    }
    words = [word for option in options.items() for word in option]
    words += [
        "--model-alias",
        "whisper-1=tiny",
        "--model-alias",
        "tts-1=tiny",
        "--allow-origin",
        "http://Localhost:3000",
    ]
    result = run("serve", "--model", "tiny", *words)
    assert result.exit_code == 0, result.output
    settings = sessions.Settings(
        max_batch_size=3,
        max_queue_size=5,
        max_audio_seconds=1.5,
        max_body_bytes=2048,
        request_timeout=7,
        idle_timeout=6,
        api_keys=("one", "two"),
        aliases=("whisper-1", "tts-1"),
        allowed_origins=("http://localhost:3000", "https://omni.example"),
        allowed_hosts=("omni.lan", "omni.example"),
        trusted_proxies=("127.0.0.1",),
        max_connections=50,
        cache_bytes=1_500_000_000,
    )
    assert served == [("tiny", settings, "0.0.0.0", 0)]
    assert "without a key" not in result.stderr


def test_serve_names_the_option_of_too_little_memory(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(omni: Omni, name: str, settings: sessions.Settings) -> None:
        raise ConfigError(f"cache_bytes: expected more, found {settings.cache_bytes}", field="cache_bytes")

    monkeypatch.setattr(sessions, "Service", refuse)
    for value in ("0.001", "inf"):
        result = run("serve", "--model", "tiny", "--cache-memory", value)
        assert result.exit_code == 2
        assert "--cache-memory: cache_bytes: expected more" in result.stderr
    assert "--cache-memory" in run("serve", "--model", "tiny", "--cache-memory", "nan").stderr


def test_serve_shards_the_model(served: list[Any], loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    meshes = []
    monkeypatch.setattr(serve, "load_model", lambda *_, mesh, **options: meshes.append(mesh))
    monkeypatch.setattr(jax, "local_devices", jax.devices)
    for tensor in (1, 2, 8):
        assert run("serve", "--model", "tiny", "--tensor", tensor).exit_code == 0
    alone, *sharded = meshes
    assert alone is None
    assert [mesh.shape["tensor"] for mesh in sharded] == [mesh.size for mesh in sharded] == [2, 8]


def test_serve_refuses_more_devices_than_there_are(served: list[Any], loads: list[str]) -> None:
    result = run("serve", "--model", "tiny", "--tensor", 2)
    assert result.exit_code == 2
    assert "--tensor: expected at most the 1 local devices, found 2" in result.stderr
    assert not loads


@pytest.mark.slow
def test_a_sharded_server_gives_the_same_answers(tiny: Omni) -> None:
    """On 8 virtual devices, of which two share every row."""
    words = {"model": "tiny", "max_completion_tokens": 20, "modalities": ["text", "audio"]}
    body = words | {
        "audio": {"voice": "tiny", "format": "pcm16"},
        "messages": [{"role": "user", "content": "What is your name?"}],
    }
    arguments = command("serve", "--model", "tiny", "--tensor", 2, "--port", 0)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            address = next(line for line in lines if "listening at" in line).split()[-1]
            assert any("ready after" in line for line in lines)
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                message = json.load(response)["choices"][0]["message"]
        finally:
            process.kill()
    expected = tiny.reply(text="What is your name?", max_steps=20)
    assert expected.audio is not None
    assert message["audio"]["transcript"] == expected.text
    samples = np.frombuffer(base64.b64decode(message["audio"]["data"]), "<i2")
    np.testing.assert_allclose(samples, to_pcm16(expected.audio), atol=1)


def test_serve_defaults(served: list[Any]) -> None:
    result = run("serve", "--model", "tiny")
    assert result.exit_code == 0, result.output
    assert served == [("tiny", sessions.Settings(), "127.0.0.1", 8000)]
    assert "without a key" not in result.stderr


def test_serve_warns_if_the_network_needs_no_key(served: list[Any]) -> None:
    result = run("serve", "--model", "tiny", "--host", "0.0.0.0")
    assert "0.0.0.0:8000 accepts requests from the network without a key" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model-alias", "whisper-1", "--model-alias: expected NAME=tiny, found 'whisper-1'"),
        ("--model-alias", "whisper-1=nano", "--model-alias: expected NAME=tiny, found 'whisper-1=nano'"),
        ("--allow-origin", "example.org", "expected https://HOST, found 'example.org'"),
        ("--public-url", "omni.example", "expected https://HOST, found 'omni.example'"),
        ("--allow-host", "http://omni.lan", "--allow-host: expected the name of a host"),
        ("--trusted-proxy", "proxy.lan", "--trusted-proxy: expected an address such as 127.0.0.1, found 'proxy.lan'"),
    ],
)
def test_serve_refuses_bad_names_before_loading(
    option: str, value: str, message: str, served: list[Any], loads: list[str]
) -> None:
    result = run("serve", "--model", "tiny", option, value)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not served
    assert not loads


@pytest.mark.parametrize(("content", "message"), [(None, "expected a readable text file"), ("\n", "found none")])
def test_serve_refuses_a_bad_key_file_before_loading(
    content: str | None, message: str, served: list[Any], loads: list[str], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "keys.txt").write_text(content)
    result = run("serve", "--model", "tiny", "--api-key-file", tmp_path / "keys.txt")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not served
    assert not loads


@pytest.mark.parametrize(("host", "message"), [("127.0.0.1", "in use"), ("no.such.host.invalid", "--host: expected")])
def test_serve_refuses_an_address_before_loading(host: str, message: str, loads: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--model", "tiny", "--host", host, "--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not loads
