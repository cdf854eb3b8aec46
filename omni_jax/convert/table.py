"""Moving weights between layouts: a table with one entry per published tensor, and its checks.

An entry says how one of their tensors becomes one or several of ours, and back. Tensors are lazy: a table makes
a mapping of tensors from a mapping of tensors, and nothing is read until the result is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni_jax.checkpoint.safetensors_io import LazyTensor, Tensors
from omni_jax.errors import ConversionError
from omni_jax.shapes import shape_mismatches

FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
"""Types that weights may have."""


CONFIG = "config.json"


WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"
"""Files of a folder as transformers writes it; snac's config has the same name."""


Shape = tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        ConversionError: the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: expected JSON, found {error}") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as `read_json` reads it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder as transformers' `save_pretrained` writes it: one, or shards.

    Raises:
        ConversionError: there are neither weights nor an index, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    raise ConversionError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither")


def import_torch(file: Path) -> Any:
    """PyTorch, without which a file can be neither read nor written.

    Raises:
        ImportError: it is not installed; names the file.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(f"{file}: this format needs PyTorch: pip install omni-jax[torch]") from None
    return torch


@dataclass(frozen=True)
class Part:
    """One of our tensors, cut out of one of theirs."""

    name: str
    shape: Shape
    take: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One of their tensors and what it is in ours."""

    theirs: str
    shape: Shape
    parts: tuple[Part, ...]
    join: Callable[..., np.ndarray]
    """The inverse of the parts' `take`: our arrays in the order of the parts -> theirs."""


def same(theirs: str, ours: str, shape: Shape, our_shape: Shape | None = None) -> Entry:
    """An entry of one tensor that is the same in both worlds, perhaps with its axes split or merged."""
    our_shape = our_shape or shape
    if math.prod(shape) != math.prod(our_shape):
        raise ValueError(f"{theirs} {shape} cannot be {ours} {our_shape}: another number of elements")
    part = Part(ours, our_shape, lambda array: array.reshape(our_shape))
    return Entry(theirs, shape, (part,), lambda array: array.reshape(shape))


def filled(theirs: str, ours: str, shape: Shape, our_shape: Shape) -> Entry:
    """An entry of one tensor that is filled up with zeros in theirs, at the end of every axis that is longer there."""
    if shape == our_shape:
        return same(theirs, ours, shape)
    rest = [(0, wide - narrow) for wide, narrow in zip(shape, our_shape, strict=True)]
    inside = tuple(slice(size) for size in our_shape)
    part = Part(ours, our_shape, lambda array: array[inside])
    return Entry(theirs, shape, (part,), lambda array: np.pad(array, rest))


def to_ours(table: Sequence[Entry], tensors: Tensors, source: str) -> dict[str, LazyTensor]:
    """Their tensors in our layout, each of its own type.

    Raises:
        ConversionError: names every tensor that is missing, unknown, misshapen or not floating point.
    """
    check(tensors, {entry.theirs: entry.shape for entry in table}, source)

    def part_of(tensor: LazyTensor, part: Part) -> LazyTensor:
        return LazyTensor(part.shape, tensor.dtype, lambda: part.take(tensor.read()))

    return {part.name: part_of(tensors[entry.theirs], part) for entry in table for part in entry.parts}


def to_theirs(table: Sequence[Entry], tensors: Tensors, source: str) -> dict[str, LazyTensor]:
    """Our tensors in their layout; the inverse of `to_ours`.

    Tensors of different types that become one take the type that holds them all.

    Raises:
        ConversionError: names every tensor that is missing, unknown, misshapen or not floating point.
    """
    check(tensors, {part.name: part.shape for entry in table for part in entry.parts}, source)

    def whole(entry: Entry) -> LazyTensor:
        parts = [tensors[part.name] for part in entry.parts]
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        return LazyTensor(
            entry.shape, dtype, lambda: entry.join(*(part.read().astype(dtype, copy=False) for part in parts))
        )

    return {entry.theirs: whole(entry) for entry in table}


def check(found: Tensors, expected: Mapping[str, Shape], source: str) -> None:
    """Compare what was found with what a layout needs.

    Raises:
        ConversionError: one line per tensor that is missing, misshapen, unknown or not floating point.
    """
    wrong = shape_mismatches(found, expected)
    wrong += [
        f"{name}: expected floating point, found {tensor.dtype}"
        for name, tensor in found.items()
        if name in expected and tensor.dtype not in FLOATS
    ]
    if wrong:
        raise ConversionError(f"{source}:\n" + "\n".join(wrong))


def identical(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors of the same shape hold the same bytes; compared a few rows at a time."""
    a, b = one.read(), other.read()
    if a.dtype != b.dtype:
        return False
    if a.ctypes.data == b.ctypes.data:
        return True
    return all(a[row : row + 4096].tobytes() == b[row : row + 4096].tobytes() for row in range(0, len(a), 4096))
