"""Conversion tables: which published tensors are which of ours, and how to compute one from the other, both ways.

A format is described by a list of entries. Most are made by `rename`, `reshape`, `transpose` or `pad`:

    table = [
        rename("model.norm.weight", "norm.scale", (D,)),
        reshape("model.layers.0.self_attn.q_proj.weight", "trunk.layers.0.attention.q.weight", (N * H, D), (N, H, D)),
    ]

`to_ours` and `to_theirs` apply a table to a mapping of lazy tensors and return another one: names, shapes and types
are checked at once, values are read and converted when a result is read. Every result has the type of its source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors, all_finite
from omni_jax.errors import ConversionError
from omni_jax.shapes import shape_mismatches

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
"""Types that weights may have."""

Shape = tuple[int, ...]
Function = Callable[..., Sequence[np.ndarray]]
"""From the arrays on one side of an entry to those on the other, both in the order of their names."""


@dataclass(frozen=True)
class Entry:
    """Some of their tensors, the tensors of ours that hold the same values, and the functions between them."""

    theirs: Mapping[str, Shape]
    ours: Mapping[str, Shape]
    to_ours: Function
    to_theirs: Function


def rename(theirs: str, ours: str, shape: Shape) -> Entry:
    """One tensor that is the same on both sides."""
    return reshape(theirs, ours, shape, shape)


def reshape(theirs: str, ours: str, shape: Shape, our_shape: Shape) -> Entry:
    """One tensor whose axes are split or merged; `shape` is theirs."""
    if math.prod(shape) != math.prod(our_shape):
        raise ValueError(f"{theirs} {shape} cannot be {ours} {our_shape}: different numbers of elements")
    return Entry(
        {theirs: shape},
        {ours: our_shape},
        lambda array: (array.reshape(our_shape),),
        lambda array: (array.reshape(shape),),
    )


def transpose(theirs: str, ours: str, shape: Shape, order: tuple[int, ...]) -> Entry:
    """One tensor whose axes are permuted; `order` names their axes in our order."""
    return Entry(
        {theirs: shape},
        {ours: tuple(shape[axis] for axis in order)},
        lambda array: (np.ascontiguousarray(array.transpose(order)),),
        lambda array: (np.ascontiguousarray(array.transpose(np.argsort(order))),),
    )


def pad(theirs: str, ours: str, shape: Shape, our_shape: Shape) -> Entry:
    """One tensor that is larger in theirs: padded with zeros at the end of each axis."""
    widths = [(0, wide - narrow) for wide, narrow in zip(shape, our_shape, strict=True)]
    inside = tuple(slice(size) for size in our_shape)
    return Entry(
        {theirs: shape},
        {ours: our_shape},
        lambda array: (array[inside],),
        lambda array: (np.pad(array, widths) if shape != our_shape else array,),
    )


def to_ours(table: Sequence[Entry], tensors: Tensors, source: str) -> dict[str, LazyTensor]:
    """Their tensors in our layout.

    Args:
        table: one entry or more for every tensor.
        tensors: by their names.
        source: where the tensors come from, for errors.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    check(tensors, their_shapes(table), source)
    return _apply([(entry.theirs, entry.ours, entry.to_ours) for entry in table], tensors)


def to_theirs(table: Sequence[Entry], tensors: Tensors, source: str) -> dict[str, LazyTensor]:
    """Our tensors in their layout; the inverse of `to_ours`.

    Raises:
        ConversionError: lists every tensor that is missing, unknown, misshapen or of another type.
    """
    check(tensors, {name: shape for entry in table for name, shape in entry.ours.items()}, source)
    return _apply([(entry.ours, entry.theirs, entry.to_theirs) for entry in table], tensors)


def their_shapes(table: Sequence[Entry]) -> dict[str, Shape]:
    """Name and shape of each of their tensors."""
    return {name: shape for entry in table for name, shape in entry.theirs.items()}


def _apply(
    steps: Sequence[tuple[Mapping[str, Shape], Mapping[str, Shape], Function]], tensors: Tensors
) -> dict[str, LazyTensor]:
    """The tensors that each step computes from its inputs: (shapes of inputs, shapes of outputs, function)."""
    results = {}
    for inputs, outputs, function in steps:
        sources = [tensors[name] for name in inputs]
        for index, (name, shape) in enumerate(outputs.items()):
            results[name] = _result(function, sources, index, shape)
    return results


def _result(function: Function, sources: Sequence[LazyTensor], index: int, shape: Shape) -> LazyTensor:
    """One of the arrays that a function returns."""
    dtypes = {source.dtype for source in sources}
    # Tensors of different types that become one take the type that holds them all.
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read() -> np.ndarray:
        arrays = function(*(source.read().astype(dtype, copy=False) for source in sources))
        return arrays[index].astype(dtype, copy=False)

    return LazyTensor(shape, dtype, read)


def without_tied_head(
    table: Sequence[Entry], state: Tensors, source: str, *, head: str, embedding: str, advice: str = ""
) -> dict[str, LazyTensor]:
    """Their tensors without the head, which is the embedding.

    Raises:
        ConversionError: lists every tensor that is missing, unknown or misshapen; or the head has other values.
    """
    expected = their_shapes(table)
    check(state, {**expected, head: expected[embedding]}, source)
    if not is_identical(state[embedding], state[head]):
        raise ConversionError(
            f"{source}: {head}: expected the values of {embedding}, as tie_word_embeddings says, found others{advice}"
        )
    return {name: tensor for name, tensor in state.items() if name != head}


def check(found: Tensors, expected: Mapping[str, Shape], source: str) -> None:
    """Compare tensors with those that a layout needs.

    Raises:
        ConversionError: one line for each of the `mismatches`.
    """
    if wrong := mismatches(found, expected):
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))


def mismatches(found: Tensors, expected: Mapping[str, Shape]) -> list[str]:
    """One line per tensor that is missing, misshapen, unknown or of a type that weights do not have."""
    return shape_mismatches(found, expected) + [
        f"{name}: expected {', '.join(map(str, FLOAT_DTYPES))}, found {tensor.dtype}"
        for name, tensor in found.items()
        if name in expected and tensor.dtype not in FLOAT_DTYPES
    ]


def cast(tensors: Tensors, dtype: str | None, source: str) -> dict[str, LazyTensor]:
    """The tensors in another type, each value rounded to the nearest one when it is read.

    Args:
        tensors: of any of `FLOAT_DTYPES`.
        dtype: name of one of them; None: each tensor keeps its type.
        source: where the tensors come from, for errors.

    Raises:
        ConversionError: when a tensor is read that has larger values than the type holds.
    """
    if dtype is None:
        return dict(tensors)
    wanted = next(known for known in FLOAT_DTYPES if known.name == dtype)

    def narrow(name: str, tensor: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            with np.errstate(over="ignore"):
                array = tensor.read().astype(wanted, copy=False)
            if not all_finite(array):
                raise ConversionError(f"{source}: {name}: expected values that {dtype} holds, found larger ones")
            return array

        return LazyTensor(tensor.shape, wanted, read)

    return {name: narrow(name, tensor) for name, tensor in tensors.items()}


def first_rows(tensor: LazyTensor, rows: int) -> LazyTensor:
    """The beginning of a tensor along its first axis."""
    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:rows])


def is_identical(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors of the same shape hold the same bytes; compared a few rows at a time."""
    a, b = one.read(), other.read()
    if a.dtype != b.dtype:
        return False
    if a.ctypes.data == b.ctypes.data:
        return True
    return all(a[row : row + 4096].tobytes() == b[row : row + 4096].tobytes() for row in range(0, len(a), 4096))
