"""The codec against torch's, on random weights: codes, audio, ragged rows, gradients, parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from omni_jax.codec import snac
from omni_jax.codec.ops import sine_squared
from omni_jax.codec.snac import FRAME_SLOTS, Snac, make_decoder
from omni_jax.compile_report.hlo import COLLECTIVES
from omni_jax.config.model import CodecConfig
from omni_jax.sharding import make_mesh, rows
from tests.codec.reference import Pair, random_audio, random_codes

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ["pair", "odd_pair"])
def test_encode_equals_torch(name: str, request: pytest.FixtureRequest):
    pair: Pair = request.getfixturevalue(name)
    audio = random_audio(3, pair.config.frame_size * 24 - 5)
    expected = pair.torch_encode(audio)
    assert all(len(np.unique(expected[..., slots])) > 10 for slots in FRAME_SLOTS), "too few different codes to compare"
    codes = pair.encode(audio)
    assert codes.shape == (3, 24, 7)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected)


def test_encode_ragged_rows(pair: Pair):
    frame = pair.config.frame_size
    audio = random_audio(3, 24 * frame - 5)
    lengths = np.array([4 * frame + 100, 24 * frame - 5, 3 * frame], np.int32)
    together = np.asarray(pair.encode(audio, lengths=lengths))
    for row, length in enumerate(lengths):
        frames = -(-length // frame)
        np.testing.assert_array_equal(together[row, :frames], pair.torch_encode(audio[row : row + 1, :length])[0])
        assert not together[row, frames:].any()
    # Without lengths, what follows a row's end changes its codes.
    assert (np.asarray(pair.encode(audio))[2, :3] != together[2, :3]).any()


@pytest.mark.parametrize("name", ["pair", "odd_pair"])
def test_decode_equals_torch(name: str, request: pytest.FixtureRequest):
    pair: Pair = request.getfixturevalue(name)
    codes = random_codes(pair, 3, 11)
    expected = pair.torch_decode(codes)
    assert 0.2 < expected.std() < 0.6, "expected neither silence nor saturation"
    audio = pair.decode(codes)
    assert audio.shape == (3, 11 * pair.config.frame_size)
    np.testing.assert_allclose(audio, expected, atol=TOLERANCE, rtol=0)


def test_snac_24khz_shape_equals_torch(real_pair: Pair):
    codes = random_codes(real_pair, 1, 4)
    np.testing.assert_allclose(real_pair.decode(codes), real_pair.torch_decode(codes), atol=TOLERANCE, rtol=0)
    audio = random_audio(1, 3 * 2048 + 1)
    np.testing.assert_array_equal(real_pair.encode(audio), real_pair.torch_encode(audio))


@pytest.mark.parametrize(
    ("num_rows", "frames", "groups"), [(5, 4, 2), (2, 16, 2), (2, 37, 8)], ids=["several rows", "whole rows", "windows"]
)
def test_decode_on_tpu_in_windows(pair: Pair, num_rows: int, frames: int, groups: int, monkeypatch: pytest.MonkeyPatch):
    """A few frames at a time, as a TPU decodes them: the same audio, of ragged rows too."""
    codes = random_codes(pair, num_rows, frames)
    lengths = None if frames == 16 else np.array([frames, frames - 3, 0, 1, frames // 2], np.int32)[:num_rows]
    expected = pair.decode(codes, lengths=lengths)
    monkeypatch.setattr(snac.sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(snac, "TPU_FRAMES", 16)
    program = jax.jit(pair.codec.decode).trace(codes, lengths=lengths)
    assert f" length={groups}\n" in str(program.jaxpr)
    audio = program.lower().compile()(codes, lengths=lengths)
    np.testing.assert_allclose(audio, expected, atol=TOLERANCE, rtol=0)


def test_decode_on_tpu_slice_keeps_rows_apart(odd_pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Every chip decodes its own rows, without asking the others."""
    codes = random_codes(odd_pair, 8, 4)
    lengths = np.array([4, 3, 0, 1] * 2, np.int32)
    expected = odd_pair.decode(codes, lengths=lengths)
    monkeypatch.setattr(snac.sharding, "platform", lambda: "tpu")
    graph, params = nnx.split(odd_pair.codec)
    with jax.set_mesh(mesh := make_mesh(data=4)):
        arguments = jax.device_put((codes, lengths), rows(mesh))
        program = jax.jit(lambda codes, lengths: nnx.merge(graph, params).decode(codes, lengths=lengths))
        compiled = program.lower(*arguments).compile()
        np.testing.assert_allclose(compiled(*arguments), expected, atol=TOLERANCE, rtol=0)
    text = compiled.as_text() or ""
    assert not any(kind in text for kind in COLLECTIVES)


def test_decode_ragged_rows(pair: Pair, codes: np.ndarray):
    frame = pair.config.frame_size
    lengths = np.array([5, 11, 0], np.int32)
    audio = np.asarray(pair.decode(codes, lengths=lengths))
    for row, length in enumerate(lengths[:2]):
        alone = pair.torch_decode(codes[row : row + 1, :length])[0]
        np.testing.assert_allclose(audio[row, : length * frame], alone, atol=TOLERANCE, rtol=0)
        assert not audio[row, length * frame :].any()
    assert not audio[2].any()
    # Without lengths, the frames beyond the end change samples before it.
    assert np.abs(np.asarray(pair.decode(codes))[0, : 5 * frame] - audio[0, : 5 * frame]).max() > 0.01
    # With lengths they change nothing, whatever they are.
    codes[0, 5:] = 2**31 - 1
    np.testing.assert_array_equal(pair.decode(codes, lengths=lengths)[0], audio[0])


def test_noise_weights_are_kept_and_never_applied(pair: Pair, codes: np.ndarray):
    params = pair.codec.params()
    names = [name for name in params if ".noise." in name]
    assert names == ["decoder.blocks.0.noise.weight", "decoder.blocks.1.noise.weight"]
    assert all(np.abs(params[name]).max() > 0.01 for name in names)
    louder = Snac.from_params(pair.config, {**params, **{name: 100 * params[name] for name in names}})
    np.testing.assert_array_equal(make_decoder(louder)(codes), pair.decode(codes))


def test_codec_without_noise_blocks(pair: Pair, codes: np.ndarray):
    config = dataclasses.replace(pair.config, noise=False)
    params = {name: value for name, value in pair.codec.params().items() if ".noise." not in name}
    codec = Snac.from_params(config, params)
    np.testing.assert_array_equal(make_decoder(codec)(codes), pair.decode(codes))


def test_sine_squared():
    x = np.concatenate([np.linspace(-20, 20, 100001), np.linspace(-1e4, 1e4, 100001)]).astype(np.float32)
    np.testing.assert_allclose(sine_squared(x), np.sin(x.astype(np.float64)) ** 2, atol=3e-7, rtol=0)
    slope = jax.vmap(jax.grad(sine_squared))(x)
    np.testing.assert_allclose(slope, np.sin(2 * x.astype(np.float64)), atol=1e-6, rtol=0)


def test_quantize_equals_torch(pair: Pair):
    latents = np.random.default_rng(0).standard_normal((2, 12, 48)).astype(np.float32)
    with torch.inference_mode():
        expected, books = pair.torch.quantizer(torch.from_numpy(latents).mT)
    quantized = jax.jit(pair.codec.quantize)(latents)
    np.testing.assert_allclose(quantized.latents, expected.mT.numpy(), atol=TOLERANCE, rtol=0)
    for slots, book in zip(FRAME_SLOTS, books, strict=True):
        np.testing.assert_array_equal(quantized.codes[..., slots].reshape(2, -1), book.numpy())


def test_quantize_losses_and_straight_through_gradient(pair: Pair):
    quantizer = pair.codec.quantizers[2]
    random = np.random.default_rng(0)
    latents, cotangent = random.standard_normal((2, 1, 4, 48)).astype(np.float32)
    # The gradient of the rounding is the identity, which leaves the two projections.
    gradient = jax.jit(lambda z, g: jax.vjp(lambda z: quantizer(z)[0], z)[1](g)[0])(latents, cotangent)
    matrix = np.asarray(quantizer.project_in.weight[...]) @ np.asarray(quantizer.project_out.weight[...])
    np.testing.assert_allclose(gradient, cotangent @ matrix.T, atol=TOLERANCE, rtol=0)

    graph, state = nnx.split(pair.codec)

    @jax.jit
    def losses(state: nnx.State, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantized = nnx.merge(graph, state).quantize(z)
        return quantized.commitment_loss, quantized.codebook_loss

    # Both losses are the same number; each has a gradient to one side only.
    values, pull = jax.vjp(losses, state, jnp.asarray(latents))
    assert values[0] == values[1] > 0
    of_state, of_latents = pull((1.0, 0.0))
    assert np.any(of_latents)
    assert not np.any(of_state["quantizers"][0]["codebook"][...])
    of_state, of_latents = pull((0.0, 1.0))
    assert np.any(of_state["quantizers"][0]["codebook"][...])
    assert not np.any(of_latents)


def test_training_gradient_reaches_every_parameter():
    config = CodecConfig(encoder_dim=4, encoder_rates=(4,), decoder_dim=8, decoder_rates=(4,), codebook_size=16)
    audio = jnp.asarray(random_audio(1, 8 * config.frame_size))
    graph, state = nnx.split(Snac(config, rngs=nnx.Rngs(0)))

    def loss(state: nnx.State) -> jax.Array:
        codec = nnx.merge(graph, state)
        quantized = codec.quantize(codec.encoder(audio[..., None]))
        error = jnp.mean((codec.decoder(quantized.latents) - audio) ** 2)
        return error + quantized.commitment_loss + quantized.codebook_loss

    gradients = jax.jit(jax.grad(loss))(state)
    for path, gradient in nnx.to_flat_state(gradients):
        name = ".".join(map(str, path))
        assert np.isfinite(gradient[...]).all(), name
        assert (".noise." in name) != bool(np.any(gradient[...])), name


def test_params_round_trip_and_names(pair: Pair):
    params = pair.codec.params()
    assert params["decoder.blocks.0.up.weight"].shape == (48, 16, 24)
    assert params["encoder.blocks.1.units.2.depthwise.weight"].shape == (7, 24)
    again = Snac.from_params(pair.config, params).params()
    assert list(again) == list(params)
    assert all((again[name] == params[name]).all() for name in params)


def test_from_params_lists_shape_mismatches(pair: Pair):
    params = pair.codec.params()
    del params["encoder.conv_in.bias"]
    params["decoder.snake.alpha"] = jnp.zeros((5,))
    params["unexpected"] = jnp.zeros(())
    with pytest.raises(ValueError, match="codec parameters") as error:
        Snac.from_params(pair.config, params)
    assert str(error.value).splitlines()[1:] == [
        "encoder.conv_in.bias: missing, expected (12,)",
        "decoder.snake.alpha: expected (12,), found (5,)",
        "unexpected: unknown, found ()",
    ]
