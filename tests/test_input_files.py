"""Files from elsewhere: what is not an ordinary file, and JSON and YAML that would take a parser's time or memory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from omni_jax import input_files
from omni_jax.errors import ConfigError
from omni_jax.input_files import open_file, parse_json, parse_yaml, read_file, read_json, read_yaml


def test_open_file_refuses_what_is_not_an_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, found in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "link", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
        (tmp_path / "none", "no such file"),
        (tmp_path / ("x" * 300), "a file that cannot be read: File name too long"),
    ):
        with pytest.raises(ConfigError, match=f"{path}: expected JSON, found {found}$"):
            open_file(path, ConfigError, "JSON")
    with pytest.raises(ConfigError, match="zero byte"):
        open_file(Path("a\0b"), ConfigError, "JSON")
    for read in (read_json, read_yaml):
        with pytest.raises(ConfigError, match="found a pipe"):
            read(tmp_path / "pipe", ConfigError)


def test_read_file_of_limited_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    assert read_file(tmp_path / "a", ConfigError, "data", max_bytes=11) == bytes(11)
    with pytest.raises(ConfigError, match=r"a: expected data of at most 10 bytes, found 11"):
        read_file(tmp_path / "a", ConfigError, "data", max_bytes=10)


BAD_JSON = {
    "[" * 100_000: "more than 64 levels",
    '{"a":' * 100_000: "more than 64 levels",
    '["' + '\\"[' * 100_000: "Unterminated string",
    '{"a": ' + "[" * 64 + "]" * 64 + "}": "more than 64 levels",
    "9" * 1_000_000: "a number of 1000000 digits",
    "-" + "9" * 40: "a number of 41 digits",
    "1e999": "the number 1e999, which no float holds",
    "[NaN]": "NaN, which is not JSON",
    "[-Infinity]": "-Infinity, which is not JSON",
    '{"b": 1, "a": 1, "a": 2}': "the key 'a' twice",
    "": "Expecting value",
    "[1, 2": "Expecting ',' delimiter",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=[text[:20] for text in BAD_JSON])
def test_parse_json_refuses(text: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=BAD_JSON[text]):
        parse_json(text)
    assert time.process_time() - start < 1.0
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.json: expected JSON, found {BAD_JSON[text]}"):
        read_json(tmp_path / "a.json", ConfigError)


def test_parse_json_takes_what_json_takes() -> None:
    deep = "[" * 64 + "]" * 64
    strings = json.dumps(["[" * 200, '"[' * 100, "\\[" * 100, "\ud800", {"{": 1.5e300, "": -(2**63)}])
    for text in (deep, strings, strings.encode(), json.dumps([[1]] * 1000), '"é"'.encode("utf-16")):
        assert parse_json(text) == json.loads(text)
    with pytest.raises(UnicodeDecodeError):
        parse_json(b'"\xff"')


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    BOMB: "the alias or anchor 'a'",
    "a: &b 1": "the alias or anchor 'b'",
    "a: *b": "the alias or anchor 'b'",
    "[" * 10_000: "more than 64 levels",
    "- " * 10_000: "more than 64 levels",
    "{a: " * 10_000: "more than 64 levels",
    "[" + "1," * 6000 + "]": "more than 5000 values",
    "a: " + "9" * 10_000: "a number of 10000 digits",
    "a: 0b" + "1" * 10_000: "a number of 10002 digits",
    "a: 1\nb: 2\na: 3": "the key 'a' twice",
    "a: 2020-99-99": "month must be in",
    "a: !!bool x": "does not fit its tag",
    "a: !!int x": "invalid literal",
    "a: !!python/object/apply:os.system [ls]": "could not determine a constructor",
    "a: b: c": "mapping values are not allowed",
    "a: 1\n---\nb: 2": "expected a single document",
    "a: \x00": "special characters are not allowed",
    "? [a]\n: b": "unhashable",
}


@pytest.mark.parametrize("text", BAD_YAML, ids=[text[:20] for text in BAD_YAML])
def test_parse_yaml_refuses(text: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=BAD_YAML[text]):
        parse_yaml(text)
    assert time.process_time() - start < 3.0
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: expected YAML, found "):
        read_yaml(tmp_path / "a.yaml", ConfigError)


def test_read_yaml_of_limited_size(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"#" * (input_files.MAX_YAML_BYTES + 1))
    with pytest.raises(ConfigError, match="of at most 65536 bytes, found 65537"):
        read_yaml(tmp_path / "a.yaml", ConfigError)
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="expected YAML, found 'utf-8' codec can't decode"):
        read_yaml(tmp_path / "a.yaml", ConfigError)


def test_parse_yaml_takes_what_yaml_takes() -> None:
    for path in sorted(Path("configs").glob("*.yaml")):
        assert parse_yaml(path.read_text()) == yaml.safe_load(path.read_text())
    assert parse_yaml("a: {<<: {b: 1, c: 2}, b: 3}") == {"a": {"b": 3, "c": 2}}
    assert parse_yaml("") is None
    assert parse_yaml("[1e-3, 1.5, .inf, 0x10, 2020-01-01]")[:2] == ["1e-3", 1.5]
