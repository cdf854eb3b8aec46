"""Reading and writing configurations as YAML; an error names the file, the field, what was expected and found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from omni_jax.errors import ConfigError
from omni_jax.input_files import parse_yaml, read_yaml

Config = TypeVar("Config")

MAX_ERRORS = 20
"""Most wrong fields that a message lists."""
MAX_FOUND = 200
"""Most characters of a value in a message."""


def build_config(cls: type[Config], values: Any, source: str) -> Config:
    """Check nested plain values (as YAML gives them) against a config dataclass.

    Args:
        cls: the config dataclass to build.
        values: nested dicts, lists and scalars.
        source: where the values come from, for the error message.

    Raises:
        ConfigError: one line per wrong field, with its dotted name, what was expected and what was found.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        lines = []
        for item in error.errors()[:MAX_ERRORS]:
            field = ".".join(str(part) for part in item["loc"]) or "(whole)"
            found = f", found {_shorten(repr(item['input']))}" if item["loc"] else ""
            lines.append(f"{source}: {_shorten(field)}: {item['msg']}{found}")
        if error.error_count() > MAX_ERRORS:
            lines.append(f"{source}: {error.error_count() - MAX_ERRORS} more")
        raise ConfigError("\n".join(lines)) from None


def _shorten(text: str) -> str:
    """What a file has in it may be of any length, and have line breaks in its names."""
    return " ".join(text.split()) if len(text) <= MAX_FOUND else f"{' '.join(text[:MAX_FOUND].split())}..."


def to_dict(config: Any) -> Any:
    """A config as nested dicts, lists and scalars, ready for YAML or JSON."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config from a YAML file, with `field.sub=value` overrides applied on top.

    Raises:
        ConfigError: the file is not there, is not YAML, or a field is wrong.
    """
    path = Path(path)
    values = read_yaml(path, ConfigError)
    if values is None:
        values = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"override {override!r}: expected field=value")
        node = values
        *parents, last = name.split(".")
        for part in parents:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part] if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {name} is not a field that has parts")
        try:
            node[last] = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"override {override!r}: expected a YAML value, found {error}") from None
    return build_config(cls, values, str(path))


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
