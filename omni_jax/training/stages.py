"""Which modules of the model a stage trains. A stage is configuration; this is what its module names mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flax import traverse_util

from omni_jax.config.run import LORA, MODULES
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

_NEVER_TRAINED = ("audio_encoder", "positions")
"""Whisper's position table is fixed, whatever else of its encoder is trained."""

_TIED = {"text_head": "text_embedding", "audio_head": "audio_embedding"}
"""The embedding that a tied head is."""


def module_of(path: tuple[Any, ...]) -> str:
    """The module that a parameter belongs to: `lora`, or one of `omni_jax.config.run.MODULES`."""
    if LORA in path:
        return LORA
    for prefix, module in _PREFIXES:
        if path[: len(prefix)] == prefix:
            return module
    raise ValueError(f"parameter {'.'.join(map(str, path))} belongs to no module; expected one of {', '.join(MODULES)}")


def is_trained(path: tuple[Any, ...], modules: Collection[str]) -> bool:
    """Whether a parameter is trained where these modules are."""
    return module_of(path) in modules and path != _NEVER_TRAINED


def partition(params: Params, modules: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters, or their shapes or shardings, into those of the trainable modules and the frozen rest.

    Args:
        params: all parameters of the model.
        modules: names of the trainable modules.

    Raises:
        ConfigError: the model does not have one of the modules.
    """
    flat = traverse_util.flatten_dict(dict(params))
    missing = set(modules) - {module_of(path) for path in flat}
    # A tied head is its embedding: naming both is no mistake, naming the head alone is.
    missing = {module for module in missing if _TIED.get(module) not in modules}
    if missing:
        raise ConfigError(
            f"trainable: the model has no module of its own for {', '.join(sorted(missing))}", field="trainable"
        )
    trainable = {path: x for path, x in flat.items() if is_trained(path, modules)}
    frozen = {path: x for path, x in flat.items() if path not in trainable}
    return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(frozen)


def combine(trainable: Params, frozen: Params) -> dict[str, Any]:
    """The inverse of `partition`."""
    flat = {**traverse_util.flatten_dict(dict(trainable)), **traverse_util.flatten_dict(dict(frozen))}
    return traverse_util.unflatten_dict(flat)
