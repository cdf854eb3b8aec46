"""Whisper's encoder: log-mel frames to features (Radford et al. 2022, arXiv 2212.04356).

Two convolutions halve 100 frames a second to 50, sinusoids mark the positions, and pre-norm transformer blocks let
every position attend to the whole recording.

Letters: B batch, T positions, D hidden, N heads, H head dim, F intermediate, M mel bins.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from omni_jax import sharding
from omni_jax.config.model import AudioEncoderConfig
from omni_jax.model.attention import attend
from omni_jax.model.layers import Array, Keys, Linear, make_layers


class WhisperEncoder(nnx.Module):
    """The encoder of Whisper.

    Attributes:
        positions: f32 [max_position, D], added to the features; `sinusoids`, or the table of imported weights. Never
            trained: see `omni_jax.training.stages.partition`.
        layers: if `stacked`, one `EncoderBlock` whose parameters have a leading layer axis, run by `lax.scan`
            (compiles once, good for TPU); otherwise an `nnx.List` of blocks. The same seed gives the same
            weights and the same results in both.
    """

    def __init__(
        self, config: AudioEncoderConfig, *, stacked: bool, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.stacked = stacked
        self.dtype = dtype
        D = config.hidden_size
        self.conv1 = Conv(
            config.num_mel_bins, D, stride=1, axes=(None, "mels", "encoder_embed"), dtype=dtype, rngs=rngs
        )
        self.conv2 = Conv(D, D, stride=2, axes=(None, None, "encoder_embed"), dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(jnp.asarray(sinusoids(config.max_position, D)), axes=(None, None))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers: Any = make_layers(lambda keys: EncoderBlock(config, dtype, keys), keys, stacked=stacked)
        self.norm = LayerNorm(D)

    def __call__(self, mel: Array, frames: Array | None = None) -> Array:
        """Encode log-mel frames.

        Args:
            mel: f32 [B, M, 2 * T], from `audio.features.log_mel`. Padded to the full length, T = max_position:
                padding is silence to Whisper. With `config.mask_padding` or `config.short_windows`, T is any window
                that `config.window` allows.
            frames: int32 [B], positions of each recording, the first of T; needed with `config.mask_padding` only.

        Returns:
            dtype [B, T, D], 50 features a second; with `config.mask_padding`, 0 after the recording.

        Raises:
            ValueError: the shape is another.
        """
        config, T = self.config, mel.shape[2] // 2
        least = 1 if config.mask_padding or config.short_windows else config.max_position
        if mel.shape[1:] != (config.num_mel_bins, 2 * T) or not least <= T <= config.max_position:
            raise ValueError(
                f"expected mel as [B, {config.num_mel_bins}, {2 * config.max_position}], found {mel.shape}"
            )
        real = None
        if config.mask_padding:
            assert frames is not None
            real = jnp.arange(T) < frames[:, None]
        x = gelu(self.conv1(mel.transpose(0, 2, 1)))
        x = gelu(self.conv2(x))
        # The residual stream stays float32 whatever the compute dtype: Whisper's grows to hundreds.
        x = x.astype(jnp.float32) + self.positions[:T]
        mask = None if real is None else real[:, None]
        if self.stacked:
            graph, weights = nnx.split(self.layers)

            def body(x: Array, layer: Any) -> tuple[Array, None]:
                return nnx.merge(graph, layer)(sharding.constrain_rows(x), mask), None

            x, _ = jax.lax.scan(body, x, weights)
        else:
            for layer in self.layers:
                x = layer(sharding.constrain_rows(x), mask)
        x = self.norm(x)
        if real is not None:
            x = jnp.where(real[..., None], x, 0)
        return x.astype(self.dtype)


class EncoderBlock(nnx.Module):
    """Pre-norm self-attention and GELU MLP; the keys have no bias."""

    def __init__(self, config: AudioEncoderConfig, dtype: DTypeLike, rngs: nnx.Rngs | Keys) -> None:
        D, N, F = config.hidden_size, config.num_heads, config.intermediate_size
        H = D // N
        into_heads, into_mlp = ("encoder_heads", None, "encoder_embed"), ("encoder_mlp", "encoder_embed")
        self.dtype = dtype
        self.attention_norm = LayerNorm(D)
        self.q = Linear((D,), (N, H), axes=into_heads, bias=True, rngs=rngs)
        self.k = Linear((D,), (N, H), axes=into_heads, rngs=rngs)
        self.v = Linear((D,), (N, H), axes=into_heads, bias=True, rngs=rngs)
        self.out = Linear((N, H), (D,), axes=("encoder_embed", "encoder_heads", None), bias=True, rngs=rngs)
        self.mlp_norm = LayerNorm(D)
        self.up = Linear((D,), (F,), axes=into_mlp, bias=True, rngs=rngs)
        self.down = Linear((F,), (D,), axes=("encoder_embed", "encoder_mlp"), bias=True, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """F32 [B, T, D] -> f32 [B, T, D]; mask bool [B, 1, T], True at positions to attend to."""
        y = self.attention_norm(x).astype(self.dtype)
        x = x + self.out(attend(self.q(y), self.k(y), self.v(y), mask))
        return x + self.down(gelu(self.up(self.mlp_norm(x).astype(self.dtype))))


class Conv(nnx.Module):
    """A convolution three frames wide, one frame of zeros around.

    Attributes:
        weight: f32 [3, inputs, outputs].
        bias: f32 [outputs].
    """

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
        self.weight = nnx.Param(init(rngs.params(), (3, inputs, outputs)), axes=axes)
        self.bias = nnx.Param(jnp.zeros(outputs), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """[B, frames, inputs] -> dtype [B, frames / stride, outputs]."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.weight[...].astype(self.dtype),
            window_strides=(self.stride,),
            padding=[(1, 1)],
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization of the last axis (arXiv 1607.06450), in float32, eps 1e-5."""

    def __init__(self, size: int) -> None:
        self.scale = nnx.Param(jnp.ones(size), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(size), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """F32 [..., D] -> f32 [..., D]."""
        x = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(x).mean(axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(variance + 1e-5) * self.scale[...] + self.bias[...]


def recording_frames(audio: Array) -> Array:
    """Positions that recordings take, as `omni_jax.prompts.speech_positions` counts them.

    Args:
        audio: f32 [B, samples], padded with zeros. Zeros at the end of a recording are padding, too.

    Returns:
        int32 [B], at least 1; one more than there are where the recording fills the window.
    """
    lengths = audio.shape[1] - jnp.argmax((audio != 0)[:, ::-1], axis=1)
    return jnp.where(jnp.any(audio != 0, axis=1), lengths, 0) // 320 + 1


def sinusoids(positions: int, size: int) -> np.ndarray:
    """The encoder's positions before any training: sines in the first half of the hidden axis, cosines in the second.

    Wavelengths run geometrically from 2 pi to 20000 pi positions. Float32 in every step, as Whisper computes
    them: at position 1500 exact arithmetic would differ by 1e-4.

    Returns:
        f32 [positions, D].
    """
    step = np.float32(math.log(10000.0) / max(size // 2 - 1, 1))
    # numpy's float32 exp may miss the last bit, which the position multiplies by up to 1500.
    rate = np.exp((-step * np.arange(size // 2, dtype=np.float32)).astype(np.float64)).astype(np.float32)
    angle = np.arange(positions, dtype=np.float32)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def gelu(x: Array) -> Array:
    """The GELU with the error function; the tanh approximation is off by up to 5e-4."""
    return jax.nn.gelu(x, approximate=False)
