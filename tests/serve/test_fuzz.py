"""Thousands of valid, invalid and damaged requests: none may cause an internal error."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from benchmarks.attacks import frame
from tests.serve.conftest import RunningServer, eventually
from tests.serve.test_app import still_answers
from tests.serve.test_connections import started

EXAMPLES = 350
"""Requests of each kind to each endpoint, about."""


@pytest.mark.slow
def test_generated_requests_never_give_status_500(server: RunningServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    assert {operation.path for operation in posts} == {
        "/chat",
        "/v1/chat/completions",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
        "/v1/responses",
        "/v1/realtime/client_secrets",
        "/v1/realtime/sessions",
        "/v1/realtime/transcription_sessions",
    }
    answered: Counter[int] = Counter()
    with requests.Session() as session:
        for operation in posts:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

                def send(case: Any) -> None:
                    if isinstance(case.body, dict) and answered.total() % 3:
                        # A generated model name would be refused before anything else is checked.
                        case.body["model"] = "small"
                    response = case.call(session=session, timeout=60)
                    answered[response.status_code] += 1
                    assert response.status_code < 500, response.text
                    if response.status_code >= 400:
                        error = response.json()["error"]
                        assert error["message"]
                        assert error["type"] == "invalid_request_error"

                quiet = settings(
                    max_examples=EXAMPLES,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                quiet(given(case=operation.as_strategy(generation_mode=mode))(send))()
    assert answered.total() >= 2000
    assert answered[200] >= 20
    assert answered[400] >= 500
    server.wait_until_idle()
    assert server.service.engine.num_active == 0
    assert (
        server.call("/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "a"}]})[0]
        == 200
    )


NUM_BODIES = NUM_FRAMES = 2000

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, 10**30, 1e308, -1e308, float("nan"), float("inf"), "", "\ud800", "\0",
    "a" * 5000, [], {}, [[]], [[[[[]]]]], {"": {}}, [None], ["a"] * 50, {"type": "text"},
    {"type": "input_audio", "input_audio": {}},
]  # fmt: skip


def bodies(recording: str) -> dict[str, dict[str, Any]]:
    """A valid body of every endpoint that takes JSON."""
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_audio", "input_audio": {"data": recording, "format": "wav"}},
    ]
    sampling = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": 1, "enforce_delay": True, "batch_parallel": False}
    spoken = {"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "pcm16"}, "model": "small"}
    message = {"role": "user", "content": parts}
    return {
        "/v1/chat/completions": {
            **sampling, **spoken, "messages": [{"role": "system", "content": "a"}, message], "max_tokens": 2,
            "stream": False, "stream_options": {"include_usage": True}, "truncate": True, "n": 1, "stop": [],
        },
        "/v1/responses": {
            **sampling, **spoken, "input": [message], "max_output_tokens": 2, "text": {"format": {"type": "text"}},
        },
        "/v1/audio/speech": {"model": "small", "input": "a", "speed": 2.0, "response_format": "wav", **sampling},
        "/chat": {"audio": recording, "stream_stride": 2, "max_tokens": 2, "truncate": False, "format": "pcm"},
    }  # fmt: skip


def damage(body: dict[str, Any], rng: random.Random) -> bytes:
    """A body with some values replaced, removed or moved, or some bytes changed."""
    value: Any = copy.deepcopy(body)
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        place = value
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key: Any = rng.choice(keys)
            if rng.random() < 0.5 or not isinstance(place[key], (dict, list)):
                action = rng.random()
                if action < 0.8:
                    place[key] = copy.deepcopy(rng.choice(ODD_VALUES))
                elif action < 0.9:
                    del place[key]
                elif isinstance(place, dict):
                    place[str(rng.random())] = place.pop(key)
                break
            place = place[key]
    data = bytearray(json.dumps(value).encode())
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.choice(
            [b"", b"[", b"]", b'"', b"{", b",", b"\\", b"\xff", b"\0", b"1e999"]
        )
    return bytes(data)


@contextlib.contextmanager
def no_internal_errors() -> Iterator[None]:
    """Whatever uvicorn reports of the application is a failure."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(self.format(record))

    logger, handler = logging.getLogger("uvicorn.error"), Collector(logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not found, found[0]


@pytest.mark.slow
def test_fuzz_json_bodies(server: RunningServer, recording_base64: str) -> None:
    valid = list(bodies(recording_base64).items())
    answered: Counter[int] = Counter()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with no_internal_errors(), contextlib.closing(connection):
        for seed in range(NUM_BODIES):
            path, body = valid[seed % len(valid)]
            data = damage(body, random.Random(seed))
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            answered[response.status] += 1
            assert response.status < 500, (seed, data, content)
            if response.status >= 400:
                assert json.loads(content)["error"]["message"], (seed, data)
    assert answered[200] >= 200
    assert answered[400] >= 800
    server.wait_until_idle()
    assert still_answers(server)


def damaged_frame(rng: random.Random) -> bytes:
    """A frame of a message that is valid or not, or with a damaged head, or no frame at all."""
    odd = rng.choice(ODD_VALUES)
    content = {"type": "input_text", "text": rng.choice(["a", odd])}
    events: list[Any] = [
        {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [content]}},
        {"type": "response.create", "response": {"max_output_tokens": 2}}, {"type": "response.cancel"},
        {"type": "input_audio_buffer.append", "audio": "AAAA" * 3000}, {"type": "input_audio_buffer.commit"},
        {"type": "session.update", "session": {"input_audio_format": "g711_ulaw", "turn_detection": None}},
        {"type": "session.update", "session": {"type": "realtime", "temperature": odd}}, odd,
    ]  # fmt: skip
    texts = [json.dumps(event).encode() for event in events]
    texts += [b"[" * rng.randrange(3000), rng.randbytes(rng.randrange(300))]
    data = bytearray(frame(rng.choice(texts), rng.choice([1, 1, 1, 1, 2, 0, 8, 9, 10]), last=rng.random() < 0.9))
    if rng.random() < 0.15:
        # Reserved bits, unknown kinds, lengths that are false, no mask.
        data[rng.randrange(2)] = rng.randrange(256)
    if rng.random() < 0.03:
        return rng.randbytes(rng.randrange(1, 200))
    return bytes(data)


@pytest.mark.slow
def test_fuzz_websocket_frames(server: RunningServer) -> None:
    sent = 0
    with no_internal_errors():
        while sent < NUM_FRAMES:
            rng = random.Random(sent)
            with started(server) as client:
                for _ in range(20):
                    with contextlib.suppress(ConnectionError):
                        client.sendall(damaged_frame(rng))
                    sent += 1
                client.settimeout(0.05)
                with contextlib.suppress(ConnectionError, TimeoutError):
                    while client.recv(1 << 16):
                        pass
    server.wait_until_idle()
    assert still_answers(server)
    eventually(lambda: server.service.bodies.left("127.0.0.1") == server.service.bodies.per_client)
