"""A torch SNAC with random weights, and the same weights in the JAX codec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
import torch

from omni_jax.codec.snac import FRAME_SLOTS, DecodeFn, Snac, make_decoder, make_encoder
from omni_jax.codec.torch_snac import import_snac
from omni_jax.config.model import CodecConfig
from omni_jax.convert.snac import config_to_json, from_torch


@dataclass(frozen=True)
class Pair:
    """The torch reference and the JAX codec, with equal weights."""

    config: CodecConfig
    torch: Any
    codec: Snac
    decode: DecodeFn
    encode: Callable[..., jax.Array]

    def torch_decode(self, codes: np.ndarray) -> np.ndarray:
        """[B, F, 7] -> [B, samples] by the reference, whose noise blocks draw zeros."""
        books = [torch.from_numpy(codes[..., s].reshape(len(codes), -1).astype(np.int64)) for s in FRAME_SLOTS]
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
            return self.torch.decode(books)[:, 0].numpy()

    def torch_encode(self, audio: np.ndarray) -> np.ndarray:
        """[B, samples] -> [B, F, 7] by the reference."""
        with torch.inference_mode():
            books = [book.numpy() for book in self.torch.encode(torch.from_numpy(audio[:, None]))]
        codes = np.zeros((len(audio), books[0].shape[1], 7), np.int32)
        for slots, book in zip(FRAME_SLOTS, books, strict=True):
            codes[..., slots] = book.reshape(len(audio), -1, len(slots))
        return codes


def make_pair(config: CodecConfig, seed: int) -> Pair:
    """Random weights, scaled up: with torch's own initialization the signal fades to nothing."""
    torch.manual_seed(seed)
    module = import_snac().SNAC(**config_to_json(config)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 2)
            elif name.endswith("original0"):
                parameter.mul_(1.3)
            elif name.endswith("bias"):
                parameter.mul_(0.1)
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    codec = Snac.from_params(config, from_torch(state, config))
    return Pair(config, module, codec, make_decoder(codec), make_encoder(codec))


def random_codes(pair: Pair, B: int, F: int, seed: int = 0) -> np.ndarray:
    """Int32 [B, F, 7]."""
    return np.random.default_rng(seed).integers(0, pair.config.codebook_size, (B, F, 7)).astype(np.int32)


def random_audio(B: int, samples: int, seed: int = 0) -> np.ndarray:
    """Noise of changing loudness and color, so that the codes change too. Float32 [B, samples]."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((B, samples))
    colored = sum(weight * np.roll(noise, shift, 1) for shift, weight in enumerate(random.normal(size=9)))
    pieces = -(-samples // 512)
    loudness = np.repeat(random.uniform(0.01, 0.6, (B, pieces)), 512, 1)[:, :samples]
    mixed = np.where(np.repeat(random.random((B, pieces)) < 0.5, 512, 1)[:, :samples], colored, noise)
    return (mixed * loudness).astype(np.float32)
