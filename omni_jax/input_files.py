"""Files from elsewhere: only ordinary files are opened, and JSON and YAML are parsed within limits.

A named pipe or a device would block or never end. A small text can take all memory or the whole stack of a parser: by
depth, by aliases, by numbers of a million digits.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Hashable
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from omni_jax.errors import OmniError

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file. The index of a corpus of a million shards is half of it."""
MAX_YAML_BYTES = 64 << 10
"""Largest YAML file; the longest config has 5 kB. Parsing takes seconds per megabyte."""
MAX_YAML_NODES = 5000
"""Most values in YAML, keys included."""
MAX_DEPTH = 64
"""Most levels of lists and objects within each other."""
MAX_DIGITS = 32
"""Longest integer: one of 64 bits has 20 digits."""

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_file(path: Path, error: type[OmniError], expected: str) -> BufferedReader:
    """Open a file to read its bytes; never waits, as opening a pipe does.

    Args:
        path: the file.
        error: raised with a sentence that begins with the path.
        expected: what the file should be, such as `a recording`.

    Raises:
        error: there is no such file, it is a folder, a pipe, a socket or a device, or it cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
            # It may have been replaced since.
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except FileNotFoundError:
        raise error(f"{path}: expected {expected}, found no such file") from None
    except OSError as reason:
        raise error(f"{path}: expected {expected}, found a file that cannot be read: {reason.strerror}") from None
    except ValueError:
        raise error(f"{str(path)!r}: expected the path of a file, found a zero byte in it") from None
    raise error(f"{path}: expected {expected}, found {_KINDS.get(stat.S_IFMT(mode), 'a device')}")


def read_file(path: Path, error: type[OmniError], expected: str, *, max_bytes: int | None = None) -> bytes:
    """The bytes of a file; see `open_file`.

    Raises:
        error: as `open_file`; or it is larger than `max_bytes`.
    """
    with open_file(path, error, expected) as file:
        # Not `max_bytes` more: that much memory would be allocated.
        size = os.fstat(file.fileno()).st_size
        data = file.read() if max_bytes is None else file.read(min(size, max_bytes) + 1)
    if max_bytes is not None and len(data) > max_bytes:
        raise error(f"{path}: expected {expected} of at most {max_bytes} bytes, found {path.stat().st_size}")
    return data


_JSON_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)
"""Strings, which may contain brackets, and brackets."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, as RFC 8259 defines it; has more than `MAX_DEPTH` levels, an integer of more than
            `MAX_DIGITS` digits, a number that no float holds, or an object with a key twice.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        depth = 0
        for match in _JSON_STRUCTURE.finditer(text):
            first = match[0][0]
            depth += (first in "[{") - (first in "]}")
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels of lists and objects")
    return json.loads(
        text,
        parse_int=_parse_integer,
        parse_float=_parse_float,
        parse_constant=_refuse_constant,
        object_pairs_hook=_to_dict,
    )


def _parse_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:MAX_DIGITS]}, which no float holds")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text}, which is not JSON")


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} twice")
    return values


def read_json(path: Path, error: type[OmniError], expected: str = "JSON") -> Any:
    """The value in a JSON file of at most `MAX_JSON_BYTES`, in UTF-8; see `open_file` and `parse_json`.

    Raises:
        error: as `open_file`; or it is too large, or not such JSON as `parse_json` takes.
    """
    try:
        return parse_json(read_file(path, error, expected, max_bytes=MAX_JSON_BYTES))
    except ValueError as reason:
        if isinstance(reason, OmniError):
            raise
        raise error(f"{path}: expected {expected}, found {reason}") from None


class _Loader(yaml.SafeLoader):
    """Plain values only. An alias stands for a value that may be of any size: a small text can hold billions."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _at(event, f"the alias or anchor {event.anchor!r}")
        self._depth += 1
        self._num_nodes += 1
        if self._depth > MAX_DEPTH:
            raise _at(event, f"more than {MAX_DEPTH} levels")
        if self._num_nodes > MAX_YAML_NODES:
            raise _at(event, f"more than {MAX_YAML_NODES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            raise _at(event, f"a number of {len(node.value)} digits")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _at(key, f"the key {key.value!r} twice")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _at(found: Any, what: str) -> yaml.MarkedYAMLError:
    """An error of an event or a node."""
    return yaml.MarkedYAMLError(problem=what, problem_mark=found.start_mark)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document of plain values.

    Raises:
        ValueError: it is not YAML; has an alias, an anchor, a tag of a program, a key twice, more than `MAX_DEPTH`
            levels, more than `MAX_YAML_NODES` values, or an integer of more than `MAX_DIGITS` digits.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as reason:
        raise ValueError(str(reason)) from None
    except (TypeError, KeyError, AttributeError, IndexError) as reason:
        # PyYAML's, of scalars that do not fit their tag, such as `!!bool x`.
        raise ValueError(f"a value that does not fit its tag ({reason!r})") from None


def read_yaml(path: Path, error: type[OmniError]) -> Any:
    """The value in a YAML file of at most `MAX_YAML_BYTES`, in UTF-8; see `open_file` and `parse_yaml`.

    Raises:
        error: as `open_file`; or it is too large, or not such YAML as `parse_yaml` takes.
    """
    data = read_file(path, error, "YAML", max_bytes=MAX_YAML_BYTES)
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except ValueError as reason:
        raise error(f"{path}: expected YAML, found {reason}") from None
