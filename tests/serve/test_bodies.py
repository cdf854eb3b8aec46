"""JSON of any kind costs little; forms have few fields."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from omni_jax.errors import ConfigError
from omni_jax.serve.bodies import MAX_VALUES, check_number_of_values, parse_json
from omni_jax.serve.sessions import BASE64_PIECE, Base64
from tests.serve.conftest import RunningServer


@pytest.mark.parametrize(
    ("body", "status", "found"),
    [
        (b"[" + b"0," * MAX_VALUES + b"0]", 413, "expected JSON of at most 20000"),
        (b'{"a":' * 9000, 400, "recursion limit exceeded"),
        (b"1" * 10_000, 400, "number out of range"),
        (b'"\xff"', 400, "invalid unicode"),
        (b'"\\ud800"', 400, "hex escape"),
        (b"NaN", 400, "expected value"),
    ],
)
def test_parse_json_refuses_what_is_expensive(body: bytes, status: int, found: str) -> None:
    with pytest.raises(HTTPException, match=found) as error:
        parse_json(body)
    assert error.value.status_code == status


def test_parse_json_takes_a_byte_order_mark() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_parse_json_takes_a_long_string() -> None:
    data = "A" * (30 << 20)
    assert parse_json(json.dumps({"audio": data}).encode()) == {"audio": data}


def test_check_number_of_values_counts_text_as_bytes() -> None:
    for data in ("[{,:" * 5000, b"[{,:" * 5000):
        check_number_of_values(data)
    for data in ("[{,:" * 5001, b"[{,:" * 5001):
        with pytest.raises(ValueError, match="20004"):
            check_number_of_values(data)


LARGE = [
    pytest.param({"messages": [{}] * 3_000_000}, "commas, colons and brackets", id="messages"),
    pytest.param({"messages": [0] * 15_000}, "messages.0: input should be", id="numbers"),
    pytest.param({"messages": [{"role": "user", "content": [0] * 15_000}]}, "messages.0.content", id="parts"),
    pytest.param({"messages": "A" * (30 << 20)}, "messages: input should be a valid list", id="string"),
    pytest.param({"messages": [], "model": "a" * (30 << 20)}, "messages: list should have", id="model"),
]


@pytest.mark.parametrize(("fields", "message"), LARGE)
def test_large_bodies_are_refused_soon_and_block_no_one(
    server: RunningServer, fields: dict[str, Any], message: str
) -> None:
    body = json.dumps({"model": "small"} | fields, separators=(",", ":")).encode()
    start = time.perf_counter()
    status, found = server.refused("/v1/chat/completions", body)
    assert status in (400, 413)
    assert message in found
    assert len(found) < 1200
    # Most of it is sending; parsing and validating these took 26 s.
    assert time.perf_counter() - start < 5


def test_unknown_model_of_a_long_name(server: RunningServer) -> None:
    message = [{"role": "user", "content": "a"}]
    status, found = server.refused("/v1/chat/completions", {"model": "a" * 10_000_000, "messages": message})
    assert (status, len(found) < 200) == (404, True)


def multipart(*names: str) -> tuple[bytes, dict[str, str]]:
    parts = "".join(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\nx\r\n' for name in names)
    return f"{parts}--b--\r\n".encode(), {"Content-Type": "multipart/form-data; boundary=b"}


def test_forms_have_few_fields_and_one_file(server: RunningServer) -> None:
    for names in (["a"] * 65, ['f"; filename="a'] * 2):
        body, headers = multipart(*names)
        status, message = server.refused("/v1/audio/transcriptions", body, **headers)
        assert status == 400
        assert "Too many" in message


@pytest.mark.parametrize("size", [1, 2, 3, 700, BASE64_PIECE // 4 * 3, BASE64_PIECE + 1])
@pytest.mark.parametrize("form", ["plain", "lines", "url", "uri", "unpadded"])
def test_base64_of_every_form(size: int, form: str) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    text = base64.b64encode(data).decode()
    if form == "lines":
        text = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76)) + "\n"
    elif form == "url":
        text = text.replace("+", "-").replace("/", "_")
    elif form == "uri":
        text = "data:audio/wav;base64," + text
    elif form == "unpadded":
        text = text.rstrip("=")
    assert Base64(text, "audio").decode() == data


@pytest.mark.parametrize("text", ["", "====", "a", "YQ==YQ==", "Y\u00e4==", "data:audio/wav,YQ==", "a" * 1_048_577])
def test_base64_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^audio: expected"):
        Base64(text, "audio").decode()
