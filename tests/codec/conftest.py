"""Pairs of codecs with equal weights, torch and JAX."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.config.model import CodecConfig
from tests.codec.reference import Pair, make_pair, random_codes


@pytest.fixture(scope="session")
def pair() -> Pair:
    """Two blocks instead of four, which compiles in half the time; a receptive field of 3 frames, as at 24 kHz."""
    rates = {"encoder_rates": (4, 8), "decoder_rates": (8, 4)}
    return make_pair(CodecConfig(encoder_dim=12, decoder_dim=48, codebook_size=512, **rates), seed=0)


@pytest.fixture(scope="session")
def odd_pair() -> Pair:
    """Odd rates and a frame so short, 60 samples, that the receptive field spans many frames."""
    rates = {"encoder_rates": (3, 5), "decoder_rates": (5, 3)}
    return make_pair(CodecConfig(encoder_dim=6, decoder_dim=16, codebook_size=64, **rates), seed=1)


@pytest.fixture(scope="session")
def real_pair() -> Pair:
    """The shape of snac_24khz."""
    return make_pair(CodecConfig(), seed=2)


@pytest.fixture
def codes(pair: Pair) -> np.ndarray:
    """Random int32 [3, 11, 7]."""
    return random_codes(pair, 3, 11)
