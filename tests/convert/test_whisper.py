import copy
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from omni_jax.config.model import AudioEncoderConfig
from omni_jax.convert import whisper
from omni_jax.errors import ConversionError

CONFIG = AudioEncoderConfig(num_mel_bins=20, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=72, max_position=30)
THEIRS = WhisperConfig(
    vocab_size=40,
    num_mel_bins=CONFIG.num_mel_bins,
    d_model=CONFIG.hidden_size,
    encoder_layers=CONFIG.layers,
    encoder_attention_heads=CONFIG.heads,
    encoder_ffn_dim=CONFIG.intermediate_size,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=16,
    max_source_positions=CONFIG.max_position,
    max_target_positions=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=3,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(THEIRS).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "model.encoder.embed_positions.weight":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def state(model):
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def test_round_trip_is_bit_exact(state):
    params = whisper.from_transformers(state, CONFIG)
    back = whisper.to_transformers(params, CONFIG)
    encoder = {name: array for name, array in state.items() if name.startswith("model.encoder.")}
    assert set(back) == set(encoder)
    for name, array in back.items():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        if name.endswith("embed_positions.weight"):
            np.testing.assert_allclose(array, encoder[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(array, encoder[name])
    again = whisper.from_transformers(back, CONFIG)
    assert set(again) == set(params)
    for name, array in again.items():
        np.testing.assert_array_equal(array, params[name])


def test_layout(state):
    params = whisper.from_transformers(state, CONFIG)
    q = state["model.encoder.layers.1.self_attn.q_proj.weight"]
    out = state["model.encoder.layers.1.self_attn.out_proj.weight"]
    # Width 48 in 4 heads of 12: head 2, unit 5 is row 2 * 12 + 5 of q and the same column of out.
    np.testing.assert_array_equal(params["layers.1.q.kernel"][:, 2, 5], q[29, :])
    np.testing.assert_array_equal(params["layers.1.out.kernel"][2, 5, :], out[:, 29])
    conv = state["model.encoder.conv1.weight"]
    np.testing.assert_array_equal(params["conv1.kernel"][2], conv[:, :, 2].T)


def test_transformers_loads_what_we_write(model, state):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.encoder.parameters():
            parameter.zero_()
    back = whisper.to_transformers(whisper.from_transformers(state, CONFIG), CONFIG)
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
    positions = f"{prefix}encoder.embed_positions.weight"
    if dtype == ml_dtypes.bfloat16:
        with pytest.raises(ConversionError, match="expected Whisper's sinusoids"):
            whisper.from_transformers(half, CONFIG)
        half[positions] = state["model.encoder.embed_positions.weight"]
    params = whisper.from_transformers(half, CONFIG)
    expected = half[f"{prefix}encoder.layers.0.fc1.bias"].astype(np.float32)
    np.testing.assert_array_equal(params["layers.0.up.bias"], expected)


def test_one_error_lists_everything(state):
    del state["model.encoder.layers.0.fc1.bias"]
    state["model.encoder.conv1.weight"] = np.zeros((48, 20, 5), np.float32)
    state["model.encoder.layers.0.self_attn.k_proj.bias"] = np.zeros(48, np.float32)
    state["head.weight"] = np.zeros(3, np.float32)
    state["model.encoder.embed_positions.weight"][7, 3] += 0.01
    with pytest.raises(ConversionError) as info:
        whisper.from_transformers(state, CONFIG)
    assert str(info.value).splitlines() == [
        "Whisper's tensors:",
        "layers.0.fc1.bias: missing, expected (72,)",
        "conv1.weight: expected (48, 20, 3), found (48, 20, 5)",
        "layers.0.self_attn.k_proj.bias: unknown, found (48,)",
        "(outside the encoder) head.weight: unknown, found (3,)",
        "embed_positions.weight: expected Whisper's sinusoids to within 0.0005, found a difference of 0.01",
    ]


def test_writing_checks_too(state):
    params = whisper.from_transformers(state, CONFIG)
    del params["norm.scale"]
    params["layers.0.q.kernel"] = params["layers.0.q.kernel"].reshape(48, 48)
    params["layers.2.q.kernel"] = np.zeros(1, np.float32)
    with pytest.raises(ConversionError) as info:
        whisper.to_transformers(params, CONFIG)
    assert str(info.value).splitlines() == [
        "Whisper encoder to transformers:",
        "norm.scale: missing, expected (48,)",
        "layers.0.q.kernel: expected (48, 4, 12), found (48, 48)",
        "layers.2.q.kernel: unknown, found (1,)",
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
    with pytest.raises(ConversionError, match="multiple of heads, found 48 and 5"):
        whisper.config_from_json(THEIRS.to_dict() | {"encoder_attention_heads": 5})


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_read_what_transformers_saves(model, state, tmp_path, shard):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    config, params = whisper.read(tmp_path)
    assert config == CONFIG
    expected = whisper.from_transformers(state, CONFIG)
    assert set(params) == set(expected)
    for name, array in params.items():
        np.testing.assert_array_equal(array, expected[name])


def test_read_refuses(state, tmp_path):
    with pytest.raises(ConversionError, match=r"config\.json: expected JSON, found .*No such file"):
        whisper.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(THEIRS.to_dict()))
    with pytest.raises(ConversionError, match="found neither"):
        whisper.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ConversionError, match=r"model\.safetensors: expected safetensors"):
        whisper.read(tmp_path)
    state["adapter.weight"] = np.zeros(3, np.float32)
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"\(outside the encoder\) adapter\.weight: unknown"):
        whisper.read(tmp_path)
