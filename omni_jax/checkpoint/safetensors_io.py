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
from omni_jax.input_files import open_file, parse_json

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
_MAX_AXES = 32
_MAX_SIZE = 1 << 48
"""Of an axis; next to an axis of size 0, any would fit the file."""


_EXPONENTS = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
"""Bits of the exponent of types with two bytes. NaN and infinity have all of them set."""


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; costs little more than to read the values once."""
    if mask := _EXPONENTS.get(values.dtype):
        # NumPy computes with these types one value at a time.
        return not ((values.view(np.uint16) & np.uint16(mask)) == mask).any()
    if not np.issubdtype(values.dtype, np.floating) or not values.size:
        return True
    # Both are NaN where a value is, and there is no third array.
    return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


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


def _are_counts(values: Any) -> bool:
    """Whether a value of JSON is a list of integers of 0 or more."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


@dataclass(frozen=True)
class _StoredTensor:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    scale: _StoredTensor | None = None
    """Of an int8 tensor: as many axes, of size 1 where weights share the scale."""

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def read_dtype(self) -> np.dtype[Any]:
        return self.dtype if self.scale is None else np.dtype(np.float32)


class SafetensorsFile:
    """An existing safetensors file; the header is read and checked at once, tensors when asked for.

    An int8 tensor with scales is read as float32: its values times its scales.

    Raises:
        CheckpointError: there is no such file, it is not an ordinary one, its header is not as the format says, or its
            size is not what the header says.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stored = self._attach_scales(self._read_header())

    def _read_header(self) -> dict[str, _StoredTensor]:
        """The tensors, checked as the format says: they fill the file, without a gap and without an overlap."""
        with open_file(self.path, CheckpointError, "a safetensors file") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_SIZE):
                raise CheckpointError(f"{self.path}: expected safetensors, found no such header")
            text = file.read(length)
        try:
            header = parse_json(text)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: expected safetensors, found a header with {error}") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: expected safetensors, found a header that is no JSON object")
        self._check_metadata(header.pop("__metadata__", {}))
        start = 8 + length
        stored = {name: self._check_entry(name, entry, start) for name, entry in header.items()}
        end = start
        for name, tensor in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].size)):
            if tensor.offset != end:
                found = f"{name} at {tensor.offset - start}: " + ("an overlap" if tensor.offset < end else "a gap")
                raise CheckpointError(
                    f"{self.path}: expected a tensor at byte {end - start} of the data, found {found}"
                )
            end += tensor.size
        if end > size:
            raise CheckpointError(f"{self.path}: expected {end} bytes, found {size}: the file is truncated")
        if end < size:
            raise CheckpointError(f"{self.path}: expected {end} bytes, found {size}: more than its tensors")
        return stored

    def _check_metadata(self, metadata: Any) -> None:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__: expected texts by name, found something else")

    def _check_entry(self, name: str, entry: Any, start: int) -> _StoredTensor:
        """A tensor by its entry in the header; `start` is where the data starts."""

        def wrong(expected: str, found: Any) -> CheckpointError:
            text = repr(found)
            text = text if len(text) <= 100 else f"{text[:100]}..."
            return CheckpointError(f"{self.path}: {name[:100]!r}: expected {expected}, found {text}")

        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise wrong("dtype, shape and data_offsets", entry)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise wrong(f"a dtype of {', '.join(DTYPES)}", dtype)
        if not _are_counts(shape) or len(shape) > _MAX_AXES or max(shape, default=0) > _MAX_SIZE:
            raise wrong(f"a shape of at most {_MAX_AXES} integers from 0 to {_MAX_SIZE}", shape)
        if not _are_counts(offsets) or len(offsets) != 2:
            raise wrong("data_offsets of two integers of 0 or more", offsets)
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != size:
            raise wrong(f"data_offsets {size} bytes apart, as {dtype} of shape {tuple(shape)} takes", offsets)
        return _StoredTensor(DTYPES[dtype], tuple(shape), start + offsets[0])

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
        """Copy a tensor, or its slice at `index`, to `out`, cast to the type of `out`.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        stored = self._stored[name]
        if not out.size:
            return
        values = self._map(stored)[index]
        if not all_finite(values if stored.scale is None else self._map(stored.scale)):
            raise CheckpointError(f"{self.path}: {name}: expected finite values, found NaN or infinity")
        if stored.scale is None:
            with np.errstate(over="ignore"):
                out[...] = values
            narrowed = out.dtype != values.dtype and out.dtype.itemsize <= values.dtype.itemsize
            if narrowed and not all_finite(out):
                raise CheckpointError(f"{self.path}: {name}: expected values that {out.dtype} holds, found larger ones")
        else:
            # One scale along a whole axis is the scale of any slice of the axis.
            scales = self._map(stored.scale)
            if np.abs(scales).max() > np.finfo(np.float32).max / 128:
                raise CheckpointError(
                    f"{self.path}: {name}: expected scales that give finite values, found larger ones"
                )
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
