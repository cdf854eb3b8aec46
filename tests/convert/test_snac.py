"""SNAC's weights to ours and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from omni_jax.codec.snac import Snac
from omni_jax.codec.torch_snac import import_snac
from omni_jax.config.model import CodecConfig
from omni_jax.convert.snac import config_from_json, config_to_json, from_torch, read, to_torch
from omni_jax.errors import ConfigError, ConversionError

CONFIG = CodecConfig(encoder_dim=6, encoder_rates=(3, 5), decoder_dim=16, decoder_rates=(5, 3), codebook_size=20)


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    module = import_snac().SNAC(**config_to_json(CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # As drawn, the lengths are the norms: a converter that ignored them would go unnoticed.
            if name.endswith("original0"):
                parameter.uniform_(0.5, 2)
    return module


@pytest.fixture
def state(module: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def test_folds_weight_norm_as_torch_does(module: Any, state: dict[str, np.ndarray]):
    params = from_torch(state, CONFIG)
    up = module.decoder.model[2].block[1].weight.detach().numpy()
    np.testing.assert_allclose(params["decoder.blocks.0.up.weight"], up.transpose(0, 2, 1), rtol=1e-6)
    down = module.encoder.block[2].block[4].weight.detach().numpy()
    np.testing.assert_allclose(params["encoder.blocks.1.down.weight"], down.transpose(2, 1, 0), rtol=1e-6)
    taps = module.decoder.model[3].block[4].block[1].weight.detach().numpy()
    np.testing.assert_allclose(params["decoder.blocks.1.units.1.depthwise.weight"], taps[:, 0].T, rtol=1e-6)
    assert sum(value.size for value in params.values()) < sum(value.size for value in state.values())
    Snac.from_params(CONFIG, params)


def test_round_trip_from_torch(module: Any, state: dict[str, np.ndarray]):
    back = to_torch(from_torch(state, CONFIG), CONFIG)
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in state.items()}
    again = import_snac().SNAC(**config_to_json(CONFIG))
    again.load_state_dict({name: torch.from_numpy(value) for name, value in back.items()})
    for (name, part), other in zip(module.named_modules(), again.modules(), strict=True):
        if isinstance(getattr(part, "weight", None), torch.Tensor):
            torch.testing.assert_close(other.weight, part.weight, rtol=1e-6, atol=1e-7, msg=name)


def test_round_trip_from_ours(state: dict[str, np.ndarray]):
    params = from_torch(state, CONFIG)
    # A noise block that never learned anything.
    params["decoder.blocks.0.noise.weight"][:] = 0
    again = from_torch(to_torch(params, CONFIG), CONFIG)
    assert list(again) == list(params)
    for name, value in params.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-6, atol=0, err_msg=name)


def test_old_names_of_weight_norm(state: dict[str, np.ndarray]):
    old = {}
    for name, value in state.items():
        name = name.replace(".parametrizations.weight.original0", ".weight_g")
        old[name.replace(".parametrizations.weight.original1", ".weight_v")] = value
    assert len([name for name in old if name.endswith("_g")]) > 20
    params = from_torch(state, CONFIG)
    for name, value in from_torch(old, CONFIG).items():
        np.testing.assert_array_equal(value, params[name])


def test_no_noise(state: dict[str, np.ndarray]):
    config = config_from_json({**config_to_json(CONFIG), "noise": False})
    module = import_snac().SNAC(**config_to_json(config))
    from_torch({name: tensor.numpy() for name, tensor in module.state_dict().items()}, config)


def test_one_error_lists_every_tensor(state: dict[str, np.ndarray]):
    del state["decoder.model.2.block.1.parametrizations.weight.original0"]
    del state["encoder.block.0.bias"]
    state["stranger"] = np.zeros(3, np.float32)
    state["quantizer.quantizers.1.codebook.weight"] = np.zeros((2, 8), np.float32)
    with pytest.raises(ConversionError) as error:
        from_torch(state, CONFIG)
    assert str(error.value).splitlines() == [
        "snac's tensors:",
        "encoder.block.0.bias: missing, expected (6,)",
        "decoder.model.2.block.1.parametrizations.weight.original0: missing, expected (16, 1, 1)",
        "quantizer.quantizers.1.codebook.weight: expected (20, 8), found (2, 8)",
        "stranger: unknown, found (3,)",
    ]


def test_one_error_lists_every_parameter(state: dict[str, np.ndarray]):
    params = from_torch(state, CONFIG)
    del params["decoder.snake.alpha"]
    params["decoder.snake.beta"] = np.zeros(4, np.float32)
    params["decoder.project.bias"] = np.zeros(4, np.float32)
    with pytest.raises(ConversionError) as error:
        to_torch(params, CONFIG)
    assert str(error.value).splitlines() == [
        "codec parameters:",
        "decoder.snake.alpha: missing, expected (4,)",
        "decoder.project.bias: expected (16,), found (4,)",
        "decoder.snake.beta: unknown, found (4,)",
    ]


def test_config_both_ways():
    published = {
        "sampling_rate": 24000,
        "encoder_dim": 48,
        "encoder_rates": [2, 4, 8, 8],
        "decoder_dim": 1024,
        "decoder_rates": [8, 8, 4, 2],
        "attn_window_size": None,
        "codebook_size": 4096,
        "codebook_dim": 8,
        "vq_strides": [4, 2, 1],
        "noise": True,
        "depthwise": True,
    }
    assert config_from_json(published) == CodecConfig()
    assert config_from_json({**published, "latent_dim": 768}) == CodecConfig()
    assert config_to_json(CodecConfig()) == published


def test_config_that_we_do_not_have():
    values = config_to_json(CONFIG)
    wrong = {
        **values,
        "attn_window_size": 32,
        "depthwise": False,
        "vq_strides": [8, 4, 2, 1],
        "latent_dimension": 3,
    }
    del wrong["noise"]
    with pytest.raises(ConversionError) as error:
        config_from_json(wrong)
    assert str(error.value).splitlines() == [
        "config.json, expected to be a snac's:",
        "noise: missing",
        "latent_dimension: unknown field",
        "attn_window_size: expected null, as attention is not supported, found 32",
        "depthwise: expected true, as full convolutions are not supported, found False",
        "vq_strides: expected [4, 2, 1], seven codes a frame, found [8, 4, 2, 1]",
    ]
    with pytest.raises(ConversionError, match="latent_dim: expected 24"):
        config_from_json({**values, "latent_dim": 99})
    with pytest.raises(ConfigError, match="decoder_dim"):
        config_from_json({**values, "decoder_dim": 0})


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_read(tmp_path: Path, module: Any, state: dict[str, np.ndarray], file: str):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    if file == "pytorch_model.bin":
        torch.save(module.state_dict(), tmp_path / file)
    else:
        safetensors.numpy.save_file(state, tmp_path / file)
    config, params = read(tmp_path)
    assert config == CONFIG
    expected = from_torch(state, CONFIG)
    assert all((params[name] == expected[name]).all() for name in expected)


def test_read_says_what_is_missing_or_damaged(tmp_path: Path):
    with pytest.raises(ConversionError, match=r"config\.json: expected JSON, found .*No such file"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json: expected JSON"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    with pytest.raises(ConversionError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ConversionError, match="expected tensors saved by torch"):
        read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ConversionError, match="expected safetensors"):
        read(tmp_path)
