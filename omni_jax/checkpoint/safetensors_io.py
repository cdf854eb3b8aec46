"""Safetensors files, written and read one tensor at a time, so that memory never holds all the weights.

The format: 8 bytes little-endian length, that much JSON with dtype, shape and offsets of each tensor, then the
raw row-major bytes. Written here rather than with the library, because that wants every tensor at once; read
here, because its map of the whole file counts as memory once read, and a map of one tensor at a time does not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
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
"""Names of the types in the header."""


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


SCALE_SUFFIX = ".int8_scale"
"""What the name of the scales of a tensor in eight bits ends with."""


_ALIGNMENT = 64
"""JAX takes over host memory that starts at a multiple of this, and copies any other."""


_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by shape and type, and produced when it is wanted."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    kept_as: np.dtype[Any] | None = None
    """Its type in the file it comes from, if any: another one, where it is kept in eight bits."""

    @classmethod
    def of(cls, array: np.ndarray) -> LazyTensor:
        """An array that is in memory anyway."""
        return cls(array.shape, array.dtype, lambda: array)

    def cast(self, dtype: Any) -> LazyTensor:
        """The same in another type, cast when it is produced."""
        return LazyTensor(self.shape, np.dtype(dtype), lambda: self.read().astype(dtype))


Tensors = Mapping[str, LazyTensor]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """`np.empty` in memory that JAX on CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class _Place:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    scale: _Place | None = None
    """Of a tensor in eight bits: as many axes, 1 long where the scale is the same all along."""

    @property
    def read_as(self) -> np.dtype[Any]:
        return self.dtype if self.scale is None else np.dtype(np.float32)


class SafetensorsFile:
    """An existing safetensors file; the header is read and checked at once, tensors when asked for.

    Raises:
        CheckpointError: there is no such file, it is not safetensors, or it ends too early.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size, _LONGEST_HEADER):
                    raise CheckpointError(f"{self.path}: expected safetensors, found no such header")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            places, end = {}, 8 + length
            for name, entry in header.items():
                dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
                first, last = entry["data_offsets"]
                if last - first != math.prod(shape) * dtype.itemsize or first < 0:
                    raise CheckpointError(f"{self.path}: {name}: the bytes do not fit the shape {shape}")
                places[name] = _Place(dtype, shape, 8 + length + first)
                end = max(end, 8 + length + last)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: expected a safetensors file, found no such file") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: expected a safetensors file, found {error}") from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: expected safetensors, found a header with {error!r}") from None
        if end > size:
            raise CheckpointError(f"{self.path}: expected {end} bytes, found {size}: the file was cut off")
        self._places: dict[str, _Place] = self._scaled(places)

    def _scaled(self, places: dict[str, _Place]) -> dict[str, _Place]:
        """The places with every scale at the tensor it belongs to."""
        scaled = {}
        for name, place in places.items():
            if name.endswith(SCALE_SUFFIX):
                tensor = places.get(name.removesuffix(SCALE_SUFFIX))
                if tensor is None or tensor.dtype != np.int8 or place.dtype != np.float32:
                    raise CheckpointError(f"{self.path}: {name}: expected float32 scales beside a tensor of type I8")
                continue
            scale = places.get(name + SCALE_SUFFIX)
            if scale is not None and (
                len(scale.shape) != len(place.shape)
                or any(few not in (1, many) for few, many in zip(scale.shape, place.shape, strict=True))
            ):
                raise CheckpointError(f"{self.path}: {name}: scales {scale.shape} do not fit the shape {place.shape}")
            scaled[name] = replace(place, scale=scale)
        return scaled

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor by name."""

        def tensor(name: str, place: _Place) -> LazyTensor:
            return LazyTensor(place.shape, place.read_as, lambda: self.read(name), place.dtype)

        return {name: tensor(name, place) for name, place in self._places.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it at `index`, in memory of its own; one in eight bits as float32."""
        place = self._places[name]
        picked = tuple(len(range(*part.indices(size))) for part, size in zip(index, place.shape, strict=False))
        out = aligned_empty(picked + place.shape[len(index) :], place.read_as)
        self.read_into(name, out, index)
        return out

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Copy a tensor, or the part of it at `index`, to `out`, cast to the type of `out`."""
        place = self._places[name]
        if not out.size:
            return
        part = self._map(place)[index]
        if place.scale is None:
            out[...] = part
        else:
            # Where there is one scale for a whole axis, any part of the axis has it.
            scales = self._map(place.scale)
            shared = tuple(slice(None) if size == 1 else kept for kept, size in zip(index, scales.shape, strict=False))
            np.multiply(part, scales[shared], out=out, dtype=np.float32, casting="unsafe")

    def _map(self, place: _Place) -> np.ndarray:
        # Mapped anew each time: the pages are given back as soon as the map goes.
        view = np.memmap(self.path, place.dtype, mode="r", offset=place.offset, shape=place.shape or (1,))
        return view.reshape(place.shape)


def write_safetensors(path: str | Path, tensors: Tensors) -> None:
    """Write a safetensors file, one tensor at a time; under its name it appears only when whole.

    Args:
        path: the file; an existing one is replaced.
        tensors: produced one after the other, in their order.

    Raises:
        CheckpointError: a tensor has a type the format does not know, or is produced with another shape or
            type than announced.
    """
    path = Path(path)
    if strange := [f"{name}: {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _NAMES]:
        raise CheckpointError(f"{path}: types that safetensors does not hold:\n" + "\n".join(strange))
    # Wide types first keeps every tensor at a multiple of its item size.
    offsets: dict[str, int] = {}
    # transformers refuses files that do not name a framework; the bytes are the same for all.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        first, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        offsets[name] = first
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors.items():
                array = tensor.read()
                if array.shape != tensor.shape or array.dtype != tensor.dtype:
                    raise CheckpointError(
                        f"{path}: {name}: announced as {tensor.dtype} {tensor.shape}, "
                        f"produced as {array.dtype} {array.shape}"
                    )
                file.seek(8 + len(text) + offsets[name])
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.truncate(8 + len(text) + end)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
