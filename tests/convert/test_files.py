"""Files of published checkpoints."""

import io
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.config.model import ModelConfig
from omni_jax.convert import mini_omni
from omni_jax.convert.files import (
    common_dtype,
    open_state_dict,
    open_weights,
    read_json,
    shards,
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


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_round_trip(tmp_path, zipped):
    write_state_dict(tmp_path / "a.pth", to_lazy(ARRAYS))
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert state["brain"].dtype == torch.bfloat16
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    for name, array in read_all(open_state_dict(tmp_path / "a.pth")).items():
        assert array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_write_state_dict_shares_a_tensor_of_two_names(tmp_path):
    lazy = LazyTensor.of(np.ones(1000, np.float32))
    write_state_dict(tmp_path / "a.pth", {"a": lazy, "b": lazy})
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert state["a"].data_ptr() == state["b"].data_ptr()
    assert (tmp_path / "a.pth").stat().st_size < 6000


def test_open_weights_of_one_file_or_shards(tmp_path):
    for name in ("scalar", "half"):
        safetensors.numpy.save_file({name: ARRAYS[name]}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"scalar": "scalar.safetensors", "half": "half.safetensors"}}))
    assert set(open_weights(tmp_path)) == {"scalar", "half"}
    (tmp_path / "half.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"half\.safetensors: expected a safetensors file, found no such file"):
        open_weights(tmp_path)
    for damaged in ({}, {"weight_map": {"scalar": 1}}):
        index.write_text(json.dumps(damaged))
        with pytest.raises(ConversionError, match="expected a file name for each tensor in weight_map"):
            open_weights(tmp_path)
    safetensors.numpy.save_file({"half": ARRAYS["half"]}, tmp_path / "model.safetensors")
    assert set(open_weights(tmp_path)) == {"half"}


def test_open_weights_of_pytorch(tmp_path):
    arrays = {"half": ARRAYS["half"], "brain": ARRAYS["brain"]}
    for name in arrays:
        write_state_dict(tmp_path / f"{name}.bin", to_lazy({name: arrays[name]}))
    index = {"weight_map": {name: f"{name}.bin" for name in arrays}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert shards(tmp_path) == [tmp_path / "brain.bin", tmp_path / "half.bin"]
    for name, array in read_all(open_weights(tmp_path)).items():
        np.testing.assert_array_equal(array, arrays[name])
    state = {name: torch.load(tmp_path / f"{name}.bin", weights_only=True)[name] for name in arrays}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert set(open_weights(tmp_path)) == set(arrays)
    assert shards(tmp_path) == []


def test_open_weights_names_a_type_that_is_not_read(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'a': expected a dtype of F64, .*, found 'F8_E4M3'$"):
        open_weights(tmp_path)


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
        assert str(info.value).count("expected") == 1

    ones = {"a": torch.ones(4, 4)}
    torch.save(ones, path)
    with_entry(path, lambda archive, name, data: archive.writestr(name, data, zipfile.ZIP_DEFLATED))
    refused(r"found .*, which is compressed")
    torch.save(ones, path)
    with_entry(path, lambda archive, name, data: None)
    refused(r"found 0 files data\.pkl")
    torch.save(ones, path)
    with_entry(path, lambda archive, name, data: archive.writestr(name, data[:8] if "data/0" in name else data))
    refused("found data/0 of 8 bytes, for tensors of 64")
    with_entry(path, lambda archive, name, data: None if "data/0" in name else archive.writestr(name, data))
    refused("found data/0 of 0 bytes, for tensors of 64")
    for zipped in (True, False):
        for function, args in ((bytearray, (1 << 40,)), (eval, ("1",)), (torch.empty, (1 << 40,))):
            torch.save({"a": Call(function, *args)}, path, _use_new_zipfile_serialization=zipped)
            refused("with tensors only, found ")
        torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, path, _use_new_zipfile_serialization=zipped)
        refused(r"a: expected a tensor whose values are all in the file, found \(1048576, 1048576\) in 4 bytes")
    torch.save(ones, path)
    path.write_bytes(path.read_bytes()[:-30])
    refused("with tensors only, found ")
    path.unlink()
    os.mkfifo(path)
    refused("expected a state dict, found a pipe")


def tensor_of(numel):
    """A pickle of a tensor of so many values."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": Storage()})
    return file.getvalue()


DOUBLED_TUPLES = b"\x80\x02}N" + b"q\x01h\x01\x86" * 64 + b"K\x01s."
"""As a key: a tuple of two times the same tuple, 64 times, which takes forever to hash."""
UNTYPED_STORAGE = b"\x80\x02}K\x01ctorch\nUntypedStorage\n\x8a\x05\0\0\0\0\1\x85Rs."
"""A call that allocates 4 GB."""
COPIED_LIST = b"\x80\x02ccollections\nOrderedDict\n]K\x01K\x02\x86a\x85R."
"""Of which each call makes a copy."""
LONG_FRAME = b"\x80\x04\x95" + b"\xff" * 8 + b"}."


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DOUBLED_TUPLES, "a tuple of more than 1000 values"),
        (UNTYPED_STORAGE, "'int' object is not callable"),
        (COPIED_LIST, "takes 0 positional arguments"),
        (LONG_FRAME, "frame size"),
        (tensor_of(float("inf")), "a tensor of inf values"),
    ],
)
def test_open_state_dict_refuses_hostile_pickles(tmp_path, data, message, zipped):
    path = tmp_path / "a.pth"
    torch.save({}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        with_entry(path, lambda archive, name, old: archive.writestr(name, data if "data.pkl" in name else old))
    else:
        old = path.read_bytes()
        path.write_bytes(old.replace(pickle.dumps({}, 2), data, 1))
        assert path.read_bytes() != old
    with pytest.raises(ConversionError, match=f"found .*{message}"):
        open_state_dict(path)


@pytest.mark.parametrize("change", [{"n_head": 0}, {"hf_config": [1]}, {"hf_config": {"adapter_stack": None}}])
def test_config_with_values_of_wrong_types_is_an_error(change):
    config = ModelConfig()
    values = mini_omni.config_to_yaml(config) | {"head_size": None} | change
    with pytest.raises(ConversionError, match="here: expected values of the types of the format, found "):
        mini_omni.config_from_yaml(values, config.audio_encoder, config.codec, tts_adapter=True, source="here")
