"""The parameters of a model as the tensors of a release: one tensor per layer and weight, named by its path.

`trunk.layers.0.attention.q.weight` is layer 0 of `trunk.layers.attention.q.weight` in a model with stacked layers, and
`trunk.layers[0].attention.q.weight` in one with a module per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.config.model import ModelConfig
from omni_jax.model.layers import Int8
from omni_jax.model.omni import OmniModel

ParamPath = tuple[Any, ...]
"""Path of a parameter in a module: attribute names and layer numbers."""


def init_model(config: ModelConfig, *, stacked: bool, dtype: Any, seed: int, mesh: Mesh | None = None) -> OmniModel:
    """A model with random float32 weights, made on its devices: no unsharded copy ever exists.

    The same seed gives the same weights on any mesh, to float rounding.

    Args:
        config: the model's config.
        stacked: see `omni_jax.model.decoder`.
        dtype: of matrix products.
        seed: of the weights.
        mesh: where the weights are; None is the first device.
    """
    if mesh is None:
        # Compiling hundreds of draws as one program takes longer than running them one by one.
        return OmniModel(config, stacked=stacked, dtype=dtype, rngs=nnx.Rngs(seed))
    graph, draw = _draw_sharded(config, stacked, jnp.dtype(dtype), mesh)
    return nnx.merge(graph, draw(jax.random.key(seed)))


@lru_cache(maxsize=4)
def _draw_sharded(config: ModelConfig, stacked: bool, dtype: Any, mesh: Mesh) -> tuple[Any, Callable[..., Any]]:
    """The graph of a model, and the compiled function from a key to its weights."""
    graph, state = nnx.split(abstract_model(config, stacked=stacked, dtype=dtype))

    def draw(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(OmniModel(config, stacked=stacked, dtype=dtype, rngs=nnx.Rngs(key))))

    # On CPU, optimizing a program that runs once takes ten times as long as all the rest.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if mesh.devices.flat[0].platform == "cpu" else None
    return graph, jax.jit(draw, out_shardings=sharding.of_state(state, mesh), compiler_options=options)


def abstract_model(config: ModelConfig, *, stacked: bool, dtype: Any) -> OmniModel:
    """The module with shapes instead of arrays."""

    def make() -> OmniModel:
        # Stacking by nnx.vmap needs real ones; its trace is short.
        rngs: Any = nnx.Rngs(0) if stacked else _SameKey()
        return OmniModel(config, stacked=stacked, dtype=dtype, rngs=rngs)

    return nnx.eval_shape(make)


class _SameKey:
    """Replaces `nnx.Rngs` where only shapes matter: counting draws is most of the time of a long trace."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def model_tensors(model: OmniModel) -> dict[str, LazyTensor]:
    """The tensors of a model, fetched from the devices when read; weights in eight bits as float32.

    With several processes all must read the same tensors in the same order.
    """

    def lazy(array: jax.Array | Int8, layer: int | None) -> LazyTensor:
        shape = array.shape if layer is None else array.shape[1:]
        if isinstance(array, Int8):
            values, scale = lazy(array.values, layer), lazy(array.scale, layer)
            return LazyTensor(shape, scale.dtype, lambda: dequantize(values.read(), scale.read()))
        return LazyTensor(shape, np.dtype(array.dtype), lambda: _fetch(array if layer is None else array[layer]))

    def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return values * scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))

    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        names = tensor_names(path, variable.shape)
        for layer, name in enumerate(names):
            tensors[name] = lazy(variable[...], layer if is_stacked(path) else None)
    return tensors


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a model of this config."""
    return tensor_shapes(nnx.state(abstract_model(config, stacked=False, dtype=jnp.float32)))


def tensor_shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a model with this state."""
    return {
        name: variable.shape[1:] if is_stacked(path) else variable.shape
        for path, variable in nnx.to_flat_state(state)
        for name in tensor_names(path, variable.shape)
    }


def tensor_names(path: ParamPath, shape: tuple[int, ...]) -> list[str]:
    """The names of the tensors that hold a parameter: one per layer of a stacked one."""
    if not is_stacked(path):
        return [tensor_name(path)]
    after = path.index("layers") + 1
    return [tensor_name((*path[:after], layer, *path[after:])) for layer in range(shape[0])]


def tensor_name(path: ParamPath) -> str:
    """The name of a parameter that is not stacked."""
    return ".".join(str(part) for part in path)


def is_stacked(path: ParamPath) -> bool:
    """Whether the first axis of a parameter is that of layers."""
    return "layers" in path and not isinstance(path[path.index("layers") + 1], int)


def _fetch(array: jax.Array) -> np.ndarray:
    """A whole array on the host, from all processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
