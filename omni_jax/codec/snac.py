"""SNAC, the neural codec: speech at 24 kHz to seven codes per frame of 85 ms, and back.

The encoder of strided convolutions makes one latent per hop of 512 samples. Three quantizers round the latents one
after the other, each what the ones before left over, at a quarter, half and full rate. The decoder mirrors the encoder
with transposed convolutions (Siuzdak et al. 2024, arXiv 2410.14411). The sizes named here are those of snac_24khz;
`omni_jax.config.model.CodecConfig` holds them.

Everything is channels-last and written for XLA: a convolution over time is a sum of shifted products or one matrix
product, which the compiler fuses and runs on all cores. (XLA's own depthwise convolution is seventy times slower on
CPU.)

Letters: B batch, T positions (at the rate of the layer), D channels, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec
from numpy.typing import ArrayLike

from omni_jax import sharding
from omni_jax.codec.ops import (
    KERNEL_SIZE,
    Array,
    add_bias,
    exact_products,
    mask_after,
    normalize,
    shifted_sum,
    snake,
)
from omni_jax.config.model import CodecConfig
from omni_jax.shapes import shape_mismatches

FRAME_SLOTS = ((0,), (1, 4), (2, 3, 5, 6))
"""Which of a frame's seven slots each quantizer's codes take, in the order of time."""
FRAME_SLOT_ORDER = np.argsort(np.concatenate(FRAME_SLOTS))
"""For each slot, its index in the concatenated codes of the quantizers."""
DILATIONS = (1, 3, 9)
"""Dilations of the residual units in each block."""
TPU_FRAMES = 32
"""Frames that a TPU decodes at a time. The activations of so many stay in its on-chip memory; those of 64, most of them
at 24 kHz with few channels, go to HBM and back in every layer and take twelve times as long."""


class Quantized(NamedTuple):
    """Quantized latents, with the losses that train the codebooks."""

    latents: Array
    """f32 [B, T, D]: the decoder's input. Its gradient is passed straight through to the encoder."""
    codes: Array
    """int32 [B, F, 7] in the order of frame slots."""
    commitment_loss: Array
    """f32 []: pulls the encoder's projections towards their codewords."""
    codebook_loss: Array
    """f32 []: pulls the codewords towards the projections they replace."""


class Snac(nnx.Module):
    """The codec. Made without `rngs`, its weights are zeros: for their shapes.

    To train it: `z = codec.encoder(audio[..., None])`, `q = codec.quantize(z)`, `codec.decoder(q.latents)`.

    Decoding adds no noise, so equal codes give equal audio. The published decoder adds random noise in its noise
    blocks; their weights are parameters here too (`CodecConfig.noise`), for export, but are never applied.

    Attributes:
        encoder: f32 [B, T, 1] audio -> f32 [B, T/512, D] latents.
        quantizers: coarse to fine.
        decoder: latents -> f32 [B, T] audio.
    """

    def __init__(self, config: CodecConfig, *, rngs: nnx.Rngs | None):
        self.config = config
        D = latent_size(config)
        self.encoder = Encoder(config, rngs=rngs)
        self.quantizers = nnx.List([Quantizer(config, D, stride, rngs=rngs) for stride in config.vq_strides])
        self.decoder = Decoder(config, rngs=rngs)

    @classmethod
    def from_params(cls, config: CodecConfig, params: Mapping[str, Array | np.ndarray]) -> Snac:
        """A codec with the given parameters, named as by `params()`.

        Raises:
            ValueError: lists every parameter that is missing, unknown or misshapen.
        """
        graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=None)))
        paths = traverse_util.flatten_dict(nnx.to_pure_dict(state))
        expected = {_dotted(path): value.shape for path, value in paths.items()}
        if wrong := shape_mismatches(params, expected):
            raise ValueError("codec parameters:\n" + "\n".join(wrong))
        values = {path: jnp.asarray(params[_dotted(path)]) for path in paths}
        return nnx.merge(graph, traverse_util.unflatten_dict(values))

    def params(self) -> dict[str, Array]:
        """The parameters by dotted name, list indices as digits: `decoder.blocks.0.up.weight`."""
        return {_dotted(path): value for path, value in traverse_util.flatten_dict(_pure_dict(self)).items()}

    def encode(self, audio: ArrayLike, *, lengths: ArrayLike | None = None) -> Array:
        """Audio to codes.

        Args:
            audio: f32 [B, samples] at the codec's rate, in [-1, 1]. Zeros are appended up to whole frames.
            lengths: int32 [B], samples of each row that are real. A row's codes are then exactly those of the row
                alone. None: the zeros that pad a row are encoded as silence, which may change its last codes.

        Returns:
            int32 [B, F, 7], F = ceil(samples / 2048), in the order of frame slots; 0 beyond a row's length.
        """
        frame = self.config.frame_size
        audio = jnp.asarray(audio)
        audio = jnp.pad(audio, ((0, 0), (0, -audio.shape[1] % frame)))[..., None]
        if lengths is None:
            return self.quantize(self.encoder(audio)).codes
        lengths = jnp.asarray(lengths, jnp.int32)
        frames = -(-lengths // frame)
        codes = self.quantize(self.encoder(mask_after(audio, lengths), frames * frame)).codes
        return mask_after(codes, frames)

    def quantize(self, latents: Array) -> Quantized:
        """Round latents f32 [B, T, D], T a multiple of 4; each quantizer takes the residual of those before."""
        B, T, _ = latents.shape
        total, residual = jnp.zeros_like(latents), latents
        slot_codes, commitment, codebook = [], jnp.zeros(()), jnp.zeros(())
        for quantizer in self.quantizers:
            rounded, codes, projected, codeword = quantizer(residual)
            total, residual = total + rounded, residual - rounded
            slot_codes.append(codes.reshape(B, T // self.config.vq_strides[0], -1))
            commitment += jnp.mean((projected - jax.lax.stop_gradient(codeword)) ** 2)
            codebook += jnp.mean((codeword - jax.lax.stop_gradient(projected)) ** 2)
        return Quantized(total, jnp.concatenate(slot_codes, -1)[..., FRAME_SLOT_ORDER], commitment, codebook)

    def decode(self, codes: ArrayLike, *, lengths: ArrayLike | None = None) -> Array:
        """Codes to audio.

        Args:
            codes: int32 [B, F, 7] in the order of frame slots, each below codebook_size.
            lengths: int32 [B], frames of each row that are real; what follows them is ignored. A row's audio is then
                that of the row alone.

        Returns:
            f32 [B, F*2048] in [-1, 1]; 0 beyond a row's length.
        """
        codes = jnp.asarray(codes)
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        if sharding.platform() != "tpu":
            return self._decode(codes, lengths)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size <= 1:
            return self._decode_in_windows(codes, lengths)
        graph, params = nnx.split(self)
        rows = sharding.spec(codes.shape[:1], ("batch",), mesh)
        decode = jax.shard_map(
            lambda params, *args: nnx.merge(graph, params)._decode_in_windows(*args),
            in_specs=(PartitionSpec(), rows, rows),
            out_specs=rows,
        )
        return decode(params, codes, lengths)

    def _decode(self, codes: Array, lengths: Array | None) -> Array:
        B, F, _ = codes.shape
        latents = jnp.asarray(0.0)
        for quantizer, slots in zip(self.quantizers, FRAME_SLOTS, strict=True):
            latents = latents + quantizer.lookup(codes[..., slots].reshape(B, F * len(slots)))
        return self.decoder(latents, None if lengths is None else lengths * self.config.vq_strides[0])

    def _decode_in_windows(self, codes: Array, lengths: Array | None) -> Array:
        """`_decode`, at most `TPU_FRAMES` frames at a time: several short rows, or a window of a long one.

        A window also has the frames before and after its own that its audio depends on.
        """
        (B, F, _), frame = codes.shape, self.config.frame_size
        left, right = (math.ceil(samples / frame) for samples in receptive_field(self.config))
        size, own = (F, F) if F <= TPU_FRAMES else (TPU_FRAMES, TPU_FRAMES - left - right)
        begins = np.arange(0, F, own)
        starts = np.clip(begins - left, 0, F - size)
        count, rows = B * len(starts), max(1, TPU_FRAMES // size)

        def in_groups(windows: Array) -> Array:
            windows = windows.reshape(count, *windows.shape[2:])
            padding = [(0, -count % rows), *[(0, 0)] * (windows.ndim - 1)]
            return jnp.pad(windows, padding).reshape(-1, rows, *windows.shape[1:])

        groups = in_groups(codes[:, starts[:, None] + np.arange(size)])
        real = None if lengths is None else in_groups(jnp.clip(lengths[:, None] - starts, 0, size))
        audio = jax.lax.map(lambda group: self._decode(*group), (groups, real))
        audio = audio.reshape(-1, size * frame)[:count].reshape(B, -1, size * frame)
        ends = np.minimum(begins + own, F)
        return jnp.concatenate(
            [
                audio[:, window, (begin - start) * frame : (end - start) * frame]
                for window, (start, begin, end) in enumerate(zip(starts, begins, ends, strict=True))
            ],
            axis=1,
        )


class Encoder(nnx.Module):
    """Audio to latents: a block per rate, each with twice the channels of the one before."""

    def __init__(self, config: CodecConfig, *, rngs: nnx.Rngs | None):
        D = config.encoder_dim
        # A depthwise convolution of one channel broadcast to D is the dense convolution from 1 to D channels.
        self.conv_in = Depthwise(D, 1, rngs=rngs)
        blocks = []
        for rate in config.encoder_rates:
            blocks.append(EncoderBlock(D, 2 * D, rate, rngs=rngs))
            D *= 2
        self.blocks = nnx.List(blocks)
        self.conv_out = Depthwise(D, 1, rngs=rngs)

    def __call__(self, audio: Array, lengths: Array | None = None) -> Array:
        """Audio to latents.

        Args:
            audio: f32 [B, T, 1], T whole hops.
            lengths: int32 [B], samples of each row that are real, whole hops too.

        Returns:
            f32 [B, T/512, D].
        """
        with exact_products():
            x = self.conv_in(audio, lengths)
            for block in self.blocks:
                x = block(x, lengths)
                lengths = None if lengths is None else lengths // block.rate
            return self.conv_out(x, lengths)


class EncoderBlock(nnx.Module):
    """Three residual units, then `rate` positions become one of twice the channels."""

    def __init__(self, inputs: int, outputs: int, rate: int, *, rngs: nnx.Rngs | None):
        self.rate = rate
        self.units = nnx.List([ResidualUnit(inputs, dilation, rngs=rngs) for dilation in DILATIONS])
        self.snake = Snake(inputs)
        self.down = Downsample(inputs, outputs, rate, rngs=rngs)

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """[B, T, D] -> [B, T/rate, 2D]."""
        for unit in self.units:
            x = unit(x, lengths)
        return self.down(self.snake(x), lengths)


class Decoder(nnx.Module):
    """Latents to audio: a block per rate, each with half the channels of the one before."""

    def __init__(self, config: CodecConfig, *, rngs: nnx.Rngs | None):
        D = config.decoder_dim
        latents = latent_size(config)
        self.conv_in = Depthwise(latents, 1, rngs=rngs)
        self.project = Pointwise(latents, D, rngs=rngs)
        blocks = []
        for rate in config.decoder_rates:
            blocks.append(DecoderBlock(D, D // 2, rate, config.noise, rngs=rngs))
            D //= 2
        self.blocks = nnx.List(blocks)
        self.snake = Snake(D)
        self.conv_out = Mixdown(D, rngs=rngs)

    def __call__(self, latents: Array, lengths: Array | None = None) -> Array:
        """Latents to audio.

        Args:
            latents: f32 [B, T, D].
            lengths: int32 [B], positions of each row that are real.

        Returns:
            f32 [B, T*512].
        """
        x = self.project(self.conv_in(latents, lengths))
        for block in self.blocks:
            x = block(x, lengths)
            lengths = None if lengths is None else lengths * block.rate
        return mask_after(jnp.tanh(self.conv_out(self.snake(x), lengths)), lengths)


class DecoderBlock(nnx.Module):
    """One position becomes `rate` of half the channels, then three residual units."""

    def __init__(self, inputs: int, outputs: int, rate: int, noise: bool, *, rngs: nnx.Rngs | None):
        self.rate = rate
        self.snake = Snake(inputs)
        self.up = Upsample(inputs, outputs, rate, rngs=rngs)
        self.noise = NoiseBlock(outputs, rngs=rngs) if noise else None
        self.units = nnx.List([ResidualUnit(outputs, dilation, rngs=rngs) for dilation in DILATIONS])

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """[B, T, D] -> [B, T*rate, D/2]."""
        x = self.up(self.snake(x), lengths)
        lengths = None if lengths is None else lengths * self.rate
        for unit in self.units:
            x = unit(x, lengths)
        return x


class ResidualUnit(nnx.Module):
    """A dilated depthwise convolution over time and a mix of the channels, around a skip connection."""

    def __init__(self, D: int, dilation: int, *, rngs: nnx.Rngs | None):
        self.snake_in = Snake(D)
        self.depthwise = Depthwise(D, dilation, rngs=rngs)
        self.snake_out = Snake(D)
        self.pointwise = Pointwise(D, D, rngs=rngs)

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """[B, T, D] -> [B, T, D]."""
        y = self.depthwise(self.snake_in(x), lengths)
        return x + self.pointwise(self.snake_out(y))


class Quantizer(nnx.Module):
    """Averages latents over `stride`, projects them to few dimensions and rounds to the codeword nearest by angle."""

    def __init__(self, config: CodecConfig, D: int, stride: int, *, rngs: nnx.Rngs | None):
        self.stride = stride
        self.project_in = Pointwise(D, config.codebook_dim, rngs=rngs)
        shape = (config.codebook_size, config.codebook_dim)
        codewords = jnp.zeros(shape) if rngs is None else jax.random.normal(rngs.params(), shape, jnp.float32)
        self.codebook = nnx.Param(codewords)
        self.project_out = Pointwise(config.codebook_dim, D, rngs=rngs)

    def __call__(self, latents: Array) -> tuple[Array, Array, Array, Array]:
        """Round latents.

        Args:
            latents: f32 [B, T, D].

        Returns:
            f32 [B, T, D] rounded latents, with a straight-through gradient; int32 [B, T/stride] codes; and for the
            losses, f32 [B, T/stride, codebook_dim], the projections and the codewords they were rounded to.
        """
        B, T, D = latents.shape
        with exact_products():
            projected = self.project_in(latents.reshape(B, T // self.stride, self.stride, D).mean(2))
            # Between unit vectors the smallest angle is the largest product.
            similarity = normalize(projected) @ normalize(self.codebook[...]).T
            codes = jnp.argmax(similarity, -1).astype(jnp.int32)
            codeword = self.codebook[...][codes]
            straight_through = projected + jax.lax.stop_gradient(codeword - projected)
            return self._expand(straight_through), codes, projected, codeword

    def lookup(self, codes: Array) -> Array:
        """Codes int32 [B, n] to latents f32 [B, n*stride, D]."""
        return self._expand(self.codebook[...][codes])

    def _expand(self, codewords: Array) -> Array:
        return jnp.repeat(self.project_out(codewords), self.stride, axis=1)


class Snake(nnx.Module):
    """x + sin^2(a x) / a with a learned frequency a per channel (Ziyin et al. 2020, arXiv 2006.08195)."""

    def __init__(self, D: int):
        self.alpha = nnx.Param(jnp.ones((D,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        return snake(x, self.alpha[...])


class Depthwise(nnx.Module):
    """A 7-tap convolution of each channel by itself; the output is as long as the input.

    Attributes:
        weight: f32 [7, D].
        bias: f32 [D].
    """

    def __init__(self, D: int, dilation: int, *, rngs: nnx.Rngs | None):
        self.dilation = dilation
        self.weight = _uniform(rngs, (KERNEL_SIZE, D), KERNEL_SIZE)
        self.bias = nnx.Param(jnp.zeros((D,), jnp.float32))

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """[B, T, D] -> [B, T, D]."""
        weight = self.weight[...]
        # A single input channel, as in the encoder's first layer, feeds every output channel.
        x = jnp.broadcast_to(mask_after(x, lengths), (*x.shape[:2], weight.shape[1]))
        return add_bias(shifted_sum(x, weight, self.dilation), self.bias[...])


class Mixdown(nnx.Module):
    """A 7-tap convolution of all channels to one.

    Attributes:
        weight: f32 [D, 7].
        bias: f32 [1].
    """

    def __init__(self, D: int, *, rngs: nnx.Rngs | None):
        self.weight = _uniform(rngs, (D, KERNEL_SIZE), KERNEL_SIZE * D)
        self.bias = nnx.Param(jnp.zeros((1,), jnp.float32))

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """[B, T, D] -> [B, T]."""
        T, reach = x.shape[1], KERNEL_SIZE // 2
        # First the sum over channels, then the shifts: these move 7 numbers per position instead of 7 D.
        taps = jnp.pad(mask_after(x, lengths) @ self.weight[...], ((0, 0), (reach, reach), (0, 0)))
        total = taps[:, :T, 0]
        for tap in range(1, KERNEL_SIZE):
            total = total + taps[:, tap : tap + T, tap]
        return total + self.bias[...]


class Pointwise(nnx.Module):
    """A convolution of kernel 1: one matrix for every position.

    Attributes:
        weight: f32 [D_in, D_out].
        bias: f32 [D_out].
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs | None):
        self.weight = _uniform(rngs, (inputs, outputs), inputs)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """[..., D_in] -> [..., D_out]."""
        return add_bias(x @ self.weight[...], self.bias[...])


class Downsample(nnx.Module):
    """A convolution of kernel 2s and stride s, padded so that T/s positions come out.

    Attributes:
        weight: f32 [2s, D_in, D_out].
        bias: f32 [D_out].
    """

    def __init__(self, inputs: int, outputs: int, rate: int, *, rngs: nnx.Rngs | None):
        self.rate = rate
        self.weight = _uniform(rngs, (2 * rate, inputs, outputs), 2 * rate * inputs)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """[B, T, D_in] -> [B, T/s, D_out]."""
        B, T, D = x.shape
        s, before = self.rate, math.ceil(self.rate / 2)
        x = jnp.pad(mask_after(x, lengths), ((0, 0), (before, s - before), (0, 0)))
        # Each output sees two neighboring groups of s positions: a matrix for the first, one for the second.
        groups = x.reshape(B, T // s + 1, s * D)
        first, second = self.weight[...].reshape(2, s * D, -1)
        return groups[:, :-1] @ first + groups[:, 1:] @ second + self.bias[...]


class Upsample(nnx.Module):
    """A transposed convolution of kernel 2s and stride s, cropped so that T*s positions come out.

    Attributes:
        weight: f32 [D_in, 2s, D_out].
        bias: f32 [D_out].
    """

    def __init__(self, inputs: int, outputs: int, rate: int, *, rngs: nnx.Rngs | None):
        self.rate = rate
        self.weight = _uniform(rngs, (inputs, 2 * rate, outputs), 2 * inputs)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """[B, T, D_in] -> [B, T*s, D_out]."""
        B, T, D = x.shape
        s, crop = self.rate, math.ceil(self.rate / 2)
        # Every position makes two groups of s outputs; the second one overlaps the next position's first.
        groups = mask_after(x, lengths) @ self.weight[...].reshape(D, -1)
        first, second = jnp.split(groups, 2, axis=-1)
        total = jnp.pad(first, ((0, 0), (0, 1), (0, 0))) + jnp.pad(second, ((0, 0), (1, 0), (0, 0)))
        return total.reshape(B, (T + 1) * s, -1)[:, crop : crop + T * s] + self.bias[...]


class NoiseBlock(nnx.Module):
    """The weight of a noise block, kept for export; there is nothing to call.

    The published decoder computes x + n * (x W), with n drawn from a normal distribution for every position.

    Attributes:
        weight: f32 [D, D].
    """

    def __init__(self, D: int, *, rngs: nnx.Rngs | None):
        self.weight = _uniform(rngs, (D, D), D)


def latent_size(config: CodecConfig) -> int:
    """Channels of a latent: the encoder doubles its channels with every rate."""
    return config.encoder_dim * 2 ** len(config.encoder_rates)


class ReceptiveField(NamedTuple):
    """Samples that depend on a frame: frame f changes [f*frame - right, (f+1)*frame + left), and no others."""

    left_samples: int
    """How far back a sample depends on frames that have ended."""
    right_samples: int
    """How far ahead a sample depends on frames that have not begun: samples at the end of the audio decoded so far
    that the next frame still changes."""


def receptive_field(config: CodecConfig) -> ReceptiveField:
    """The decoder's receptive field, computed layer by layer. Exact, not a bound."""
    # Positions [start, end) that one frame changes, at the rate of the current layer.
    start, end = 0, config.vq_strides[0]
    reach = KERNEL_SIZE // 2
    start, end = start - reach, end + reach
    for rate in config.decoder_rates:
        # Position t of a transposed convolution makes outputs [t*s, (t+2)*s), moved by the crop.
        crop = math.ceil(rate / 2)
        start, end = start * rate - crop, (end + 1) * rate - crop
        for dilation in DILATIONS:
            start, end = start - reach * dilation, end + reach * dilation
    return ReceptiveField(left_samples=end + reach - config.frame_size, right_samples=reach - start)


class DecodeFn(Protocol):
    """A decoder as `make_decoder` returns it; `TorchSnac.decode` is one too."""

    def __call__(self, codes: ArrayLike, *, lengths: ArrayLike | None = None) -> Array:
        """int32 [B, F, 7] -> f32 [B, F*2048], as `Snac.decode`."""


def make_decoder(codec: Snac) -> DecodeFn:
    """The compiled `codec.decode`, with a snapshot of the parameters; one compilation per shape."""
    return _compiled(codec, Snac.decode)


def make_encoder(codec: Snac) -> Callable[..., Array]:
    """The compiled `codec.encode(audio, lengths=None)`, with a snapshot of the parameters."""
    return _compiled(codec, Snac.encode)


def _compiled(codec: Snac, method: Callable[..., Array]) -> Callable[..., Array]:
    # A plain dict of arrays is dispatched several times faster than a module.
    params = _pure_dict(codec)
    run = _jitted(nnx.split(codec)[0], method)
    mesh = sharding.mesh_of(jax.tree.leaves(params)[0])

    def call(x: ArrayLike, *, lengths: ArrayLike | None = None) -> Array:
        with jax.set_mesh(mesh):
            return run(params, x, lengths)

    return call


@lru_cache(maxsize=8)
def _jitted(graph: nnx.GraphDef[Snac], method: Callable[..., Array]) -> Callable[..., Array]:
    """The function of all codecs of one shape: the second one compiles nothing."""

    @jax.jit
    def run(params: Any, x: Array, lengths: Array | None) -> Array:
        return method(nnx.merge(graph, params), x, lengths=lengths)

    return run


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _pure_dict(module: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _uniform(rngs: nnx.Rngs | None, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """Uniform in +-1/sqrt(fan_in); zeros without `rngs`."""
    if rngs is None:
        return nnx.Param(jnp.zeros(shape))
    size = math.prod(shape)
    # Each size that is drawn is compiled, which takes most of the time: rounded up, there are few of them.
    drawn = jax.random.uniform(rngs.params(), (1 << (size - 1).bit_length(),), jnp.float32, -1, 1)
    return nnx.Param(drawn[:size].reshape(shape) / math.sqrt(fan_in))
