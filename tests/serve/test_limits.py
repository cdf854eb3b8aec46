"""Names and origins, keys, and the time and size of bodies."""

from __future__ import annotations

import json
import time

import pytest
from starlette.datastructures import Headers

from omni_jax.api import Omni
from omni_jax.serve.limits import is_known_host, is_known_key, is_known_origin
from omni_jax.serve.sessions import Settings
from tests.serve.conftest import RunningServer, eventually, run_server
from tests.serve.test_app import HELLO, connect, post, still_answers


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.5", True),
        ("omni.example:8000", True),
        ("omni.example.", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evil.example:8000@localhost", False),
        ("", False),
        ("[", False),
    ],
)
def test_is_known_host(host: str, known: bool) -> None:
    assert is_known_host(host, Settings(allowed_hosts=("omni.example",))) == known
    assert is_known_host(host, Settings(allowed_hosts=("*",)))


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ({}, True),
        ({"origin": "http://localhost:8000"}, True),
        ({"origin": "https://LOCALHOST:8000"}, True),
        ({"origin": "https://app.example"}, True),
        ({"origin": "https://app.example.evil"}, False),
        ({"origin": "http://localhost:8001"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"origin": "http://[localhost:8000"}, False),
        ({"origin": "http://localhost:8000x"}, False),
        ({"origin": "file://localhost:8000"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
    ],
)
def test_is_known_origin(headers: dict[str, str], known: bool) -> None:
    found = Headers({"host": "localhost:8000"} | headers)
    assert is_known_origin(found, Settings(allowed_origins=("https://app.example",))) == known
    assert is_known_origin(found, Settings(allowed_origins=("*",)))


def test_is_known_key_compares_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bytes] = []
    compare = hmac.compare_digest

    def record(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return compare(given, known)

    monkeypatch.setattr(hmac, "compare_digest", record)
    keys = ("one", "two", "three")
    assert [is_known_key(key, keys) for key in ("one", "three", "four", "t\udc80")] == [True, True, False, False]
    assert len(compared) == 4 * len(keys)
    # Of one length, whatever the keys are.
    assert {len(digest) for digest in compared} == {32}


def test_names_of_others_get_status_421(server: RunningServer) -> None:
    for path in ("/", "/healthz", "/v1/models"):
        status, error = server.error(path, Host="rebound.example")
        assert (status, error["code"]) == (421, "unknown_host")
        assert server.call(path, Host="localhost")[0] == 200
    status, message = server.refused("/v1/chat/completions", HELLO, Host="rebound.example")
    assert status == 421
    assert "--allow-host" in message


def test_pages_of_others_may_not_post(server: RunningServer) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "http://["}, {"Sec-Fetch-Site": "cross-site"}):
        status, error = server.error("/v1/audio/transcriptions", b"--b--", **form, **headers)
        assert (status, error["code"]) == (403, "unknown_origin")
        # A link may lead here.
        assert server.call("/", **headers)[0] == 200
    assert server.call("/v1/chat/completions", HELLO, Origin=server.url)[0] == 200


def test_content_length_with_transfer_encoding_closes_the_connection(server: RunningServer) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as client:
        client.sendall(post("/chat", b"0\r\n\r\n" + smuggled, "Transfer-Encoding: chunked"))
        received = b""
        while data := client.recv(10_000):
            received += data
    assert received.startswith(b"HTTP/1.1 400")
    assert received.count(b"HTTP/1.1") == 1


def test_uploads_have_a_deadline(omni: Omni) -> None:
    with run_server(omni, request_timeout=1, idle_timeout=30) as server, connect(server) as client:
        client.sendall(post("/chat", b"").replace(b"Length: 0", b"Length: 1000"))
        start = time.monotonic()
        client.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() < start + 10:
            client.sendall(b" ")
            try:
                answer = client.recv(1000)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - start < 5


def test_bodies_in_flight_are_bounded(omni: Omni) -> None:
    with run_server(omni, max_body_bytes=100_000) as server:
        body = json.dumps(HELLO | {"user": "a" * 95_000}).encode()
        begun = [connect(server) for _ in range(2)]
        for client in begun:
            client.sendall(post("/v1/chat/completions", body)[:-1])
        eventually(lambda: server.service.bodies.left("127.0.0.1") < 20_000)
        status, message = server.refused("/v1/chat/completions", body)
        assert (status, "too many large bodies" in message) == (429, True)
        assert still_answers(server)
        for client in begun:
            client.sendall(body[-1:])
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            client.close()
        assert server.call("/v1/chat/completions", body)[0] == 200
        eventually(lambda: server.service.bodies.left("127.0.0.1") == 200_000)
