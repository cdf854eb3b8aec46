"""The parts a Qwen2- or Llama-family block is made of: RMSNorm, rope, grouped-query attention, gated MLP.

Letters: B batch, T positions, S cache length, D width, N query heads, K key/value heads, G = N/K query heads per
key/value head, H head size, F ffn width. Every parameter carries logical axis names; `omni_jax.sharding` maps
them to a mesh. Matrix products run in `dtype`, norms and softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.typing import DTypeLike

from omni_jax.config import RopeScaling, TrunkConfig

Array = jax.Array
MOST_DECODE_ROWS = 32
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
    many = math.prod(rows) > MOST_DECODE_ROWS
    if many and for_one_cpu(x.dtype):
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


_traced_for_one_cpu: ContextVar[bool] = ContextVar("_traced_for_one_cpu", default=False)


@contextmanager
def traced_for(mesh: Mesh | None) -> Iterator[None]:
    """Within it, what is traced will run on this mesh: see `for_one_cpu`."""
    token = _traced_for_one_cpu.set(mesh is not None and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu")
    try:
        yield
    finally:
        _traced_for_one_cpu.reset(token)


def for_one_cpu(dtype: DTypeLike) -> bool:
    """Whether products of this dtype are to be in the one form that XLA:CPU has fast instructions for.

    Rows times rows or rows times columns, bfloat16 each, to float32: 2.5 times as fast as float32 on a processor with
    AVX512-BF16. Anything else of bfloat16 it computes in float32.
    """
    return _traced_for_one_cpu.get() and dtype == jnp.bfloat16


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


def _backward(kept: tuple[Array, Array], error: Array) -> tuple[Array, Array]:
    of_x, of_weight = _bfloat16_gradients(*kept, error)
    return of_x.astype(kept[0].dtype), of_weight.astype(kept[1].dtype)


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
    if for_one_cpu(error.dtype):
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
    """x / rms(x) * scale (arXiv 1910.07467), in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=(None,))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D], in x's dtype."""
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        return (f * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [H/2] (arXiv 2104.09864; scaling: Llama 3.1)."""
    frequencies = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is not None:
        # Wavelengths beyond the original context are stretched by `factor`, short ones kept, and those between
        # are blended linearly in the number of turns they make within the original context.
        turns = scaling.original_context * frequencies / (2 * np.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        frequencies = frequencies * (blend + (1 - blend) / scaling.factor)
    return frequencies.astype(np.float32)


def rope(positions: Array, config: TrunkConfig) -> tuple[Array, Array]:
    """Cosine and sine for `positions` int32 [B, T], each float32 [B, T, 1, H/2]."""
    frequencies = rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the two halves of each head against each other (the NeoX way): [B, T, heads, H] -> same."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Grouped-query attention with a float32 softmax.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H].
        value: [B, S, K, H].
        mask: bool, broadcastable to [B, T, S]; True where a position may look.

    Returns:
        [B, T, N, H], in query's dtype.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    # The query heads of a group are one long sequence to their keys: products of two matrices, and no copies of keys.
    rows = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bkth,bksh->bkts", rows, key, preferred_element_type=jnp.float32) / math.sqrt(H)
    mask = jnp.broadcast_to(mask[:, None], (mask.shape[0], N // K, T, S)).reshape(mask.shape[0], 1, -1, S)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # What is subtracted cancels out, and so does its gradient; dividing after the sum over S is the same softmax.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkts,bksh->bkth", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(query.dtype)
    return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_cache(query: Array, keys: Array, values: Array, positions: Array) -> Array:
    """Attention of one position per row to the slots 0..position of its cache.

    Heads that stand side by side in the cache's last axis, P of them, are read as one: a query looks at its own part
    of it because it is zero in the others. That is P times the work of products that wait for memory anyway.

    Args:
        query: [R, N, H].
        keys: [R, K / P, S, P * H].
        values: [R, K / P, S, P * H].
        positions: int32 [R].

    Returns:
        [R, N, H].
    """
    R, N, H = query.shape
    groups, S, W = keys.shape[1:]
    P = W // H
    own = jnp.eye(P, dtype=query.dtype)
    query = query.reshape(R, groups, P, -1, 1, H)
    if P > 1:
        query = query * own[:, None, :, None]
    scores = jnp.einsum(
        "rkgh,rksh->rkgs", query.reshape(R, groups, -1, W), keys, preferred_element_type=jnp.float32
    ) / math.sqrt(H)
    seen = jnp.arange(S) <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = jnp.einsum("rkgs,rksh->rkgh", weights.astype(values.dtype), values).reshape(R, groups, P, -1, P, H)
    if P > 1:
        mixed = (mixed * own[:, None, :, None].astype(mixed.dtype)).sum(axis=4)
    return mixed.reshape(R, N, H)


class Attention(nnx.Module):
    """Grouped-query self-attention with rope; q, k, v may have biases, the output has none."""

    def __init__(self, config: TrunkConfig, rngs: nnx.Rngs | Keys):
        D, N, K, H = config.width, config.heads, config.kv_heads, config.head_size
        self.q = param(rngs, (N, H, D), ("heads", None, "embed"), D)
        self.k = param(rngs, (K, H, D), ("kv_heads", None, "embed"), D)
        self.v = param(rngs, (K, H, D), ("kv_heads", None, "embed"), D)
        self.out = param(rngs, (D, N, H), ("embed", "heads", None), N * H)
        self.biased = config.qkv_bias
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((N, H), jnp.float32), axes=("heads", None))
            self.k_bias = nnx.Param(jnp.zeros((K, H), jnp.float32), axes=("kv_heads", None))
            self.v_bias = nnx.Param(jnp.zeros((K, H), jnp.float32), axes=("kv_heads", None))

    def project(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """X [B, T, D] -> query [B, T, N, H], key and value [B, T, K, H]; query and key rotated."""

        def heads(weight: nnx.Param, bias: nnx.Param | None) -> Array:
            y = linear(x, weight[...])
            return y if bias is None else y + bias[...].astype(y.dtype)

        query = heads(self.q, self.q_bias if self.biased else None)
        key = heads(self.k, self.k_bias if self.biased else None)
        value = heads(self.v, self.v_bias if self.biased else None)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def merge(self, heads: Array) -> Array:
        """[B, T, N, H] -> [B, T, D]."""
        return linear(heads, self.out[...], contract=2)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x) without biases (arXiv 2002.05202), from `width` to `out`."""

    def __init__(
        self,
        width: int,
        ffn: int,
        out: int,
        rngs: nnx.Rngs | Keys,
        axes: tuple[str, str, str] = ("embed", "ffn", "embed"),
    ):
        self.gate = param(rngs, (ffn, width), (axes[1], axes[0]), width)
        self.up = param(rngs, (ffn, width), (axes[1], axes[0]), width)
        self.down = param(rngs, (out, ffn), (axes[2], axes[1]), ffn)

    def __call__(self, x: Array) -> Array:
        """[..., width] -> [..., out]."""
        return linear(jax.nn.silu(linear(x, self.gate[...])) * linear(x, self.up[...]), self.down[...])
