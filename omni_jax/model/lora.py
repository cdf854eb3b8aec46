"""Low-rank adaptation (LoRA, arXiv 2106.09685) of the trunk: linear maps whose frozen weight gets a trained change.

Letters: r rank; a linear map has a weight [*out, *in].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.config.run import LoRAConfig
from omni_jax.model.layers import Array, Linear, linear
from omni_jax.model.omni import OmniModel


class LoRA(nnx.Module):
    """What is added to the output of a linear map: scale * b a x.

    Attributes:
        a: f32 [r, *in].
        b: f32 [*out, r].
        keys: of the dropout of the input, one per layer where layers are stacked; None: no dropout.
    """

    keys: nnx.Variable | None = None

    def __init__(self, base: Linear, config: LoRAConfig):
        """Shapes of the parameters; both are sharded as the same axes of the base weight are, and whole along r.

        Args:
            base: whose weight, real or abstract, may be that of stacked layers.
            config: rank, scale and dropout.
        """
        shape, axes = base.weight.shape, base.weight.axes
        layers, split = int(axes[0] == "layers"), len(shape) - base.contract

        def param(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)

        self.a = param((*shape[:layers], config.rank, *shape[split:]), (*axes[:layers], None, *axes[split:]))
        self.b = param((*shape[:split], config.rank), (*axes[:split], None))
        self.contract, self.scale, self.dropout = base.contract, config.scale, config.dropout

    def __call__(self, x: Array) -> Array:
        """[..., *in] -> [..., *out], in x's dtype."""
        if self.keys is not None:
            kept = jax.random.bernoulli(self.keys[...], 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        return linear(linear(x, self.a[...], self.contract), self.b[...]) * self.scale


def add_lora(model: OmniModel, config: LoRAConfig) -> None:
    """Give each target in the trunk of a model a `LoRA` with abstract parameters."""
    for path, module in list(nnx.iter_modules(model.trunk)):
        if isinstance(module, Linear) and path[-1] in config.targets:
            module.lora = LoRA(module, config)


def use_dropout(model: OmniModel, key: Array) -> None:
    """Have every `LoRA` of a model drop inputs; within a trace of it.

    Args:
        model: with `LoRA`s.
        key: of the draws; each layer and target has draws of its own.
    """
    for number, module in enumerate(_loras(model)):
        own = jax.random.fold_in(key, number)
        layers = module.a.shape[: module.a.ndim - 1 - module.contract]
        module.keys = nnx.Variable(jax.random.split(own, math.prod(layers)) if layers else own)


def _loras(model: OmniModel) -> Iterator[LoRA]:
    return (module for _, module in nnx.iter_modules(model.trunk) if isinstance(module, LoRA))
