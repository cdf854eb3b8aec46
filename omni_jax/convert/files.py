"""Files of published checkpoints: JSON, safetensors in one file or in shards, PyTorch state dicts."""

from __future__ import annotations

import functools
import inspect
import io
import json
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import numpy as np

from omni_jax import input_files
from omni_jax.checkpoint.safetensors_io import DTYPES, LazyTensor, SafetensorsFile, Tensors
from omni_jax.errors import ConversionError, MissingExtraError, OmniError
from omni_jax.input_files import open_file

Params = ParamSpec("Params")
Result = TypeVar("Result")

CONFIG = "config.json"
"""The configuration in a folder of transformers or snac."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the shards where transformers wrote several files."""
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The same of PyTorch."""

_MAX_TUPLE = 1000
"""Most values of a tuple in a pickle. Those of tensors have up to twenty."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Names under which a file may hold its state dict, next to other things."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConversionError: the file is missing or holds something else.
    """
    values = input_files.read_json(path, ConversionError)
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def refuse_wrong_types(read_config: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function that computes with the values of a foreign config, which may be of any type.

    Args:
        read_config: has a parameter `source`, the name of the file.

    Returns:
        The same function, which raises a `ConversionError` where a value does not fit a computation.
    """

    @functools.wraps(read_config)
    def checked(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            return read_config(*args, **kwargs)
        except (TypeError, AttributeError, LookupError, ArithmeticError, ValueError) as error:
            if isinstance(error, OmniError):
                raise
            given = inspect.signature(read_config).bind(*args, **kwargs)
            given.apply_defaults()
            source = given.arguments["source"]
            raise ConversionError(f"{source}: expected values of the types of the format, found {error}") from None

    return checked


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as `read_json` reads it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def open_weights(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder as transformers' `save_pretrained` writes it; none is read yet.

    They are in one file or in shards, of safetensors or, where there are none, of PyTorch.

    Raises:
        ConversionError: there are neither weights nor an index, the index is damaged, or a file of PyTorch is.
        CheckpointError: a file is missing or damaged.
        MissingExtraError: the files are those of PyTorch, which is not installed.
    """
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS).tensors
    if (folder / INDEX).is_file():
        files = [SafetensorsFile(file).tensors for file in shards(folder)]
    elif (folder / TORCH_WEIGHTS).is_file():
        return open_state_dict(folder / TORCH_WEIGHTS)
    elif (folder / TORCH_INDEX).is_file():
        files = [open_state_dict(file) for file in shards(folder)]
    else:
        raise ConversionError(f"{folder}: expected {WEIGHTS} or {TORCH_WEIGHTS}, or an index of shards, found none")
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def shards(folder: Path) -> list[Path]:
    """The shards that `open_weights` reads; none if the weights are in one file.

    Raises:
        ConversionError: the index is damaged.
    """
    whole = ((WEIGHTS, INDEX), (TORCH_WEIGHTS, TORCH_INDEX))
    name, index = next((pair for pair in whole if any((folder / name).is_file() for name in pair)), whole[0])
    return [] if (folder / name).is_file() or not (folder / index).is_file() else _named_in(folder / index)


def _named_in(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ConversionError(f"{index}: expected a file name for each tensor in weight_map")
    return [index.parent / name for name in sorted(set(shards.values()))]


def common_dtype(tensors: Tensors) -> str | None:
    """The type that all tensors have, as transformers' `config.json` names it; None if they differ."""
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


def import_torch(file: Path) -> Any:
    """PyTorch, which is needed to read or write `file`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtraError(f"{file.name}: this format needs PyTorch", "torch") from None
    return torch


def _check_state_dict(file: Path, torch: Any) -> bool:
    """Refuse a file that says it holds more than it does, or whose pickle makes more than tensors.

    Returns:
        Whether it is a zip archive, as torch writes since version 1.6.

    Raises:
        ConversionError: something in the archive is compressed, which torch never does; its pickle names anything but
            tensors; or a tensor's values are not all in the file.
    """
    try:
        with open_file(file, ConversionError, "a state dict") as opened:
            size = opened.seek(0, 2)
            if not zipfile.is_zipfile(opened):
                opened.seek(0)
                # A number that identifies the format, its version, the sizes of types, and the state dict.
                sizes = [_storage_sizes(opened, size, torch) for _ in range(4)][-1]
                if (total := sum(sizes.values())) > size:
                    raise ValueError(f"tensors of {total} bytes in a file of {size}")
                return False
            with zipfile.ZipFile(opened) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                if packed := [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]:
                    raise ValueError(f"{packed[0]}, which is compressed")
                pickles = [name for name in entries if name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise ValueError(f"{len(pickles)} files data.pkl")
                # A file that is not compressed cannot be longer than the archive.
                for key, needed in _storage_sizes(io.BytesIO(archive.read(pickles[0])), size, torch).items():
                    entry = entries.get(pickles[0].removesuffix("data.pkl") + f"data/{key}")
                    stored = 0 if entry is None else min(entry.file_size, entry.compress_size, size)
                    if stored != needed:
                        raise ValueError(f"data/{key} of {stored} bytes, for tensors of {needed}")
                return True
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        reason: Exception = error
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = error
    if isinstance(reason, OmniError):
        raise reason
    found = next(iter(str(reason).splitlines()), "")
    raise ConversionError(f"{file}: expected a state dict with tensors only, found {found}")


def _storage_sizes(file: IO[bytes], max_length: int, torch: Any) -> dict[str, int]:
    """Bytes of each storage that a pickle asks for, by its key; the pickle is read to its end, and makes nothing.

    Raises:
        ValueError, pickle.UnpicklingError: it is no pickle, or names something that is not of a state dict.
    """
    start, longest_memo = file.tell(), 0
    for opcode, argument, _ in pickletools.genops(file):
        if "PUT" in opcode.name and argument is not None:
            longest_memo = max(longest_memo, int(argument))
    end = file.tell()
    if longest_memo > end - start:
        # The unpickler would make a list that is as long.
        raise ValueError(f"a pickle that remembers value {longest_memo}")
    sizes: dict[str, int] = {}

    class Reader(pickle._Unpickler):
        dispatch = pickle._Unpickler.dispatch.copy()

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("collections", "OrderedDict"):
                # Not of a list: each call would copy it.
                return lambda: OrderedDict()
            if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
                return lambda *values: None
            if module in ("torch", "torch.storage") and name.endswith("Storage"):
                storage = getattr(torch, name)
                # A number only: a storage class that is called allocates what it is told to.
                return 1 if storage is torch.UntypedStorage else storage.dtype.itemsize
            raise ValueError(f"{module} {name}")

        def persistent_load(self, pid: Any) -> None:
            _, itemsize, key, _, numel, *_ = pid
            if type(itemsize) is not int or type(numel) is not int:
                raise ValueError(f"a tensor of {str(numel)[:100]} values")
            sizes[str(key)] = max(sizes.get(str(key), 0), numel * itemsize)

    for name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        Reader.dispatch[getattr(pickle, name)[0]] = _bound_tuples(Reader.dispatch[getattr(pickle, name)[0]])
    file.seek(start)
    Reader(io.BytesIO(file.read(end - start))).load()
    return sizes


def _bound_tuples(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let an unpickler make no tuple that has more than `_MAX_TUPLE` values, with those of the tuples in it.

    A tuple of two times the same tuple, of two times the same one, and so on takes few bytes, and years to hash.
    """

    def count(value: Any) -> int:
        return 1 + sum(map(count, value)) if type(value) is tuple else 1

    def bounded(unpickler: Any) -> None:
        load(unpickler)
        # The tuples in it have been counted, so that this ends soon.
        if count(unpickler.stack[-1]) > _MAX_TUPLE:
            raise ValueError(f"a tuple of more than {_MAX_TUPLE} values")

    return bounded


def open_state_dict(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a PyTorch state dict, which may be wrapped, mapped from the file where its format allows that.

    Nothing in the file is executed.

    Raises:
        ConversionError: the file is not a state dict, or holds more than tensors.
        MissingExtraError: torch is not installed.
    """
    state = load_torch(file)
    wrapped = [state[name] for name in _WRAPPERS if isinstance(state.get(name), dict)]
    return lazy_state(wrapped[0] if wrapped else state, file)


def load_torch(file: Path) -> dict[Any, Any]:
    """The dict in a file of PyTorch; nothing in it is executed.

    Raises:
        ConversionError: the file is damaged, or holds something else.
        MissingExtraError: torch is not installed.
    """
    torch = import_torch(file)
    try:
        with warnings.catch_warnings():
            # Of a pickle protocol that torch does not write (what it cannot read is an error), and of old classes.
            warnings.simplefilter("ignore", UserWarning)
            # The older format cannot be mapped.
            is_zip = _check_state_dict(file, torch)
            state = torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except OmniError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConversionError(f"{file}: expected a state dict with tensors only, found {reason}") from None
    if not isinstance(state, dict):
        raise ConversionError(f"{file}: expected a state dict, found {type(state).__name__}")
    return state


def lazy_state(state: Mapping[Any, Any], file: Path) -> dict[str, LazyTensor]:
    """The tensors of a state dict that has been loaded from `file`.

    Raises:
        ConversionError: it holds more than tensors.
    """
    torch = import_torch(file)
    strange = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ConversionError(f"{file}: expected tensors only, found something else in {', '.join(strange)}")
    dtypes = {getattr(torch, str(dtype)): dtype for dtype in DTYPES.values()}

    def lazy(tensor: Any) -> LazyTensor:
        dtype = dtypes.get(tensor.dtype, np.dtype(object))

        def read() -> np.ndarray:
            # torch gives numpy no bfloat16, but its bytes.
            array: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            return array.view(dtype).reshape(tensor.shape)

        return LazyTensor(tuple(tensor.shape), dtype, read)

    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            found = f"{tuple(tensor.shape)} in {tensor.untyped_storage().nbytes()} bytes"
            raise ConversionError(f"{file}: {name}: expected a tensor whose values are all in the file, found {found}")
    return {str(name): lazy(tensor) for name, tensor in state.items()}


def write_state_dict(file: Path, tensors: Tensors) -> None:
    """Write a PyTorch state dict; memory holds all of it. Names of the same lazy tensor share one tensor in the file.

    Raises:
        MissingExtraError: torch is not installed.
    """
    torch = import_torch(file)
    read: dict[int, Any] = {}
    for lazy in tensors.values():
        if id(lazy) not in read:
            read[id(lazy)] = to_torch_tensor(lazy, torch)
    torch.save({name: read[id(lazy)] for name, lazy in tensors.items()}, file)


def to_torch_tensor(lazy: LazyTensor, torch: Any) -> Any:
    """A tensor read into one of PyTorch."""
    array = np.require(lazy.read(), requirements=["C", "W"]).reshape(-1)
    return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, str(lazy.dtype))).reshape(lazy.shape)
