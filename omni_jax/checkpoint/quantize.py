"""Int8 on disk: weights rounded to int8 with float32 scales."""

from __future__ import annotations

import itertools
import math

import numpy as np

from omni_jax.checkpoint.safetensors_io import SCALE_SUFFIX, LazyTensor, Tensors

_MIN_GROUP_SIZE = 32
"""Least number of weights that share a scale: scales then take an eighth of the bytes of the weights at most."""


def quantize_tensors(tensors: Tensors) -> dict[str, LazyTensor]:
    """Every matrix rounded to int8, with its scales; scalars, vectors, biases and positions unchanged.

    Weights share a scale along some of the axes: of all choices that give a scale to `_MIN_GROUP_SIZE` weights or more,
    those with the smallest squared error; along all axes in a smaller tensor.

    Args:
        tensors: floating point; memory holds all of them afterwards, in int8.

    Returns:
        Tensors for `write_safetensors`: int8 under their names, float32 scales under `{name}.int8_scale`.
    """
    quantized: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or name.endswith(("bias", "positions")):
            quantized[name] = tensor
            continue
        values, scale = _quantize(tensor.read().astype(np.float32))
        quantized[name], quantized[name + SCALE_SUFFIX] = LazyTensor.of(values), LazyTensor.of(scale)
    return quantized


def _quantize(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Int8 values and scales, shared along the axes that lose least."""
    axes = range(array.ndim)
    choices = itertools.chain.from_iterable(itertools.combinations(axes, count + 1) for count in axes)
    group_size = min(_MIN_GROUP_SIZE, array.size)
    candidates = (
        _round(array, shared) for shared in choices if math.prod(array.shape[axis] for axis in shared) >= group_size
    )
    return min(candidates, key=lambda candidate: float(np.square(candidate[0] * candidate[1] - array).sum()))


def _round(array: np.ndarray, shared: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Int8 values from -127 to 127, and float32 scales that have size 1 along the shared axes."""
    scale = np.abs(array).max(axis=shared, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(array / scale).astype(np.int8), scale
