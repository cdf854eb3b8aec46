"""Files of published checkpoints: JSON, safetensors in one file or in shards, PyTorch state dicts."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax import input_files
from omni_jax.checkpoint.safetensors_io import DTYPES, LazyTensor, SafetensorsFile, Tensors
from omni_jax.errors import ConversionError, MissingExtraError
from omni_jax.input_files import open_file

CONFIG = "config.json"
"""The configuration in a folder of transformers or snac."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the shards where transformers wrote several files."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConversionError: the file is missing or holds something else.
    """
    values = input_files.read_json(path, ConversionError)
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as `read_json` reads it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def open_safetensors(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder as transformers' `save_pretrained` writes it, in one file or in shards; none is read yet.

    Raises:
        ConversionError: there are neither weights nor an index, or the index is damaged.
        CheckpointError: a file is missing or damaged.
    """
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ConversionError(f"{folder / INDEX}: expected a file name for each tensor in weight_map")
        files = sorted(set(shards.values()))
    else:
        raise ConversionError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither")
    return {name: tensor for file in files for name, tensor in SafetensorsFile(folder / file).tensors.items()}


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


def _check_archive(file: Path) -> None:
    """Refuse an archive that says it holds more than it does, or a pickle that makes more than tensors.

    Raises:
        ConversionError: it is not a zip archive, as torch writes since version 1.6; something in it is compressed,
            which torch never does; its files are larger than it; or its pickle names anything but tensors.
    """
    with open_file(file, ConversionError, "a state dict") as opened:
        size = opened.seek(0, 2)
        if not zipfile.is_zipfile(opened):
            raise ConversionError(f"{file}: expected a state dict of torch 1.6 or later, found no zip archive")
        try:
            with zipfile.ZipFile(opened) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ConversionError(f"{file}: {entry.filename}: expected a file that is not compressed")
                if (found := sum(entry.file_size for entry in archive.infolist())) > size:
                    raise ConversionError(f"{file}: expected at most {size} bytes in the archive, found {found}")
                pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise ConversionError(f"{file}: expected one data.pkl, found {len(pickles)}")
                for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
                    if opcode.name == "STACK_GLOBAL" or (opcode.name == "GLOBAL" and not _TENSOR.fullmatch(argument)):
                        found_name = argument or "a name that it makes"
                        raise ConversionError(f"{file}: expected a state dict with tensors only, found {found_name}")
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            if isinstance(error, ConversionError):
                raise
            reason = next(iter(str(error).splitlines()), "")
            raise ConversionError(f"{file}: expected a state dict with tensors only, found {reason}") from None


_TENSOR = re.compile(r"collections OrderedDict|torch\.?\w* (\w+Storage|_rebuild_tensor_v2|_rebuild_parameter)")
"""What the pickle of a state dict names."""


def open_state_dict(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a PyTorch state dict, mapped from the file where its format allows that.

    Nothing in the file is executed.

    Raises:
        ConversionError: the file is not a state dict, or holds more than tensors.
        MissingExtraError: torch is not installed.
    """
    torch = import_torch(file)
    _check_archive(file)
    try:
        with warnings.catch_warnings():
            # Of a pickle protocol that torch does not write; what it cannot read is an error.
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConversionError(f"{file}: expected a state dict with tensors only, found {reason}") from None
    if not isinstance(state, dict):
        raise ConversionError(f"{file}: expected a state dict, found {type(state).__name__}")
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
    return {name: lazy(tensor) for name, tensor in state.items()}


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
