"""Which parts of the model learn. A stage is configuration; this is what its part names mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flax import traverse_util

from omni_jax.config.run import MODULES
from omni_jax.errors import ConfigError

Params = Mapping[str, Any]
"""Nested dict of arrays, as `nnx.to_pure_dict` gives it."""

_PREFIXES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("audio_encoder",), "audio_encoder"),
    (("adapter",), "adapter"),
    (("trunk",), "trunk"),
    (("norm",), "trunk"),
    (("embed", "text"), "text_embedding"),
    (("embed", "audio"), "audio_embedding"),
    (("head", "text"), "text_head"),
    (("head", "audio"), "audio_head"),
    (("tts_adapter",), "tts_adapter"),
)


def module_of(path: tuple[Any, ...]) -> str:
    """The part a parameter belongs to, one of `config.PARTS`."""
    for prefix, part in _PREFIXES:
        if path[: len(prefix)] == prefix:
            return part
    raise ValueError(f"parameter {'.'.join(map(str, path))} belongs to no part; expected one of {', '.join(MODULES)}")


def partition(params: Params, learn: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters that learn, and those that stay as they are.

    Raises:
        ConfigError: a part that should learn is not in the model.
    """
    flat = traverse_util.flatten_dict(dict(params))
    missing = set(learn) - {module_of(path) for path in flat}
    if missing:
        # A tied head is its embedding: naming it beside the embedding is no mistake, naming it alone is.
        ties = {"text_head": "text_embedding", "audio_head": "audio_embedding"}
        missing = {part for part in missing if ties.get(part) not in learn}
    if missing:
        raise ConfigError(f"learn: the model has no part of its own for {', '.join(sorted(missing))}")
    learning = {path: x for path, x in flat.items() if module_of(path) in learn}
    frozen = {path: x for path, x in flat.items() if module_of(path) not in learn}
    return traverse_util.unflatten_dict(learning), traverse_util.unflatten_dict(frozen)


def combine(learning: Params, frozen: Params) -> dict[str, Any]:
    """The inverse of `divide`."""
    flat = {**traverse_util.flatten_dict(dict(learning)), **traverse_util.flatten_dict(dict(frozen))}
    return traverse_util.unflatten_dict(flat)
