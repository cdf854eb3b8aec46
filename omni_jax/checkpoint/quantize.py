"""Weights in eight bits on disk: whole numbers and float32 scales."""

from __future__ import annotations

import itertools
import math

import numpy as np

from omni_jax.checkpoint.safetensors_io import SCALE_SUFFIX, LazyTensor, Tensors

_SHARE = 32
"""Numbers in eight bits that share a scale, at least: scales take an eighth of their bytes at most."""


def quantize_tensors(tensors: Tensors) -> dict[str, LazyTensor]:
    """Every matrix rounded to eight bits and scales, for `write`; scalars, vectors and biases as they are.

    A scale is shared along some of the axes: along those where that loses least, of all that leave `_SHARE` numbers or
    more to a scale; along all of them in a tensor of fewer.

    Args:
        tensors: real numbers; all of them are in memory afterwards, in eight bits.
    """
    rounded: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or name.endswith("bias"):
            rounded[name] = tensor
            continue
        array = tensor.read().astype(np.float32)
        axes = range(array.ndim)
        shared = itertools.chain.from_iterable(itertools.combinations(axes, count + 1) for count in axes)
        enough = min(_SHARE, array.size)
        ways = (_rounded(array, some) for some in shared if math.prod(array.shape[axis] for axis in some) >= enough)
        numbers, scale = min(ways, key=lambda way: float(np.square(way[0] * way[1] - array).sum()))
        rounded[name], rounded[name + SCALE_SUFFIX] = LazyTensor.of(numbers), LazyTensor.of(scale)
    return rounded


def _rounded(array: np.ndarray, shared: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers -127..127, and scales that are the same along some axes."""
    scale = np.abs(array).max(axis=shared, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(array / scale).astype(np.int8), scale
