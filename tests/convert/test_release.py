"""Whole folders: what a release is made of, and what `inspect` lists."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from omni_jax.checkpoint.release import open_release
from omni_jax.convert.release import (
    TensorGroup,
    export_snac,
    export_whisper,
    import_mini_omni,
    init_release,
    inspect,
)
from omni_jax.errors import CheckpointError, ConversionError
from tests import models


def test_inspect_groups_layers(tiny_release, tiny_config):
    listed = inspect(str(tiny_release))
    assert [group.name for group in listed] == sorted(group.name for group in listed)
    groups = {group.name: group for group in listed}
    assert groups["trunk.layers.*.attention.q.weight"] == TensorGroup(
        "trunk", "trunk.layers.*.attention.q.weight", 2, (4, 16, 48), "float32"
    )
    assert groups["trunk.layers.*.attention.q.weight"].num_parameters == 2 * 4 * 16 * 48
    assert groups["audio_encoder.layers.*.k.weight"].count == tiny_config.audio_encoder.num_layers
    assert "audio_encoder.layers.*.k.bias" not in groups
    assert groups["codec.quantizers.*.codebook"] == TensorGroup(
        "codec", "codec.quantizers.*.codebook", 3, (64, 8), "float32"
    )
    release = open_release(tiny_release)
    tensors = [*release.model_tensors().values(), *release.codec_tensors().values()]
    assert sum(group.count for group in listed) == len(tensors)
    assert sum(group.num_parameters for group in listed) == sum(tensor.read().size for tensor in tensors)


def test_inspect_shows_stored_types():
    types = {group.name: group.dtype for group in inspect("nano")}
    assert types["audio_encoder.layers.*.out.weight"] == "int8"
    # As in the file of OpenAI's Whisper base.
    assert types["audio_encoder.norm.bias"] == "float16"
    assert types["norm.scale"] == "float32"
    assert types["codec.decoder.conv_out.weight"] == "float16"
    assert not any("scale" in name and "int8" in name for name in types)


def test_inspect_counts_a_tied_head_once(tiny_parts):
    groups = inspect(str(tiny_parts / "mini_omni"))
    assert [group.name for group in groups if group.module == "lm_head"] == []
    assert {group.module for group in groups} == {"h", "ln_f", "whisper_adapter", "wte"}


def test_inspect_of_something_else(tiny_parts, tmp_path):
    with pytest.raises(ConversionError, match=r"expected a release with config\.json or a Mini-Omni checkpoint"):
        inspect(str(tiny_parts / "snac"))
    with pytest.raises(CheckpointError, match="expected a release or a Mini-Omni checkpoint"):
        inspect(str(tmp_path / "nowhere"))


def test_inspect_reads_no_weights(tiny_release, monkeypatch):
    monkeypatch.setattr("omni_jax.checkpoint.safetensors_io.SafetensorsFile.read", None)
    monkeypatch.setattr("omni_jax.checkpoint.safetensors_io.SafetensorsFile.read_into", None)
    assert inspect(str(tiny_release))


@pytest.fixture
def half_parts(tiny_parts, tmp_path):
    """The Whisper in bfloat16, and the SNAC in float16."""
    folder = shutil.copytree(tiny_parts, tmp_path / "half")
    file = folder / "whisper" / "model.safetensors"
    state = safetensors.numpy.load_file(file)
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    safetensors.numpy.save_file(half, file, metadata={"format": "pt"})
    import torch

    file = folder / "snac" / "pytorch_model.bin"
    torch.save({name: tensor.half() for name, tensor in torch.load(file, weights_only=True).items()}, file)
    return folder


def test_release_keeps_the_type_of_each_source(half_parts, tmp_path):
    import_mini_omni(
        str(half_parts / "mini_omni"),
        tmp_path / "release",
        whisper_source=str(half_parts / "whisper"),
        snac_source=str(half_parts / "snac"),
    )
    release = open_release(tmp_path / "release")
    for name, tensor in release.model_tensors().items():
        encoder = name.startswith("audio_encoder.")
        assert tensor.dtype == (ml_dtypes.bfloat16 if encoder else np.float32), name
    assert {tensor.dtype for tensor in release.codec_tensors().values()} == {np.dtype(np.float16)}
    assert release.load_codec().config == release.config.codec

    export_whisper(release, tmp_path / "whisper")
    before, after = (
        safetensors.numpy.load_file(folder / "whisper" / "model.safetensors") for folder in (half_parts, tmp_path)
    )
    for name, array in after.items():
        assert array.tobytes() == before[name.removeprefix("model.")].tobytes(), name
    assert json.loads((tmp_path / "whisper" / "config.json").read_text())["dtype"] == "bfloat16"
    export_snac(release, tmp_path / "snac")
    import torch

    state = torch.load(tmp_path / "snac" / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_release_as_a_source_of_encoder_and_codec(tiny_release, tmp_path):
    models.language_model_folder(tmp_path / "lm", "llama", tied=True)
    source = str(tiny_release)
    init_release(tmp_path / "new", lm_source=str(tmp_path / "lm"), whisper_source=source, snac_source=source)
    old, new = open_release(tiny_release), open_release(tmp_path / "new")
    assert new.config.audio_encoder == old.config.audio_encoder
    assert new.config.codec == old.config.codec
    model, codec = new.model_tensors(), new.codec_tensors()
    for name, tensor in old.model_tensors().items():
        if name.startswith("audio_encoder."):
            assert model[name].read().tobytes() == tensor.read().tobytes(), name
    for name, tensor in old.codec_tensors().items():
        assert codec[name].read().tobytes() == tensor.read().tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_an_import(dtype, half_parts, tmp_path):
    """Of all tensors but those of the codec."""
    sources = {"whisper_source": str(half_parts / "whisper"), "snac_source": str(half_parts / "snac")}
    models.language_model_folder(tmp_path / "lm", "qwen2", tied=True)
    import_mini_omni(str(half_parts / "mini_omni"), tmp_path / "kept", **sources)
    import_mini_omni(str(half_parts / "mini_omni"), tmp_path / "imported", dtype=dtype, **sources)
    init_release(tmp_path / "new", lm_source=str(tmp_path / "lm"), dtype=dtype, **sources)
    for name in ("imported", "new"):
        release = open_release(tmp_path / name)
        assert {tensor.dtype.name for tensor in release.model_tensors().values()} == {dtype}
        assert {tensor.dtype.name for tensor in release.codec_tensors().values()} == {"float16"}
    before, after = (open_release(tmp_path / name).model_tensors() for name in ("kept", "imported"))
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].read(), tensor.read().astype(after[name].dtype), name)
