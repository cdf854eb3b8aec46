"""Files of published checkpoints."""

import json
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.convert.files import (
    common_dtype,
    open_safetensors,
    open_state_dict,
    read_json,
    write_json,
    write_state_dict,
)
from omni_jax.errors import CheckpointError, ConversionError
from tests.lazy import read_all, to_lazy

ARRAYS = {
    "scalar": np.array(2, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "brain": np.arange(4).astype(ml_dtypes.bfloat16),
    "transposed": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
}


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, 1e-6]})
    assert read_json(tmp_path / "a.json") == {"a": [1, 1e-6]}
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ConversionError, match=r"a\.json: expected a JSON object, found list"):
        read_json(tmp_path / "a.json")


def test_state_dict_round_trip(tmp_path):
    write_state_dict(tmp_path / "a.pth", to_lazy(ARRAYS))
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert state["brain"].dtype == torch.bfloat16
    torch.save(state, tmp_path / "a.pth")
    for name, array in read_all(open_state_dict(tmp_path / "a.pth")).items():
        assert array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_write_state_dict_shares_a_tensor_of_two_names(tmp_path):
    lazy = LazyTensor.of(np.ones(1000, np.float32))
    write_state_dict(tmp_path / "a.pth", {"a": lazy, "b": lazy})
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert state["a"].data_ptr() == state["b"].data_ptr()
    assert (tmp_path / "a.pth").stat().st_size < 6000


def test_open_safetensors_of_one_file_or_shards(tmp_path):
    for name in ("scalar", "half"):
        safetensors.numpy.save_file({name: ARRAYS[name]}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"scalar": "scalar.safetensors", "half": "half.safetensors"}}))
    assert set(open_safetensors(tmp_path)) == {"scalar", "half"}
    (tmp_path / "half.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"half\.safetensors: expected a safetensors file, found no such file"):
        open_safetensors(tmp_path)
    for damaged in ({}, {"weight_map": {"scalar": 1}}):
        index.write_text(json.dumps(damaged))
        with pytest.raises(ConversionError, match="expected a file name for each tensor in weight_map"):
            open_safetensors(tmp_path)
    safetensors.numpy.save_file({"half": ARRAYS["half"]}, tmp_path / "model.safetensors")
    assert set(open_safetensors(tmp_path)) == {"half"}


def test_common_dtype():
    tensors = to_lazy(ARRAYS)
    assert common_dtype({"a": tensors["half"], "b": tensors["half"]}) == "float16"
    assert common_dtype(tensors) is None


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def with_entry(path, change):
    """An archive whose files are written again by `change(archive, name, data)`."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            change(archive, name, data)


def test_open_state_dict_refuses_hostile_archives(tmp_path):
    path = tmp_path / "a.pth"

    def refused(message):
        with pytest.raises(ConversionError, match=message) as info:
            open_state_dict(path)
        assert str(info.value).startswith(f"{path}: ")

    ones = {"a": torch.ones(4, 4)}
    torch.save(ones, path, _use_new_zipfile_serialization=False)
    refused("expected a state dict of torch 1.6 or later, found no zip archive")
    torch.save(ones, path)
    with_entry(path, lambda archive, name, data: archive.writestr(name, data, zipfile.ZIP_DEFLATED))
    refused(r"data\.pkl: expected a file that is not compressed")
    torch.save(ones, path)
    with_entry(path, lambda archive, name, data: None)
    refused(r"expected one data\.pkl, found 0")
    for function, args in ((bytearray, (1 << 40,)), (eval, ("1",)), (torch.empty, (1 << 40,))):
        torch.save({"a": Call(function, *args)}, path)
        refused("with tensors only, found ")
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    refused(r"a: expected a tensor whose values are all in the file, found \(1048576, 1048576\) in 4 bytes")
    torch.save({"a": torch.ones(1000, 1000)}, path)
    with_entry(path, lambda archive, name, data: archive.writestr(name, data[:8] if "data/0" in name else data))
    refused("expected a state dict with tensors only, found ")
    torch.save(ones, path)
    path.write_bytes(path.read_bytes()[:-30])
    refused("found no zip archive")
    path.unlink()
    os.mkfifo(path)
    refused("expected a state dict, found a pipe")
