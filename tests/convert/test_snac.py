"""SNAC's weights to ours and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

from omni_jax.checkpoint.safetensors_io import write_safetensors
from omni_jax.codec.snac import FRAME_SLOTS, Snac, make_decoder
from omni_jax.codec.torch_snac import import_snac
from omni_jax.config.model import CodecConfig
from omni_jax.convert.snac import (
    config_from_json,
    config_to_json,
    from_state,
    from_torch,
    read,
    to_state,
    to_torch_module,
    write,
)
from omni_jax.errors import CheckpointError, ConfigError, ConversionError
from tests.lazy import peak_memory, read_all, recorded, to_lazy

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


def to_torch(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return read_all(to_state(to_lazy(params), CONFIG))


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
    back = to_torch(from_torch(state, CONFIG))
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in state.items()}
    again = import_snac().SNAC(**config_to_json(CONFIG))
    again.load_state_dict({name: torch.from_numpy(value) for name, value in back.items()})
    for (name, part), other in zip(module.named_modules(), again.modules(), strict=True):
        if isinstance(getattr(part, "weight", None), torch.Tensor):
            torch.testing.assert_close(other.weight, part.weight, rtol=1e-6, atol=1e-7, msg=name)


def test_round_trip_from_ours(state: dict[str, np.ndarray]):
    params = from_torch(state, CONFIG)
    # An untrained noise block.
    params["decoder.blocks.0.noise.weight"][:] = 0
    again = from_torch(to_torch(params), CONFIG)
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


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_half_precision_keeps_its_type_and_is_folded_in_float32(
    tmp_path: Path, state: dict[str, np.ndarray], dtype: Any, file: str
):
    half = {name: array.astype(dtype) for name, array in state.items()}
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    if file == "pytorch_model.bin":
        kind = torch.float16 if dtype == np.float16 else torch.bfloat16
        torch.save({name: torch.from_numpy(array).to(kind) for name, array in state.items()}, tmp_path / file)
    else:
        safetensors.numpy.save_file(half, tmp_path / file)
    _, tensors = read(tmp_path)
    exact = from_torch({name: array.astype(np.float32) for name, array in half.items()}, CONFIG)
    for name, array in read_all(tensors).items():
        assert array.dtype == dtype
        assert array.tobytes() == exact[name].astype(dtype).tobytes(), name


def test_mixed_precisions_fold_to_float32(state: dict[str, np.ndarray]):
    exact = from_torch(state, CONFIG)
    name = "decoder.model.2.block.1.parametrizations.weight.original1"
    state[name] = state[name].astype(np.float16)
    mixed = from_torch(state, CONFIG)
    assert {array.dtype for array in mixed.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(mixed["decoder.blocks.0.up.weight"], exact["decoder.blocks.0.up.weight"], rtol=2e-3)


def test_nothing_is_read_before_it_is_asked_for(state: dict[str, np.ndarray]):
    reads: list[str] = []
    tensors = from_state(recorded(to_lazy(state), reads), CONFIG, "test")
    assert reads == []
    tensors["decoder.project.weight"].read()
    pair = [f"decoder.model.1.parametrizations.weight.original{part}" for part in (0, 1)]
    assert reads == pair
    reads.clear()
    back = to_state(recorded(tensors, reads), CONFIG)
    assert reads == []
    back[pair[0]].read()
    assert reads == ["decoder.project.weight", *pair]


def test_import_holds_few_tensors_in_memory(tmp_path: Path):
    config = CodecConfig(
        encoder_dim=64, encoder_rates=(1, 1, 1), decoder_dim=512, decoder_rates=(1, 1, 1), codebook_size=20
    )
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config)))
    params = {name: np.ones(array.shape, np.float32) for name, array in Snac(config, rngs=nnx.Rngs(0)).params().items()}
    write_safetensors(tmp_path / "model.safetensors", to_state(to_lazy(params), config))
    largest, total = (summary(array.nbytes for array in params.values()) for summary in (max, sum))
    assert total > 5 * largest
    # The direction, its product with the length, and the product transposed.
    peak = peak_memory(lambda: write_safetensors(tmp_path / "ours.safetensors", read(tmp_path)[1]))
    assert peak < 4 * largest


def test_write_is_float32(tmp_path: Path, state: dict[str, np.ndarray]):
    params = from_torch(state, CONFIG)
    half = {name: array.astype(np.float16) for name, array in params.items()}
    write(tmp_path, CONFIG, to_lazy(half))
    config, tensors = read(tmp_path)
    assert config == CONFIG
    for name, array in read_all(tensors).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, half[name].astype(np.float32), rtol=1e-6, atol=1e-7, err_msg=name)


def test_to_torch_module_decodes_as_our_codec():
    config = replace(CONFIG, noise=False)
    state = import_snac().SNAC(**config_to_json(config)).state_dict()
    params = from_torch({name: tensor.numpy() for name, tensor in state.items()}, config)
    module = to_torch_module(config, params)
    assert not module.training
    codes = np.random.default_rng(0).integers(0, config.codebook_size, (1, 6, 7)).astype(np.int32)
    books = [torch.from_numpy(codes[:, :, slots].reshape(1, -1).astype(np.int64)) for slots in FRAME_SLOTS]
    with torch.no_grad():
        expected = module.decode(books)[:, 0].numpy()
    ours = make_decoder(Snac.from_params(config, params))(codes)
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


def test_to_torch_module_takes_the_parameters_of_our_codec(module: Any, state: dict[str, np.ndarray]):
    """Which are jax arrays; the codec's own are not changed through the module."""
    params = Snac.from_params(CONFIG, from_torch(state, CONFIG)).params()
    before = jax.tree.map(np.array, params)
    again = to_torch_module(CONFIG, params)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    for name, array in params.items():
        np.testing.assert_array_equal(array, before[name])


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
        to_torch(params)
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
    config, tensors = read(tmp_path)
    assert config == CONFIG
    expected, params = from_torch(state, CONFIG), read_all(tensors)
    assert set(params) == set(expected)
    assert all((params[name] == expected[name]).all() for name in expected)


def test_read_of_a_file_of_torch_before_zip(tmp_path: Path, module: Any, state: dict[str, np.ndarray]):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    expected = from_torch(state, CONFIG)
    for name, array in read_all(read(tmp_path)[1]).items():
        np.testing.assert_array_equal(array, expected[name])


def test_read_says_what_is_missing_or_damaged(tmp_path: Path):
    with pytest.raises(ConversionError, match=r"config\.json: expected JSON, found no such file"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json: expected JSON"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    with pytest.raises(ConversionError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ConversionError, match="expected a state dict with tensors only"):
        read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="expected safetensors"):
        read(tmp_path)
