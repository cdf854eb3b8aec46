"""Arrays to lazy tensors and back, and tensors that count how often they are read."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping

import numpy as np

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors


def to_lazy(arrays: Mapping[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(array) for name, array in arrays.items()}


def read_all(tensors: Tensors) -> dict[str, np.ndarray]:
    """The values, each of which must have the shape and type that its tensor announces."""
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        assert array.shape == tensors[name].shape, name
        assert array.dtype == tensors[name].dtype, name
    return arrays


def recorded(tensors: Tensors, reads: list[str]) -> dict[str, LazyTensor]:
    """The same tensors; each adds its name to `reads` when it is read."""

    def record(name: str, tensor: LazyTensor) -> LazyTensor:
        return LazyTensor(tensor.shape, tensor.dtype, lambda: (reads.append(name), tensor.read())[1])

    return {name: record(name, tensor) for name, tensor in tensors.items()}


def peak_memory(action: Callable[[], object]) -> int:
    """Bytes that an action has allocated at most at the same time, by Python and numpy; maps of files do not count."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
