"""Whisper's encoder from transformers to ours and back."""

import copy
import json
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx, traverse_util
from safetensors.numpy import save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper import modeling_whisper

from omni_jax.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from omni_jax.checkpoint.tensors import tensor_name
from omni_jax.config.model import AudioEncoderConfig
from omni_jax.convert import whisper
from omni_jax.errors import CheckpointError, ConversionError
from omni_jax.model.whisper_encoder import WhisperEncoder
from tests.lazy import peak_memory, read_all, recorded, to_lazy
from tests.models import perturb, whisper_config
from tests.reference_openai_whisper import Whisper, load_model

CONFIG = AudioEncoderConfig(
    num_mel_bins=20, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=72, max_position=30
)
THEIRS = whisper_config(CONFIG)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(THEIRS).eval()
    perturb(model, 0.2)
    return model


@pytest.fixture
def state(model):
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def from_arrays(state):
    return read_all(whisper.from_transformers(to_lazy(state), CONFIG))


def to_arrays(params):
    return read_all(whisper.to_transformers(to_lazy(params), CONFIG))


def test_round_trip_is_bit_exact(state):
    params = from_arrays(state)
    back = to_arrays(params)
    encoder = {name: array for name, array in state.items() if name.startswith("model.encoder.")}
    assert set(back) == set(encoder)
    for name, array in back.items():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        if name.endswith("embed_positions.weight"):
            np.testing.assert_allclose(array, encoder[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(array, encoder[name])
    again = from_arrays(back)
    assert set(again) == set(params)
    for name, array in again.items():
        np.testing.assert_array_equal(array, params[name])


def test_tensor_layout(state):
    params = from_arrays(state)
    q = state["model.encoder.layers.1.self_attn.q_proj.weight"]
    out = state["model.encoder.layers.1.self_attn.out_proj.weight"]
    # 48 hidden units in 4 heads of 12: head 2, unit 5 is row 2 * 12 + 5 of q and the same column of out.
    np.testing.assert_array_equal(params["layers.1.q.weight"][2, 5, :], q[29, :])
    np.testing.assert_array_equal(params["layers.1.out.weight"][:, 2, 5], out[:, 29])
    conv = state["model.encoder.conv1.weight"]
    np.testing.assert_array_equal(params["conv1.weight"][2], conv[:, :, 2].T)
    np.testing.assert_array_equal(params["layers.0.up.weight"], state["model.encoder.layers.0.fc1.weight"])


def test_transformers_loads_exported_state(model, state):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.encoder.parameters():
            parameter.zero_()
    back = to_arrays(from_arrays(state))
    left = other.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()}, strict=False)
    assert left.unexpected_keys == []
    assert not [name for name in left.missing_keys if "encoder." in name and "decoder" not in name]
    mel = torch.randn(1, CONFIG.num_mel_bins, 2 * CONFIG.max_position)
    with torch.no_grad():
        torch.testing.assert_close(other.model.encoder(mel)[0], model.model.encoder(mel)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_prefixes_and_precisions(state, prefix, dtype):
    half = {name.replace("model.", prefix, 1): array.astype(dtype) for name, array in state.items()}
    params = from_arrays(half)
    np.testing.assert_array_equal(params["layers.0.up.bias"], half[f"{prefix}encoder.layers.0.fc1.bias"])
    assert {array.dtype for array in params.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_keeps_its_type_and_bits(state, tmp_path, dtype):
    half = {name: array.astype(dtype) for name, array in state.items()}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(THEIRS.to_dict()))
    save_file(half, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    config, tensors = whisper.read(tmp_path / "theirs")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}

    (tmp_path / "back").mkdir()
    whisper.write(tmp_path / "back", config, tensors)
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == {name for name in half if name.startswith("model.encoder.")}
    for name, array in back.items():
        assert array.dtype == half[name].dtype
        assert array.tobytes() == half[name].tobytes(), name
    for name, array in read_all(whisper.read(tmp_path / "back")[1]).items():
        assert array.tobytes() == tensors[name].read().tobytes(), name
    loaded = WhisperModel.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded.dtype == (torch.float16 if dtype == np.float16 else torch.bfloat16)


def test_export_of_mixed_precision_loads_as_float32(state, tmp_path):
    """The first tensor, whose type transformers takes where none is stated, is in half precision."""
    mixed = {name: array.astype(np.float16) if array.ndim == 1 else array for name, array in state.items()}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(THEIRS.to_dict()))
    save_file(mixed, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "back").mkdir()
    whisper.write(tmp_path / "back", *whisper.read(tmp_path / "theirs"))
    assert WhisperModel.from_pretrained(tmp_path / "back").dtype == torch.float32
    assert WhisperModel.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.float32


def test_tensors_are_read_when_they_are_needed(state):
    reads = []
    tensors = whisper.from_transformers(recorded(to_lazy(state), reads), CONFIG)
    assert reads == []
    tensors["layers.1.q.weight"].read()
    assert reads == ["model.encoder.layers.1.self_attn.q_proj.weight"]
    reads.clear()
    back = whisper.to_transformers(recorded(tensors, reads), CONFIG)
    assert reads == []
    back["model.encoder.conv1.bias"].read()
    assert reads == ["conv1.bias", "model.encoder.conv1.bias"]


def test_read_skips_the_decoder(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    reads = []
    real = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name, *rest: (reads.append(name), real(self, name))[1])
    _, tensors = whisper.read(tmp_path)
    read_all(tensors)
    assert len(reads) == len(tensors)
    assert all(name.startswith("model.encoder.") for name in reads)


def test_conversion_holds_few_tensors_in_memory(tmp_path):
    config = AudioEncoderConfig(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, max_position=100)
    encoder = modeling_whisper.WhisperEncoder(
        WhisperConfig(
            d_model=256, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=1024, max_source_positions=100
        )
    )
    (tmp_path / "back").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(encoder.config.to_dict()))
    state = {f"encoder.{name}": tensor.numpy() for name, tensor in encoder.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    largest, total = (summary(array.nbytes for array in state.values()) for summary in (max, sum))
    assert total > 12 * largest

    def convert():
        read_config, tensors = whisper.read(tmp_path)
        assert read_config == config
        write_safetensors(tmp_path / "ours.safetensors", tensors)
        whisper.write(tmp_path / "back", config, SafetensorsFile(tmp_path / "ours.safetensors").tensors)

    assert peak_memory(convert) < 3 * largest


def test_wrong_types_are_refused(state):
    state["model.encoder.conv1.bias"] = np.zeros(48, np.int32)
    with pytest.raises(ConversionError, match=r"conv1\.bias: expected float32, bfloat16, float16, found int32"):
        from_arrays(state)


def test_one_error_lists_every_tensor(state):
    del state["model.encoder.layers.0.fc1.bias"]
    state["model.encoder.conv1.weight"] = np.zeros((48, 20, 5), np.float32)
    state["model.encoder.layers.0.self_attn.k_proj.bias"] = np.zeros(48, np.float32)
    state["head.weight"] = np.zeros(3, np.float32)
    state["model.encoder.embed_positions.weight"] = np.zeros((7, 48), np.float32)
    with pytest.raises(ConversionError) as info:
        from_arrays(state)
    assert str(info.value).splitlines() == [
        "Whisper's tensors:",
        "layers.0.fc1.bias: missing, expected (72,)",
        "conv1.weight: expected (48, 20, 3), found (48, 20, 5)",
        "embed_positions.weight: expected (30, 48), found (7, 48)",
        "layers.0.self_attn.k_proj.bias: unknown, found (48,)",
        "(outside the encoder) head.weight: unknown, found (3,)",
    ]


def test_to_transformers_lists_every_tensor(state):
    params = from_arrays(state)
    del params["norm.scale"]
    params["layers.0.q.weight"] = params["layers.0.q.weight"].reshape(48, 48)
    params["layers.2.q.weight"] = np.zeros(1, np.float32)
    with pytest.raises(ConversionError) as info:
        to_arrays(params)
    assert str(info.value).splitlines() == [
        "Whisper encoder to transformers:",
        "norm.scale: missing, expected (48,)",
        "layers.0.q.weight: expected (4, 12, 48), found (48, 48)",
        "layers.2.q.weight: unknown, found (1,)",
    ]


def test_config_from_json():
    assert whisper.config_from_json(THEIRS.to_dict()) == CONFIG
    with pytest.raises(ConversionError) as info:
        whisper.config_from_json(
            {"model_type": "whisper", "activation_function": "relu", "scale_embedding": True, "d_model": 8}
        )
    message = str(info.value)
    for field in ("num_mel_bins: missing", "encoder_layers: missing", "max_source_positions: missing"):
        assert field in message
    assert "activation_function: expected 'gelu', found 'relu'" in message
    assert "scale_embedding: expected False, found True" in message
    with pytest.raises(ConversionError, match="multiple of num_heads, found 48 and 5"):
        whisper.config_from_json(THEIRS.to_dict() | {"encoder_attention_heads": 5})


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_read_what_transformers_saves(model, state, tmp_path, shard):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    config, tensors = whisper.read(tmp_path)
    assert config == CONFIG
    expected = from_arrays(state)
    assert set(tensors) == set(expected)
    for name, array in read_all(tensors).items():
        np.testing.assert_array_equal(array, expected[name])


def test_read_names_what_is_missing_or_damaged(state, tmp_path):
    with pytest.raises(ConversionError, match=r"config\.json: expected JSON, found no such file"):
        whisper.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(THEIRS.to_dict()))
    with pytest.raises(ConversionError, match=r"expected model\.safetensors .*, found none"):
        whisper.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected safetensors"):
        whisper.read(tmp_path)
    state["adapter.weight"] = np.zeros(3, np.float32)
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"\(outside the encoder\) adapter\.weight: unknown"):
        whisper.read(tmp_path)


def test_openai_file_in_and_out(tmp_path):
    """Features of OpenAI's encoder, and every tensor back where it was."""
    dims = {"n_mels": 20, "n_audio_ctx": 30, "n_audio_state": 48, "n_audio_head": 4, "n_audio_layer": 2}
    dims |= {"n_vocab": 7, "n_text_ctx": 3, "n_text_state": 48, "n_text_head": 4, "n_text_layer": 1}
    torch.manual_seed(0)
    theirs = Whisper(dims).eval()
    perturb(theirs, 0.2)
    torch.save({"dims": dims, "model_state_dict": theirs.state_dict()}, tmp_path / "small.pt")
    config, tensors = whisper.read(tmp_path / "small.pt")
    assert config == replace(CONFIG, intermediate_size=192)
    whisper.write_openai(tmp_path / "back.pt", config, tensors)
    back = load_model(tmp_path / "back.pt")
    for name, tensor in theirs.encoder.state_dict().items():
        assert torch.equal(back.encoder.state_dict()[name], tensor), name

    mel = np.random.default_rng(0).standard_normal((1, 20, 60)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encoder(torch.from_numpy(mel)).numpy()
    encoder = WhisperEncoder(config, stacked=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    flat = {path: tensors[tensor_name(path)].read() for path, _ in nnx.to_flat_state(nnx.state(encoder))}
    nnx.update(encoder, traverse_util.unflatten_dict(flat))
    np.testing.assert_allclose(encoder(mel, np.array([60])), expected, atol=1e-4, rtol=0)

    with pytest.raises(ConversionError, match=r"audio_encoder\.intermediate_size: expected 192, found 72"):
        whisper.write_openai(tmp_path / "narrow.pt", CONFIG, tensors)
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ConversionError, match=r"bare\.pt: expected a Whisper of OpenAI with dims"):
        whisper.read(tmp_path / "bare.pt")


def test_read_an_encoder_that_was_saved_alone(model, tmp_path):
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    model.save_pretrained(whole)
    model.model.encoder.save_pretrained(alone)
    values = json.loads((whole / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(values))
    expected, found = (whisper.read(folder)[1] for folder in (whole, alone))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), expected[name].read())
