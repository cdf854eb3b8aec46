"""The layers that audio encoder and trunk are made of: linear maps, norms, rope, projections of attention, MLPs.

Letters: B batch, T positions, S cache length, D hidden, N query heads, K key/value heads, G = N/K query heads per
key/value head, H head dim, F intermediate. Every parameter carries logical axis names; `omni_jax.sharding` maps
them to a mesh. Matrix products run in `dtype`, norms and softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from omni_jax import sharding
from omni_jax.config.model import FULL_ATTENTION, LayerKind, RopeScaling, TrunkConfig

Array = jax.Array
MAX_DECODE_ROWS = 32
"""Up to this many rows a matrix product is bound by reading the weight, as in decoding."""


class Keys:
    """Draws from one key, as `nnx.Rngs` does, but counts on the host: its counter costs milliseconds in a trace."""

    def __init__(self, key: Array):
        self._key, self._drawn = key, 0

    def params(self) -> Array:
        """A new key."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)


def param(rngs: nnx.Rngs | Keys, shape: Sequence[int], axes: Sequence[str | None], fan_in: int) -> nnx.Param:
    """A weight drawn from N(0, 1/fan_in), with a logical name for each of its axes."""
    value = jax.random.normal(rngs.params(), tuple(shape), jnp.float32) / math.sqrt(fan_in)
    return nnx.Param(value, axes=tuple(axes))


def make_layers(make: Callable[[Keys], Any], keys: Array, *, stacked: bool) -> Any:
    """Layers of one kind: as a single module with a leading axis `layers` on each parameter, or as an `nnx.List`.

    Both are drawn from the same keys, so that a seed means the same weights on every backend.

    Args:
        make: makes one layer.
        keys: one per layer.
        stacked: which of the two.
    """
    if not stacked:
        return nnx.List([make(Keys(key)) for key in keys])
    layers = nnx.vmap(lambda key: make(Keys(key)))(keys)
    for _, node in nnx.iter_graph(layers):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=("layers", *node.axes))
    return layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A weight in eight bits, with a scale for each output: what decoding reads, it reads half of."""

    values: Array
    """int8 [*out, *in]."""
    scale: Array
    """f32 [*out]; a weight is its value times this."""

    @classmethod
    def of(cls, weight: Array, contract: int = 1) -> Int8:
        """Round a weight [*out, *in], whose last `contract` axes are `in`."""
        inputs = tuple(range(weight.ndim - contract, weight.ndim))
        weight = weight.astype(jnp.float32)
        # A row of zeros has the scale 1.
        largest = jnp.abs(weight).max(axis=inputs, keepdims=True)
        scale = jnp.where(largest > 0, largest / 127, 1.0)
        return cls(jnp.round(weight / scale).astype(jnp.int8), scale.squeeze(inputs))

    @classmethod
    def abstract(cls, weight: Any, contract: int = 1) -> Int8:
        """Shapes and shardings of `of`, from the `jax.ShapeDtypeStruct` of a weight with a sharding over a mesh."""
        shape, spec = weight.shape[:-contract], weight.sharding.spec
        outputs = NamedSharding(weight.sharding.mesh, PartitionSpec(*spec[: len(shape)]))
        values: Any = jax.ShapeDtypeStruct(weight.shape, jnp.int8, sharding=weight.sharding)
        scale: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=outputs)
        return cls(values, scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Any:
        """All of it for `...`, as of an array; of a table [rows, D], the rows of an index as f32 [..., D]."""
        return self if index is ... else self.values[index] * self.scale[index][..., None]


def linear(x: Array, weight: Array | Int8, contract: int = 1, dtype: DTypeLike | None = None) -> Array:
    """Matrix product with weights stored [out, in], either side of one or several axes.

    Args:
        x: [..., *in].
        weight: [*out, *in]; cast to x's dtype.
        contract: how many axes `in` is.
        dtype: of the result; None is that of x. A wider one keeps what the sums have.

    Returns:
        [..., *out].
    """
    if isinstance(weight, Int8):
        # Whole numbers up to 127 are exact in every dtype; the scales wait until the sums are done.
        return (linear(x, weight.values, contract, jnp.float32) * weight.scale).astype(dtype or x.dtype)
    rows, outs = x.shape[: x.ndim - contract], weight.shape[: weight.ndim - contract]
    many = math.prod(rows) > MAX_DECODE_ROWS
    if many and use_bfloat16_dot(x.dtype):
        y = _bfloat16_product(_matrix(x, len(rows)), _matrix(weight, len(outs)))
        return y.reshape(*rows, *outs).astype(dtype or x.dtype)
    weight = weight.astype(x.dtype)
    of_weight = tuple(range(weight.ndim - contract, weight.ndim))
    of_x = tuple(range(x.ndim - contract, x.ndim))

    def product(x: Array, weight: Array) -> Array:
        return jax.lax.dot_general(x, weight, ((of_x, of_weight), ((), ())), preferred_element_type=dtype)

    def weight_first(x: Array, weight: Array) -> Array:
        # XLA:CPU reads a row-major weight at full speed only as the left operand with its last axis contracted:
        # 2 to 8 rows then cost little more than one, otherwise twice to four times as much. The barrier keeps the
        # compiler from folding the transpose of the (small) result back into the product.
        transposed = jax.lax.optimization_barrier(
            jax.lax.dot_general(weight, x, ((of_weight, of_x), ((), ())), preferred_element_type=dtype)
        )
        return jnp.moveaxis(transposed, range(len(outs)), range(len(rows), transposed.ndim))

    if many:
        return product(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=product)


def use_bfloat16_dot(dtype: DTypeLike) -> bool:
    """Whether products of this dtype should have the one form that XLA:CPU has fast instructions for.

    Rows times rows or rows times columns, bfloat16 each, to float32: 2.5 times as fast as float32 on a processor with
    AVX512-BF16. Anything else of bfloat16 XLA:CPU computes in float32. True within the mesh of a single CPU.
    """
    return dtype == jnp.bfloat16 and jax.sharding.get_abstract_mesh().size == 1 and sharding.platform() == "cpu"


@jax.custom_vjp
def _bfloat16_product(x: Array, weight: Array) -> Array:
    """`linear` of bfloat16 on one CPU: [R, in] and [out, in] of any dtype -> f32 [R, out]."""
    return _bfloat16_dot(x, weight, 1)


def _bfloat16_gradients(x: Array, weight: Array, error: Array) -> tuple[Array, Array]:
    """What it passes back of an error [R, out]: f32 [R, in] and f32 [out, in]."""
    # Columns times columns is not among the fast forms. The layout has the transpose made, for a tenth of what it
    # saves; the barrier keeps the result from being transposed by the product, which XLA:CPU would refuse to run.
    turned = with_layout_constraint(error.astype(jnp.bfloat16).T, Layout(major_to_minor=(0, 1)))
    return _bfloat16_dot(error, weight, 0), jax.lax.optimization_barrier(_bfloat16_dot(turned, x, 0))


def _backward(kept: tuple[Array, Array], error: Array) -> tuple[Array, Array | None]:
    x, weight = kept
    of_x, of_weight = _bfloat16_gradients(x, weight, error)
    # Whole numbers have no gradient.
    is_float = jnp.issubdtype(weight.dtype, jnp.floating)
    return of_x.astype(x.dtype), of_weight.astype(weight.dtype) if is_float else None


_bfloat16_product.defvjp(lambda x, weight: (_bfloat16_product(x, weight), (x, weight)), _backward)


def linear_gradients(x: Array, table: Array, error: Array) -> tuple[Array, Array]:
    """What `linear(x, table)` passes back.

    Args:
        x: [R, D].
        table: [*out, D].
        error: [R, *out], of the dtype to compute in.

    Returns:
        [R, D] in error's dtype, and f32 [*out, D]. Where one of them is not used, it costs nothing.
    """
    if use_bfloat16_dot(error.dtype):
        of_x, of_table = _bfloat16_gradients(x, _matrix(table, table.ndim - 1), _matrix(error, 1))
        return of_x.astype(error.dtype), of_table.reshape(table.shape)
    # The large factor first and the small result transposed: the other way XLA:CPU takes a quarter longer.
    axes = tuple(range(table.ndim - 1))
    of_x = jnp.tensordot(table.astype(error.dtype), error, (axes, tuple(a + 1 for a in axes))).T
    return of_x, jnp.tensordot(error, x, ((0,), (0,)), preferred_element_type=jnp.float32)


def _matrix(x: Array, leading: int) -> Array:
    """An array as a matrix: the first `leading` axes, and the others."""
    return x.reshape(math.prod(x.shape[:leading]), -1)


def _bfloat16_dot(x: Array, y: Array, axis: int) -> Array:
    """[R, N] times y's `axis` -> f32 [R, other axis of y]."""
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) (arXiv 1910.07467), in float32; the offset is 0, or 1 as in Gemma."""

    def __init__(self, size: int, eps: float, offset: int = 0):
        self.scale = nnx.Param(jnp.full((size,), 1.0 - offset, jnp.float32), axes=(None,))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D], in x's dtype."""
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (f * (self.offset + scale if self.offset else scale)).astype(x.dtype)


def trunk_norm(config: TrunkConfig, size: int | None = None) -> RMSNorm:
    """A norm as the trunk has them, by default of its hidden states."""
    return RMSNorm(size or config.hidden_size, config.norm_eps, int(config.norm_unit_offset))


def rope_frequencies(dims: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [dims / 2] (arXiv 2104.09864; see `RopeScaling`)."""
    frequencies = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if scaling is not None:
        frequencies = frequencies * _frequency_scale(frequencies, theta, scaling)
    return frequencies.astype(np.float32)


def _frequency_scale(frequencies: np.ndarray, theta: float, scaling: RopeScaling) -> Any:
    """What each frequency is multiplied with."""
    match scaling.kind:
        case "linear":
            return 1 / scaling.factor
        case "longrope":
            return 1 / np.asarray(scaling.short_factor)
        case "llama3":
            # Wavelengths beyond the original context are stretched by `factor`, short ones kept, and those between
            # are blended linearly in the number of turns they make within the original context.
            low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0
            turns = (scaling.original_max_position or 0) * frequencies / (2 * np.pi)
            kept = (turns - low) / (high - low)
        case "yarn":
            # The same, but blended linearly in the number of the frequency.
            dims, context = 2 * len(frequencies), scaling.original_max_position or 0

            def number(turns: float | None) -> float:
                """Of the frequency that makes so many turns within the original context."""
                return dims * math.log(context / ((turns or 0) * 2 * math.pi)) / (2 * math.log(theta))

            first = max(math.floor(number(scaling.beta_fast)), 0)
            last = min(math.ceil(number(scaling.beta_slow)), dims - 1)
            kept = 1 - (np.arange(len(frequencies)) - first) / (last - first or 0.001)
    kept = np.clip(kept, 0.0, 1.0)
    return kept + (1 - kept) / scaling.factor


def rope(positions: Array, config: TrunkConfig, kind: LayerKind = FULL_ATTENTION) -> tuple[Array, Array]:
    """Cosine and sine for `positions` int32 [B, T] in layers of a kind, each float32 [B, T, 1, rotary_dim / 2]."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind.sliding and config.rope_local_theta is not None:
        theta, scaling = config.rope_local_theta, None
    if not kind.rope:
        still = jnp.zeros((*positions.shape, 1, config.rotary_dim // 2), jnp.float32)
        return still + 1, still
    angles = positions[:, :, None, None].astype(jnp.float32) * rope_frequencies(config.rotary_dim, theta, scaling)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.attention_factor is not None:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the two halves of each head against each other (the NeoX way): [B, T, heads, H] -> same.

    Where there are fewer angles than half a head, the rest of each head stays.
    """
    dims = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :dims].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if dims == x.shape[-1] else jnp.concatenate([rotated, x[..., dims:]], axis=-1)


class Linear(nnx.Module):
    """An affine map of the last axes.

    Attributes:
        weight: f32 [*outputs, *inputs].
        bias: f32 [*outputs], or None.
        lora: a trained change of the map, see `omni_jax.model.lora`; or None.
    """

    lora: Callable[[Array], Array] | None = None

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        *,
        axes: Sequence[str | None],
        bias: bool = False,
        rngs: nnx.Rngs | Keys,
    ):
        """Draw the weight.

        Args:
            inputs: sizes of the input's last axes.
            outputs: sizes that replace them.
            axes: logical names of the weight's axes, outputs first.
            bias: whether there is one; it starts at zero.
            rngs: draws the weight.
        """
        self.contract = len(inputs)
        self.weight = param(rngs, (*outputs, *inputs), axes, math.prod(inputs))
        # A vector of the hidden size is too small to shard; heads are sharded as those of the weight.
        bias_axes = tuple(None if len(outputs) == 1 and name in _HIDDEN else name for name in axes[: len(outputs)])
        self.bias = nnx.Param(jnp.zeros(tuple(outputs), jnp.float32), axes=bias_axes) if bias else None

    def __call__(self, x: Array) -> Array:
        """[..., *inputs] -> [..., *outputs], in x's dtype."""
        y = linear(x, self.weight[...], self.contract)
        if self.lora is not None:
            y = y + self.lora(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


_HIDDEN = ("embed", "encoder_embed")


class Attention(nnx.Module):
    """Projections of grouped-query self-attention with rope."""

    def __init__(self, config: TrunkConfig, rngs: nnx.Rngs | Keys):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.qkv_bias
        self.q = Linear((D,), (N, H), axes=("heads", None, "embed"), bias=bias, rngs=rngs)
        self.k = Linear((D,), (K, H), axes=("kv_heads", None, "embed"), bias=bias, rngs=rngs)
        self.v = Linear((D,), (K, H), axes=("kv_heads", None, "embed"), bias=bias, rngs=rngs)
        self.out = Linear((N, H), (D,), axes=("embed", "heads", None), bias=config.out_bias, rngs=rngs)
        self.q_norm, self.k_norm = (
            None if config.qk_norm is None else trunk_norm(config, H if config.qk_norm == "head" else heads * H)
            for heads in (N, K)
        )

    def project(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """X [B, T, D] -> query [B, T, N, H], key and value [B, T, K, H]; query and key rotated."""
        query, key = _norm_heads(self.q_norm, self.q(x)), _norm_heads(self.k_norm, self.k(x))
        return rotate(query, cos, sin), rotate(key, cos, sin), self.v(x)


def _norm_heads(norm: RMSNorm | None, x: Array) -> Array:
    """[B, T, heads, H] -> same, normed over each head or over all of them, whichever the norm's size is."""
    return x if norm is None else norm(x.reshape(*x.shape[:2], -1, norm.scale.shape[-1])).reshape(x.shape)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
"""By transformers' names."""


class GatedMLP(nnx.Module):
    """down(activation(gate x) * up x) (arXiv 2002.05202), from `inputs` to `outputs` features."""

    def __init__(
        self,
        inputs: int,
        intermediate_size: int,
        outputs: int,
        rngs: nnx.Rngs | Keys,
        axes: tuple[str, str, str] = ("embed", "mlp", "embed"),
        *,
        bias: bool = False,
        activation: str = "silu",
    ):
        F, into, hidden, out = intermediate_size, *axes
        self.gate = Linear((inputs,), (F,), axes=(hidden, into), bias=bias, rngs=rngs)
        self.up = Linear((inputs,), (F,), axes=(hidden, into), bias=bias, rngs=rngs)
        self.down = Linear((F,), (outputs,), axes=(out, hidden), bias=bias, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """[..., inputs] -> [..., outputs]."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
