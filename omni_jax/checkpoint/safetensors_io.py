"""Safetensors files, read and written one tensor at a time, so that memory never holds all the weights.

The format: 8 bytes little-endian length, that much JSON with dtype, shape and offsets of each tensor, then the raw
row-major bytes. The library is not used: its writer needs every tensor at once, and its reader maps the whole file,
which counts as memory once read; here each tensor is mapped on its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Types by their names in the header."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SCALE_SUFFIX = ".int8_scale"
"""The scales of an int8 tensor `x` are the tensor `x.int8_scale`."""

_ALIGNMENT = 64
"""JAX on CPU uses host memory that starts at a multiple of this without a copy."""

_MAX_HEADER_SIZE = 100_000_000


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and type whose values are computed by each call of `read`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    stored_dtype: np.dtype[Any] | None = None
    """Its type in the file it is read from, if any; differs from `dtype` for int8 with scales."""

    @classmethod
    def of(cls, array: np.ndarray) -> LazyTensor:
        """A tensor whose values are in memory."""
        return cls(array.shape, array.dtype, lambda: array)

    def cast(self, dtype: Any) -> LazyTensor:
        """The same tensor in another type, cast when it is read."""
        return LazyTensor(self.shape, np.dtype(dtype), lambda: self.read().astype(dtype))


Tensors = Mapping[str, LazyTensor]


def slice_shape(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a slice; axes that `index` leaves out are whole."""
    picked = tuple(len(range(*axis.indices(size))) for axis, size in zip(index, shape, strict=False))
    return picked + shape[len(index) :]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """`np.empty` in memory that JAX on CPU uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class _StoredTensor:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    scale: _StoredTensor | None = None
    """Of an int8 tensor: as many axes, of size 1 where weights share the scale."""

    @property
    def read_dtype(self) -> np.dtype[Any]:
        return self.dtype if self.scale is None else np.dtype(np.float32)


class SafetensorsFile:
    """An existing safetensors file; the header is read and checked at once, tensors when asked for.

    An int8 tensor with scales is read as float32: its values times its scales.

    Raises:
        CheckpointError: there is no such file, it is not safetensors, or it ends too early.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            stored, end, size = self._read_header()
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: expected a safetensors file, found no such file") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: expected a safetensors file, found {error}") from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: expected safetensors, found a header with {error!r}") from None
        if end > size:
            raise CheckpointError(f"{self.path}: expected {end} bytes, found {size}: the file is truncated")
        self._stored = self._attach_scales(stored)

    def _read_header(self) -> tuple[dict[str, _StoredTensor], int, int]:
        """The tensors, the size that the file should have, and the size that it has."""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size, _MAX_HEADER_SIZE):
                raise CheckpointError(f"{self.path}: expected safetensors, found no such header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        stored, end = {}, 8 + length
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: {name}: expected a type of {', '.join(DTYPES)}, found {entry['dtype']}"
                )
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            first, last = entry["data_offsets"]
            if last - first != math.prod(shape) * dtype.itemsize or first < 0:
                raise CheckpointError(f"{self.path}: {name}: the bytes do not fit the shape {shape}")
            stored[name] = _StoredTensor(dtype, shape, 8 + length + first)
            end = max(end, 8 + length + last)
        return stored, end, size

    def _attach_scales(self, stored: dict[str, _StoredTensor]) -> dict[str, _StoredTensor]:
        """The tensors without the scales, each of which is attached to its tensor."""
        scaled = {}
        for name, tensor in stored.items():
            if name.endswith(SCALE_SUFFIX):
                owner = stored.get(name.removesuffix(SCALE_SUFFIX))
                if owner is None or owner.dtype != np.int8 or tensor.dtype != np.float32:
                    raise CheckpointError(f"{self.path}: {name}: expected float32 scales of a tensor of type I8")
                continue
            scale = stored.get(name + SCALE_SUFFIX)
            if scale is not None and (
                len(scale.shape) != len(tensor.shape)
                or any(few not in (1, many) for few, many in zip(scale.shape, tensor.shape, strict=True))
            ):
                raise CheckpointError(f"{self.path}: {name}: scales {scale.shape} do not fit the shape {tensor.shape}")
            scaled[name] = replace(tensor, scale=scale)
        return scaled

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor by name."""

        def lazy(name: str, stored: _StoredTensor) -> LazyTensor:
            return LazyTensor(stored.shape, stored.read_dtype, lambda: self.read(name), stored.dtype)

        return {name: lazy(name, stored) for name, stored in self._stored.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or its slice at `index`, in memory of its own."""
        stored = self._stored[name]
        out = aligned_empty(slice_shape(index, stored.shape), stored.read_dtype)
        self.read_into(name, out, index)
        return out

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Copy a tensor, or its slice at `index`, to `out`, cast to the type of `out`."""
        stored = self._stored[name]
        if not out.size:
            return
        values = self._map(stored)[index]
        if stored.scale is None:
            out[...] = values
        else:
            # One scale along a whole axis is the scale of any slice of the axis.
            scales = self._map(stored.scale)
            picked = tuple(slice(None) if size == 1 else axis for axis, size in zip(index, scales.shape, strict=False))
            np.multiply(values, scales[picked], out=out, dtype=np.float32, casting="unsafe")

    def _map(self, stored: _StoredTensor) -> np.ndarray:
        # A map for each read: its pages are released with it.
        view = np.memmap(self.path, stored.dtype, mode="r", offset=stored.offset, shape=stored.shape or (1,))
        return view.reshape(stored.shape)


class SafetensorsFiles:
    """Several files, read as if they were one, and tensors that are in none of them.

    Raises:
        CheckpointError: as `SafetensorsFile`; or a tensor is in two of them.
    """

    def __init__(self, paths: Sequence[Path], computed: Mapping[str, np.ndarray] = MappingProxyType({})):
        self.paths = tuple(paths)
        self._computed = computed
        self._files: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, paths):
            if twice := self._files.keys() & file.tensors.keys():
                raise CheckpointError(f"{file.path}: {min(twice)} is also in {self._files[min(twice)].path.name}")
            self._files |= dict.fromkeys(file.tensors, file)

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor by name."""
        files = dict.fromkeys(self._files.values())
        stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
        return stored | {name: LazyTensor.of(array) for name, array in self._computed.items()}

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """See `SafetensorsFile.read_into`."""
        if name in self._computed:
            out[...] = self._computed[name][index]
            return
        self._files[name].read_into(name, out, index)


def write_safetensors(path: str | Path, tensors: Tensors) -> None:
    """Write a safetensors file, one tensor at a time; it appears under its name only when complete.

    Args:
        path: the file; an existing one is replaced.
        tensors: read one after the other, in their order.

    Raises:
        CheckpointError: a tensor has a type that the format does not have, or is read with another shape or type
            than announced.
    """
    path = Path(path)
    if strange := [f"{name}: {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _DTYPE_NAMES]:
        raise CheckpointError(f"{path}: types that safetensors does not hold:\n" + "\n".join(strange))
    header, offsets, end = _make_header(tensors)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for name, tensor in tensors.items():
                array = tensor.read()
                if array.shape != tensor.shape or array.dtype != tensor.dtype:
                    raise CheckpointError(
                        f"{path}: {name}: announced as {tensor.dtype} {tensor.shape}, "
                        f"read as {array.dtype} {array.shape}"
                    )
                file.seek(len(header) + offsets[name])
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.truncate(len(header) + end)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _make_header(tensors: Tensors) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor starts after it, and the size of all of them, in bytes."""
    # transformers refuses files that do not name a framework; the bytes are the same for all.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # Wide types first keeps every tensor at a multiple of its item size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name], end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end
