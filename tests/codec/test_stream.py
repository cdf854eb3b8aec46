"""Streaming: the receptive field is exact, and streamed pieces joined equal the whole."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.codec.snac import receptive_field
from omni_jax.codec.stream import StreamDecoder
from omni_jax.config.model import CodecConfig
from tests.codec.reference import Pair, random_codes

TOLERANCE = 1e-5


def test_receptive_field_of_snac_24khz():
    # By hand, in samples to each side: 3 latents; per block the overlap of the transposed convolution (its
    # stride less the crop) and 39 positions of three dilated kernels; 3 samples of the last kernel.
    side = 3 * 512 + (8 - 4 + 39) * 64 + (8 - 4 + 39) * 8 + (4 - 2 + 39) * 2 + (2 - 1 + 39) * 1 + 3
    assert side == 4757
    assert receptive_field(CodecConfig()) == (side, side)
    assert math.ceil(side / CodecConfig().frame_size) == 3


@pytest.mark.parametrize("name", ["pair", "odd_pair"])
def test_receptive_field_is_exact(name: str, request: pytest.FixtureRequest):
    """A change of one frame's latents spreads, to first order, exactly as far as the field says."""
    pair: Pair = request.getfixturevalue(name)
    field = receptive_field(pair.config)
    frame = pair.config.frame_size
    before, after = math.ceil(field.right_samples / frame) + 1, math.ceil(field.left_samples / frame) + 1
    F = before + 1 + after
    width = pair.config.encoder_dim * 2 ** len(pair.config.encoder_rates)
    latents = np.random.default_rng(0).standard_normal((1, F * 4, width)).astype(np.float32)
    change = np.zeros_like(latents)
    change[:, before * 4 : (before + 1) * 4] = 1

    @jax.jit
    def spread_of(latents, change):
        audio, pull = jax.vjp(pair.codec.decoder, latents)
        # Custom VJPs have no forward mode; the gradient of the (linear) gradient is the same.
        return jax.vjp(lambda out: pull(out)[0], jax.numpy.zeros_like(audio))[1](change)[0]

    spread = spread_of(latents, change)
    touched = np.flatnonzero(np.asarray(spread[0]))
    assert touched[0] == before * frame - field.right_samples > 0
    assert touched[-1] == (before + 1) * frame + field.left_samples - 1 < F * frame - 1


def test_code_outside_receptive_field_changes_nothing(pair: Pair):
    field = receptive_field(pair.config)
    one = random_codes(pair, 3, 11)
    other = one.copy()
    other[0, 4] = (other[0, 4] + 1) % pair.config.codebook_size
    changed = np.flatnonzero((np.asarray(pair.decode(one)) != np.asarray(pair.decode(other)))[0])
    frame = pair.config.frame_size
    assert 4 * frame - field.right_samples <= changed[0] < 4 * frame
    assert 5 * frame <= changed[-1] < 5 * frame + field.left_samples


SPLITS = [[1] * 13, [13], [4, 4, 4, 1], [0, 2, 0, 7, 3, 1, 0], [5, 8], [1], [2], [3], [6], [40], []]


@pytest.mark.parametrize("empty_end", [False, True])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_stream_equals_whole_decode(pair: Pair, split: list[int], empty_end: bool):
    codes = random_codes(pair, 1, sum(split))
    stream = StreamDecoder(pair.decode, pair.config)
    joined = run(stream, codes[0], split, empty_end)
    assert joined.dtype == np.float32
    assert joined.shape == (sum(split) * pair.config.frame_size,)
    if split:
        np.testing.assert_allclose(joined, pair.torch_decode(codes)[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_stream_with_random_splits(odd_pair: Pair, seed: int):
    random = np.random.default_rng(seed)
    split = list(random.integers(0, 25, 12))
    codes = random_codes(odd_pair, 1, sum(split), seed)
    stream = StreamDecoder(odd_pair.decode, odd_pair.config)
    joined = run(stream, codes[0], split, empty_end=bool(seed % 2))
    np.testing.assert_allclose(joined, odd_pair.torch_decode(codes)[0], atol=TOLERANCE, rtol=0)


def test_push_returns_final_samples_at_once(pair: Pair):
    codes = random_codes(pair, 1, 6)[0]
    stream = StreamDecoder(pair.decode, pair.config)
    sizes = [len(stream.push(code[None])) for code in codes]
    behind = receptive_field(pair.config).right_samples
    assert sizes == [0, 0, 3 * 128 - behind, 128, 128, 128]
    assert len(stream.push(codes[:0], last=True)) == behind


def test_stream_compiles_few_windows_and_keeps_few_frames(pair: Pair):
    shapes = []

    def decode(codes: np.ndarray, **options: Any) -> jax.Array:
        shapes.append(codes.shape)
        return jnp.zeros((1, codes.shape[1] * pair.config.frame_size))

    stream = StreamDecoder(decode, pair.config)
    stream.warm_up()
    warmed = set(shapes)
    assert warmed == {(1, frames, 7) for frames in (3, 4, 6, 9, 21)}
    random = np.random.default_rng(0)
    for _ in range(100):
        stream.push(np.zeros((random.integers(0, 30), 7), np.int32))
        assert len(stream._kept) <= 5
    assert set(shapes) == warmed


def test_push_rejects_invalid_codes(pair: Pair):
    stream = StreamDecoder(pair.decode, pair.config)
    with pytest.raises(ValueError, match=r"expected shape \[frames, 7\], found \[7\]"):
        stream.push(np.zeros(7, np.int32))
    with pytest.raises(ValueError, match="expected 0 to 511, found 0 to 512"):
        stream.push(np.array([[0, 0, 0, 0, 0, 0, 512]]))
    with pytest.raises(ValueError, match="found -1 to 0"):
        stream.push(np.array([[0, 0, 0, 0, 0, 0, -1]]))
    # A rejected push does not change the stream.
    assert stream.push(np.zeros((1, 7), np.int32), last=True).shape == (pair.config.frame_size,)
    with pytest.raises(RuntimeError, match="the stream has ended"):
        stream.push(np.zeros((1, 7), np.int32))


def run(stream: StreamDecoder, codes: np.ndarray, split: list[int], empty_end: bool) -> np.ndarray:
    """Push codes [F, 7] in pieces; the last piece ends the stream, or an empty push after it."""
    audio, at = [], 0
    for index, size in enumerate(split):
        audio.append(stream.push(codes[at : at + size], last=not empty_end and index == len(split) - 1))
        at += size
    if empty_end or not split:
        audio.append(stream.push(codes[at:], last=True))
    return np.concatenate(audio)
