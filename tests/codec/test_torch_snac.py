"""The torch codec behind the callback: the same audio as torch on its own and as our codec."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from omni_jax.codec.stream import StreamDecoder
from omni_jax.codec.torch_snac import TorchSnac
from omni_jax.convert.snac import config_to_json
from tests.codec.reference import Pair, random_codes

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def torch_snac(pair: Pair) -> TorchSnac:
    return TorchSnac(pair.torch)


@pytest.mark.parametrize("jit", [False, True])
def test_equals_torch(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray, jit: bool):
    decode = jax.jit(torch_snac.decode) if jit else torch_snac.decode
    audio = np.asarray(decode(codes))
    np.testing.assert_allclose(audio, pair.torch_decode(codes), atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(audio, decode(codes))


def test_ragged_rows_and_noise_equal_our_codec(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray):
    lengths = np.array([5, 11, 0], np.int32)
    for options in ({}, {"noise_key": jax.random.key(5), "first_frame": 3}):
        ours = pair.decode(codes, lengths=lengths, **options)
        theirs = jax.jit(torch_snac.decode)(codes, lengths=lengths, **options)
        np.testing.assert_allclose(theirs, ours, atol=TOLERANCE, rtol=0)


def test_vmap(torch_snac: TorchSnac, codes: np.ndarray):
    nested = np.stack([codes, codes[::-1]])
    audio = jax.jit(jax.vmap(lambda codes: torch_snac.decode(codes)))(nested)
    for row in range(2):
        np.testing.assert_array_equal(audio[row], torch_snac.decode(nested[row]))


def test_inside_a_larger_program(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray):
    @jax.jit
    def loudness(codes: jax.Array) -> jax.Array:
        return abs(torch_snac.decode(codes % pair.config.codebook_size)).mean(-1)

    np.testing.assert_allclose(loudness(codes), np.abs(pair.torch_decode(codes)).mean(-1), atol=TOLERANCE)


def test_streams(pair: Pair, torch_snac: TorchSnac):
    codes = random_codes(pair, 1, 11)
    stream = StreamDecoder(torch_snac.decode, torch_snac.config)
    pieces = [stream.push(codes[0, :1]), stream.push(codes[0, 1:6]), stream.push(codes[0, 6:], last=True)]
    np.testing.assert_allclose(np.concatenate(pieces), pair.torch_decode(codes)[0], atol=TOLERANCE, rtol=0)


def test_from_our_parameters(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray):
    other = TorchSnac.from_params(pair.config, pair.codec.params())
    assert other.config == torch_snac.config == pair.config
    np.testing.assert_allclose(other.decode(codes), torch_snac.decode(codes), atol=TOLERANCE, rtol=0)


def test_from_a_folder(pair: Pair, torch_snac: TorchSnac, codes: np.ndarray, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(pair.config)))
    torch.save(pair.torch.state_dict(), tmp_path / "pytorch_model.bin")
    other = TorchSnac(tmp_path)
    np.testing.assert_allclose(other.decode(codes), torch_snac.decode(codes), atol=TOLERANCE, rtol=0)


def test_the_module_given_stays_as_it_is(pair: Pair):
    before = list(pair.torch.state_dict())
    TorchSnac(pair.torch)
    assert list(pair.torch.state_dict()) == before
    assert not any("forward" in vars(part) for part in pair.torch.modules())


def test_says_what_to_install(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_snac(name: str, *rest: Any, **options: Any) -> Any:
        if name == "snac":
            raise ImportError("No module named 'snac'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_snac)
    with pytest.raises(ImportError, match=r"pip install omni-jax\[torch\]"):
        TorchSnac(pair.torch)
