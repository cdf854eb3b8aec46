"""A real server on a real socket, with a small random model."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn
from flax import nnx

from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from omni_jax.audio.encoding import encode
from omni_jax.codec.snac import Snac, make_decoder
from omni_jax.config.model import CodecConfig
from omni_jax.serve.app import make_server
from omni_jax.serve.binding import bind
from omni_jax.serve.sessions import Service, Settings
from omni_jax.tokenizer import byte_tokenizer
from tests.inference.reference_decoder import random_model, small_config, small_omni
from tests.model.randomized import randomized
from tests.models import quick_compile


@dataclass
class RunningServer:
    """A server that answers at `url`."""

    url: str
    service: Service
    server: uvicorn.Server

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def omni(self) -> Omni:
        return self.service.omni

    def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers; `body` is bytes as they are, or else sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if data is not None:
            headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read(), {k.lower(): v for k, v in response.headers.items()}
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), {k.lower(): v for k, v in error.headers.items()}

    def error(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and the error object of a refused request."""
        status, content, _ = self.call(path, body, **headers)
        return status, json.loads(content)["error"]

    def refused(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Status and message of a refused request."""
        status, error = self.error(path, body, **headers)
        return status, error["message"]

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if it has none yet."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait_until_idle(self) -> None:
        """Wait until no request is active or queued."""
        eventually(lambda: not self.service.engine.num_requests)


def eventually(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that another thread does; a client may see an answer's end before it is counted."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not true within {seconds} s"
        time.sleep(0.01)


def assert_same_audio(received: np.ndarray, expected: np.ndarray | None) -> None:
    """16-bit samples that were sent over the network are an answer's, up to the rounding of a stream."""
    assert expected is not None
    wanted = audio_io.to_pcm16(expected).astype(int)
    assert received.shape == wanted.shape
    assert np.abs(received - wanted).max(initial=0) < 5


class HeldBatch:
    """While entered, the running batch waits before its next chunk of answers until it is released."""

    def __init__(self, server: RunningServer):
        self.engine, self.gate, self.reached = server.service.engine, threading.Event(), threading.Event()

    def __enter__(self) -> HeldBatch:
        advance = self.engine._advance

        def wait() -> None:
            # Histories of conversations before are computed without waiting.
            if self.engine.num_requests:
                self.reached.set()
                assert self.gate.wait(60)
            advance()

        self.engine._advance = wait  # type: ignore[method-assign]
        return self

    def wait(self) -> None:
        assert self.reached.wait(60)

    def release(self) -> None:
        self.gate.set()

    def __exit__(self, *_: object) -> None:
        self.release()
        del self.engine._advance


@contextlib.contextmanager
def run_server(omni: Omni, *, ready: bool = True, **settings: Any) -> Iterator[RunningServer]:
    service = Service(omni, "small", Settings(**{"max_batch_size": 2, "max_queue_size": 20, **settings}))
    server = make_server(service)
    with bind("127.0.0.1", 0) as sockets:
        port = sockets[0].getsockname()[1]
        thread = threading.Thread(target=server.run, args=(sockets,))
        thread.start()
        yield from _running(thread, server, service, f"http://127.0.0.1:{port}", ready=ready)


def _running(
    thread: threading.Thread, server: uvicorn.Server, service: Service, url: str, *, ready: bool
) -> Iterator[RunningServer]:
    try:
        until = time.monotonic() + 600
        while not (server.started and (service.engine.warmed_up.is_set() or not ready)):
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        yield RunningServer(url, service, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def omni() -> Iterator[Omni]:
    with quick_compile():
        yield small_omni()


def conversation_omni() -> Omni:
    """A small model for conversations: takes recordings of six seconds, and answers for seconds, as people do."""
    config = small_config(text=260, max_position=128, text_specials=7, conversation=True)
    config = replace(
        config,
        audio_encoder=replace(config.audio_encoder, max_position=300),
        adapter=replace(config.adapter, stack=8),
        codec=CodecConfig(
            encoder_dim=4, encoder_rates=(16, 32), decoder_dim=8, decoder_rates=(32, 16), codebook_size=12
        ),
    )
    codec = make_decoder(randomized(lambda: Snac(config.codec, rngs=nnx.Rngs(0))))
    return Omni(random_model(config, seed=3, eot=2.5, eoa=0.5), codec, byte_tokenizer())


@pytest.fixture(scope="session")
def conversation_server() -> Iterator[RunningServer]:
    with quick_compile(), run_server(conversation_omni()) as server:
        yield server


@pytest.fixture(scope="session")
def server(omni: Omni) -> Iterator[RunningServer]:
    with run_server(omni) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """OpenAI's own client library."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def samples() -> np.ndarray:
    return np.random.default_rng(0).normal(size=3000).astype(np.float32) / 10


@pytest.fixture(scope="session")
def recording(samples: np.ndarray) -> bytes:
    """A wav file."""
    return encode(samples, 16_000, "wav")


@pytest.fixture(scope="session")
def recording_base64(recording: bytes) -> str:
    return base64.b64encode(recording).decode()
