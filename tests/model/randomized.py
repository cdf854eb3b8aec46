"""Modules whose every parameter is random, biases and norms too, without running an initializer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.model.whisper_encoder import sinusoids

Module = TypeVar("Module", bound=nnx.Module)
Path = tuple[Any, ...]


def randomized(
    make: Callable[[], Module], seed: int = 0, change: Callable[[Path, np.ndarray], None] | None = None
) -> Module:
    """The module that `make` makes, with parameters of a seed.

    The seeds of many tests were chosen for what the models then answer. So that these answers do not depend on how
    modules and their weights are named and laid out, parameters are drawn in a fixed order, and the weights of the
    audio encoder with their inputs first.

    Args:
        make: builds it; only its shapes are used.
        seed: of the parameters.
        change: called with each parameter's path and values, may change them in place.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    random = np.random.default_rng(seed)
    flat = dict(nnx.to_flat_state(state))
    drawn = {}
    for path in sorted(flat, key=_draw_order):
        leaf, name = flat[path], str(path[-1])
        if name == "positions":
            drawn[path] = leaf.replace(jnp.asarray(sinusoids(*leaf.shape)))
            continue
        noise = _draw(random, path, leaf.shape)
        values = 1 + 0.2 * noise if name == "scale" else 0.3 * noise
        if change is not None:
            change(path, values)
        drawn[path] = leaf.replace(jnp.asarray(values, jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def _draw_order(path: Path) -> Path:
    """The trunk's biases come after all weights with a smaller name, the encoder's before its weights."""
    if path[0] in ("encoder", "decoder", "quantizers"):
        return path
    if path[0] == "audio_encoder":
        return tuple("final_norm" if part == "mlp_norm" else part for part in path)
    if len(path) > 1 and path[-2] in ("q", "k", "v", "out", "gate", "up", "down"):
        return path[:-1] if path[-1] == "weight" else (*path[:-2], f"{path[-2]}_bias")
    return path


def _draw(random: np.random.Generator, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if path[0] == "audio_encoder" and path[-1] == "weight":
        outputs_first = {"q": (-3, -1), "k": (-3, -1), "v": (-3, -1), "out": (-1, -3), "up": (-2, -1), "down": (-2, -1)}
        if axes := outputs_first.get(path[-2]):
            inputs, outputs = axes
            drawn = np.moveaxis(np.empty(shape), outputs, inputs).shape
            return np.moveaxis(random.normal(size=drawn), inputs, outputs)
    return random.normal(size=shape)
