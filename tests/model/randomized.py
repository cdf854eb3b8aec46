"""Modules whose every parameter is random, biases and norms too, without running an initialiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def randomized(
    make: Callable[[], Module], seed: int = 0, change: Callable[[tuple[Any, ...], np.ndarray], None] | None = None
) -> Module:
    """The module that `make` makes, with parameters of a seed.

    Args:
        make: builds it; only its shapes are looked at.
        seed: of the parameters.
        change: called with each parameter's path and values, may change them in place.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    random = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> Any:
        name, noise = str(path[-1]), random.normal(size=leaf.shape)
        values = 1 + 0.2 * noise if name == "scale" else 0.3 * noise
        if change is not None:
            change(path, values)
        return leaf.replace(jnp.asarray(values, jnp.float32))

    return nnx.merge(graph, nnx.map_state(draw, state))
