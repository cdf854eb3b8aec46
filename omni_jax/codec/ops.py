"""Kernels of the codec: fast on XLA:CPU, with gradients of their own where JAX's are slow.

A depthwise convolution is a sum of shifted products, which XLA fuses and runs on all cores. The gradients are written
by hand: those that JAX derives sum over all positions inside the loop that computes the terms, which XLA:CPU does not
vectorize. Training is three times as fast with these.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array

KERNEL_SIZE = 7
"""Taps of every convolution over time that keeps the rate."""


def sine_squared(x: Array) -> Array:
    """sin(x)^2 in float32, to 3e-7 for |x| below 10^4; elementwise.

    `jnp.sin` does not vectorize on CPU and took four fifths of the decoder's time; this is fifteen times as fast.
    sin^2 has period pi, so x is reduced to its distance from the nearest multiple of pi (pi in two summands, the first
    of few bits so that its multiples are exact). On [-pi/2, pi/2] the sine is a short polynomial (least squares at
    Chebyshev nodes, error 4e-10).
    """
    turns = jnp.round(x * (1 / math.pi))
    x = (x - turns * 3.140625) - turns * (math.pi - 3.140625)
    s = x * x
    tail = -1.98407965e-4 + s * (2.75223034e-6 + s * -2.38419876e-8)
    sine = x + x * s * (-1.66666666e-1 + s * (8.33333042e-3 + s * tail))
    return sine * sine


@jax.custom_vjp
def snake(x: Array, alpha: Array) -> Array:
    """The Snake activation, x + sin^2(alpha x) / alpha; x [..., D], alpha [D]."""
    return x + sine_squared(alpha * x) * (1 / (alpha + 1e-9))


def _snake_forward(x: Array, alpha: Array) -> tuple[Array, tuple[Array, Array]]:
    return snake(x, alpha), (x, alpha)


def _snake_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, alpha = saved
    # sin(2 u), the slope of sin^2(u), by the same polynomial: sin(2 u) = 1 - 2 sin^2(pi/4 - u).
    slope = 1 - 2 * sine_squared(math.pi / 4 - alpha * x)
    by_alpha = gradient * (x * slope - sine_squared(alpha * x) / (alpha + 1e-9)) / (alpha + 1e-9)
    return gradient * (1 + slope), _sum_positions(by_alpha)


snake.defvjp(_snake_forward, _snake_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted_sum(x: Array, weight: Array, dilation: int) -> Array:
    """A depthwise convolution: the sum over taps k of weight[k] times x shifted by k dilations.

    Args:
        x: [B, T, D]; zeros are assumed before and after.
        weight: [7, D].
        dilation: positions between neighboring taps.

    Returns:
        [B, T, D], the middle tap at the position itself.
    """
    T, padded = x.shape[1], _pad_time(x, dilation)
    total = padded[:, :T] * weight[0]
    for tap in range(1, KERNEL_SIZE):
        total = total + padded[:, tap * dilation :][:, :T] * weight[tap]
    return total


def _shifted_sum_forward(x: Array, weight: Array, dilation: int) -> tuple[Array, tuple[Array, Array]]:
    return shifted_sum(x, weight, dilation), (x, weight)


def _shifted_sum_backward(dilation: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    T, padded = x.shape[1], _pad_time(x, dilation)

    # In a loop: unrolled, XLA fuses the seven sums into a single slow one.
    def weight_gradient(tap: Array) -> Array:
        return _sum_positions(jax.lax.dynamic_slice_in_dim(padded, tap * dilation, T, axis=1) * gradient)

    by_weight = jax.lax.map(weight_gradient, jnp.arange(KERNEL_SIZE))
    return shifted_sum(gradient, weight[::-1], dilation), by_weight


shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)


def _pad_time(x: Array, dilation: int) -> Array:
    reach = KERNEL_SIZE // 2 * dilation
    return jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Add bias [D] to x [..., D]."""
    return x + bias


add_bias.defvjp(lambda x, bias: (x + bias, None), lambda _, gradient: (gradient, _sum_positions(gradient)))


def _sum_positions(x: Array) -> Array:
    """[..., D] -> [D], as a product with ones."""
    x = x.reshape(-1, x.shape[-1])
    return jnp.matmul(jnp.ones((len(x),)), x, precision=jax.lax.Precision.HIGHEST)


def exact_products() -> AbstractContextManager[None]:
    """Within it, products are in full float32 on TPU too, which by default rounds their factors to bfloat16.

    The codes of a recording must not depend on the hardware. Audio is decoded with the default, a sixth of the work.
    """
    return jax.default_matmul_precision("highest")


def normalize(x: Array) -> Array:
    """Vectors along the last axis scaled to length 1; zeros stay zeros."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def mask_after(x: Array, lengths: Array | None) -> Array:
    """Zeros in place of the padding of shorter rows.

    Args:
        x: [B, T, ...].
        lengths: int32 [B], positions of each row that are real; None: all.
    """
    if lengths is None:
        return x
    real = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)
