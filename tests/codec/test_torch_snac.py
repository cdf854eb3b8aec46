"""The torch codec behind the callback: the same audio as torch alone and as the JAX codec."""

from __future__ import annotations

import builtins
from typing import Any

import jax
import numpy as np
import pytest
import torch

from omni_jax.codec.stream import StreamDecoder
from omni_jax.codec.torch_snac import TorchSnac, import_snac
from omni_jax.config.model import CodecConfig
from omni_jax.convert.snac import config_to_json, to_torch_module
from omni_jax.errors import MissingExtraError
from tests.codec.reference import Pair, random_codes

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def torch_snac(pair: Pair) -> TorchSnac:
    return TorchSnac(copy_of(pair.torch, pair.config), pair.config)


def copy_of(module: Any, config: CodecConfig) -> Any:
    """A module of its own, as `TorchSnac` changes the one it is given."""
    copy = import_snac().SNAC(**config_to_json(config))
    copy.load_state_dict(module.state_dict())
    return copy


@pytest.mark.parametrize("jit", [False, True])
def test_decode_equals_torch(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray, jit: bool):
    decode = jax.jit(torch_snac.decode) if jit else torch_snac.decode
    audio = np.asarray(decode(codes))
    np.testing.assert_allclose(audio, pair.torch_decode(codes), atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(audio, decode(codes))


def test_ragged_rows_equal_jax_codec(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray):
    lengths = np.array([5, 11, 0], np.int32)
    audio = jax.jit(torch_snac.decode)(codes, lengths=lengths)
    np.testing.assert_allclose(audio, pair.decode(codes, lengths=lengths), atol=TOLERANCE, rtol=0)


def test_vmap(torch_snac: TorchSnac, codes: np.ndarray):
    nested = np.stack([codes, codes[::-1]])
    audio = jax.jit(jax.vmap(lambda codes: torch_snac.decode(codes)))(nested)
    for row in range(2):
        np.testing.assert_array_equal(audio[row], torch_snac.decode(nested[row]))


def test_decode_inside_larger_program(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray):
    @jax.jit
    def loudness(codes: jax.Array) -> jax.Array:
        return abs(torch_snac.decode(codes % pair.config.codebook_size)).mean(-1)

    np.testing.assert_allclose(loudness(codes), np.abs(pair.torch_decode(codes)).mean(-1), atol=TOLERANCE)


def test_decode_streams(pair: Pair, torch_snac: TorchSnac):
    codes = random_codes(pair, 1, 11)
    stream = StreamDecoder(torch_snac.decode, torch_snac.config)
    pieces = [stream.push(codes[0, :1]), stream.push(codes[0, 1:6]), stream.push(codes[0, 6:], last=True)]
    np.testing.assert_allclose(np.concatenate(pieces), pair.torch_decode(codes)[0], atol=TOLERANCE, rtol=0)


def test_from_params(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray):
    module = to_torch_module(pair.config, pair.codec.params())
    np.testing.assert_allclose(
        TorchSnac(module, pair.config).decode(codes), torch_snac.decode(codes), atol=TOLERANCE, rtol=0
    )


def test_folds_weight_norm_and_draws_no_noise(pair: Pair, codes: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    module = copy_of(pair.torch, pair.config)
    codec = TorchSnac(module, pair.config)
    assert not any("parametrizations" in name for name in module.state_dict())

    def randn(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("noise was drawn")

    monkeypatch.setattr(torch, "randn", randn)
    codec.decode(codes).block_until_ready()


def test_missing_snac_is_missing_extra(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_snac(name: str, *rest: Any, **options: Any) -> Any:
        if name == "snac":
            raise ImportError("No module named 'snac'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_snac)
    with pytest.raises(MissingExtraError, match=r"pip install 'omni-jax\[torch\]'") as error:
        TorchSnac(pair.torch, pair.config)
    assert error.value.extra == "torch"
