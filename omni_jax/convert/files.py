"""Files of published checkpoints: JSON, safetensors in one file or in shards, PyTorch state dicts."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.checkpoint.safetensors_io import DTYPES, LazyTensor, SafetensorsFile, Tensors
from omni_jax.errors import ConversionError, MissingExtraError

CONFIG = "config.json"
"""The configuration in a folder of transformers or snac."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the shards where transformers wrote several files."""
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The same of PyTorch."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Names under which a file may hold its state dict, next to other things."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

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
            # Of a pickle protocol that torch does not write; what it cannot read is an error.
            warnings.simplefilter("ignore", UserWarning)
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            state = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
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
