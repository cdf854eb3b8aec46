"""The ear: Whisper's encoder, log-mel frames to features (Radford et al. 2022, arXiv 2212.04356).

Two convolutions halve 100 frames a second to 50, sinusoids tell them apart, and pre-norm transformer blocks
let every position hear the whole clip. Parameters are float32; their metadata `axes` holds logical axis names
for sharding.

Letters: B batch, T positions, S positions attended to, D width, N heads, H head size, F ffn, M mel bins.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from omni_jax import sharding
from omni_jax.config import EarConfig
from omni_jax.model.layers import for_one_cpu

SHORT_CLIP = 512
"""Positions up to which attention takes all queries at once."""
QUERY_BLOCK = 150
"""Query positions per step of the attention. 1500 positions are ten blocks without a remainder."""


class Whisper(nnx.Module):
    """The encoder of Whisper.

    Attributes:
        layers: if `stacked`, one `Block` whose parameters have a leading layer axis, run by `lax.scan`
            (compiles once, good for TPU); otherwise an `nnx.List` of blocks. The same seed gives the same
            weights and the same results in both.
    """

    def __init__(self, config: EarConfig, *, stacked: bool, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.stacked = stacked
        self.dtype = dtype
        self.mesh: Mesh | None = None
        """What it will run on, where that is known beforehand."""
        D = config.width
        self.conv1 = Conv(config.mels, D, stride=1, axes=(None, "mels", "ear_embed"), dtype=dtype, rngs=rngs)
        self.conv2 = Conv(D, D, stride=2, axes=(None, None, "ear_embed"), dtype=dtype, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.layers)

        def block(key: jax.Array) -> Block:
            return Block(config, dtype=dtype, rngs=nnx.Rngs(params=key))

        self.layers: Block | nnx.List[Block]
        if stacked:
            self.layers = nnx.vmap(block)(keys)
            for _, node in nnx.iter_graph(self.layers):
                if isinstance(node, nnx.Param):
                    node.set_metadata(axes=("layers", *node.axes))
        else:
            self.layers = nnx.List([block(key) for key in keys])
        self.norm = LayerNorm(D)

    def __call__(self, mel: jax.Array) -> jax.Array:
        """Encode log-mel frames.

        Args:
            mel: f32 [B, M, 2 * positions], from `audio.features.log_mel`, padded to the full length: Whisper
                has no mask, it hears the padding as silence.

        Returns:
            dtype [B, positions, D], 50 features a second.

        Raises:
            ValueError: the shape is another.
        """
        config = self.config
        if mel.shape[1:] != (config.mels, 2 * config.positions):
            raise ValueError(f"expected mel as [B, {config.mels}, {2 * config.positions}], found {mel.shape}")
        x = _gelu(self.conv1(mel.transpose(0, 2, 1)))
        x = _gelu(self.conv2(x))
        # The residual stream stays float32 whatever the compute dtype: Whisper's grows to hundreds.
        x = x.astype(jnp.float32) + sinusoids(config.positions, config.width)
        if isinstance(self.layers, Block):
            graphdef, state = nnx.split(self.layers)

            def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
                return nnx.merge(graphdef, layer)(sharding.by_rows(x, self.mesh)), None

            x, _ = jax.lax.scan(body, x, state)
        else:
            for layer in self.layers:
                x = layer(sharding.by_rows(x, self.mesh))
        return self.norm(x).astype(self.dtype)


class Block(nnx.Module):
    """Pre-norm self-attention and GELU MLP; the keys have no bias."""

    def __init__(self, config: EarConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        D, N, F = config.width, config.heads, config.ffn
        H = D // N
        embed, heads, ffn = ("ear_embed",), ("ear_heads", None), ("ear_ffn",)
        self.attention_norm = LayerNorm(D)
        self.q = Linear((D,), (N, H), axes=embed + heads, dtype=dtype, rngs=rngs)
        self.k = Linear((D,), (N, H), axes=embed + heads, use_bias=False, dtype=dtype, rngs=rngs)
        self.v = Linear((D,), (N, H), axes=embed + heads, dtype=dtype, rngs=rngs)
        self.out = Linear((N, H), (D,), axes=heads + embed, dtype=dtype, rngs=rngs)
        self.ffn_norm = LayerNorm(D)
        self.up = Linear((D,), (F,), axes=embed + ffn, dtype=dtype, rngs=rngs)
        self.down = Linear((F,), (D,), axes=ffn + embed, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """F32 [B, T, D] -> f32 [B, T, D]."""
        y = self.attention_norm(x)
        x = x + self.out(attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(_gelu(self.up(self.ffn_norm(x))))


class Linear(nnx.Module):
    """An affine map of the last dimensions: kernel [*inputs, *outputs], bias [*outputs] or none."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        use_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.inputs = len(inputs)
        self.dtype = dtype
        ranks = range(len(inputs) + len(outputs))
        init = jax.nn.initializers.lecun_normal(in_axis=ranks[: len(inputs)], out_axis=ranks[len(inputs) :])
        self.kernel = nnx.Param(init(rngs.params(), (*inputs, *outputs)), axes=axes)
        self.bias = nnx.Param(jnp.zeros(outputs), axes=_bias_axes(axes[len(inputs) :])) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *inputs] -> dtype [..., *outputs]."""
        wide = jnp.float32 if for_one_cpu(self.dtype) else None
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.tensordot(x.astype(self.dtype), kernel, axes=self.inputs, preferred_element_type=wide)
        y = y.astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Conv(nnx.Module):
    """A convolution three frames wide, one frame of zeros around: kernel [3, in, out], bias [out]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        axes: tuple[str | None, ...],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.stride = stride
        self.dtype = dtype
        init = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        self.kernel = nnx.Param(init(rngs.params(), (3, inputs, outputs)), axes=axes)
        self.bias = nnx.Param(jnp.zeros(outputs), axes=_bias_axes(axes[2:]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, frames, in] -> dtype [B, frames / stride, out]."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(self.stride,),
            padding=[(1, 1)],
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation of the last dimension, in float32, eps 1e-5."""

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """F32 [..., D] -> f32 [..., D]."""
        x = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(x).mean(axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(variance + 1e-5) * self.scale[...] + self.bias[...]


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Every position attends to every position; softmax in float32.

    Of a long clip a block of queries at a time: all scores at once are 108 MB per clip at whisper-small's shape. In
    blocks they stay in a CPU's cache (measured three times faster) and a TPU's batch is not bounded by them. A short
    one's fit as they are, and without blocks its gradient is four times faster.

    Args:
        q: [B, T, N, H], unscaled.
        k: [B, S, N, H].
        v: [B, S, N, H].

    Returns:
        [B, T, N, H] in the dtype of v.
    """
    B, T, N, H = q.shape
    k = k.transpose(0, 2, 3, 1)
    v = v.transpose(0, 2, 1, 3)

    def attend(q: jax.Array) -> jax.Array:
        scores = jnp.einsum("bnth,bnhs->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(H)
        # What is subtracted cancels out, and so does its gradient.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        mixed = jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        # Dividing after the sum over S is the same softmax with H divisions a row in place of S.
        return (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)

    if T <= SHORT_CLIP:
        return attend(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    # The last block is filled up with queries of zeros, whose answers are cut off again.
    size = QUERY_BLOCK
    blocks = -(-T // size)
    q = jnp.pad(q, ((0, 0), (0, blocks * size - T), (0, 0), (0, 0)))
    mixed = jax.lax.map(attend, q.reshape(B, blocks, size, N, H).transpose(1, 0, 3, 2, 4))
    return mixed.transpose(1, 0, 3, 2, 4).reshape(B, blocks * size, N, H)[:, :T]


def sinusoids(positions: int, width: int) -> np.ndarray:
    """The encoder's fixed positions: sines in the first half of the width, cosines in the second.

    Wavelengths run geometrically from 2 pi to 20000 pi positions. Float32 in every step, as Whisper computes
    them: at position 1500 exact arithmetic would differ by 1e-4.

    Returns:
        f32 [positions, D].
    """
    step = np.float32(math.log(10000.0) / max(width // 2 - 1, 1))
    # numpy's float32 exp may miss the last bit, which the position multiplies by up to 1500.
    rate = np.exp((-step * np.arange(width // 2, dtype=np.float32)).astype(np.float64)).astype(np.float32)
    angle = np.arange(positions, dtype=np.float32)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _gelu(x: jax.Array) -> jax.Array:
    """The GELU with the error function; the tanh approximation is off by up to 5e-4."""
    return jax.nn.gelu(x, approximate=False)


def _bias_axes(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Axes of a bias, from its kernel's output axes; a vector of the width is too small to shard."""
    return tuple(None if axis == "ear_embed" else axis for axis in axes)
