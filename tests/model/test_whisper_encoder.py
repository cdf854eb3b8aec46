from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import WhisperConfig
from transformers.models.whisper import modeling_whisper

from omni_jax.config.model import AudioEncoderConfig
from omni_jax.convert.whisper import from_transformers
from omni_jax.model import attention
from omni_jax.model.whisper_encoder import WhisperEncoder, recording_frames, sinusoids
from omni_jax.prompts import speech_positions
from tests.lazy import read_all, to_lazy

# 160 positions, where attention is in blocks, are one and a bit; every dimension differs from every other.
CONFIG = AudioEncoderConfig(
    num_mel_bins=20, hidden_size=48, num_layers=3, num_heads=4, intermediate_size=72, max_position=160
)


@pytest.fixture(scope="module")
def reference():
    config = WhisperConfig(
        num_mel_bins=CONFIG.num_mel_bins,
        d_model=CONFIG.hidden_size,
        encoder_layers=CONFIG.num_layers,
        encoder_attention_heads=CONFIG.num_heads,
        encoder_ffn_dim=CONFIG.intermediate_size,
        max_source_positions=CONFIG.max_position,
    )
    torch.manual_seed(0)
    encoder = modeling_whisper.WhisperEncoder(config).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name != "embed_positions.weight":
                # Norm scales start at one and biases at zero: move them all, so that none can be forgotten.
                parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


@pytest.fixture(scope="module")
def mel():
    return np.random.default_rng(1).normal(size=(2, CONFIG.num_mel_bins, 2 * CONFIG.max_position)).astype(np.float32)


def filled(reference, *, stacked, dtype=jnp.float32):
    """Our encoder with the reference's weights."""
    state = {f"encoder.{name}": tensor.numpy() for name, tensor in reference.state_dict().items()}
    params = read_all(from_transformers(to_lazy(state), CONFIG))
    if stacked:
        first = [name.removeprefix("layers.0.") for name in params if name.startswith("layers.0.")]
        for name in first:
            rows = [params.pop(f"layers.{layer}.{name}") for layer in range(CONFIG.num_layers)]
            params[f"layers.{name}"] = np.stack(rows)
    model = WhisperEncoder(CONFIG, stacked=stacked, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    variables = nnx.to_flat_state(state)
    assert {".".join(map(str, path)) for path, _ in variables} == set(params)
    for path, variable in variables:
        value = params[".".join(map(str, path))]
        assert variable[...].shape == value.shape
        variable[...] = jnp.asarray(value)
    return nnx.merge(graph, nnx.from_flat_state(variables))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("max_unblocked", [CONFIG.max_position, CONFIG.max_position - 1])
def test_encoder_equals_transformers(reference, mel, stacked, max_unblocked, monkeypatch):
    monkeypatch.setattr(attention, "MAX_UNBLOCKED", max_unblocked)
    with torch.no_grad():
        expected = reference(torch.from_numpy(mel)).last_hidden_state.numpy()
    found = jax.jit(filled(reference, stacked=stacked))(mel)
    assert found.shape == (2, CONFIG.max_position, CONFIG.hidden_size)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_stacked_and_separate_layers_agree(mel):
    one, other = (jax.jit(WhisperEncoder(CONFIG, stacked=stacked, rngs=nnx.Rngs(3)))(mel) for stacked in (False, True))
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)
    assert np.abs(one - jax.jit(WhisperEncoder(CONFIG, stacked=True, rngs=nnx.Rngs(4)))(mel)).max() > 0.1


@pytest.mark.parametrize("stacked", [False, True])
def test_encoder_in_bfloat16(reference, mel, stacked):
    exact = jax.jit(filled(reference, stacked=stacked))(mel)
    found = jax.jit(filled(reference, stacked=stacked, dtype=jnp.bfloat16))(mel)
    assert found.dtype == jnp.bfloat16
    difference = np.abs(found.astype(jnp.float32) - exact)
    assert 1e-4 < difference.mean() < 0.05  # eight bits of mantissa, three layers


def masked_encoder(*, stacked: bool) -> WhisperEncoder:
    encoder = WhisperEncoder(replace(CONFIG, mask_padding=True), stacked=stacked, rngs=nnx.Rngs(3))
    encoder.positions[...] = jnp.asarray(sinusoids(CONFIG.max_position, CONFIG.hidden_size))
    return encoder


@pytest.mark.parametrize("stacked", [False, True])
def test_masked_encoder_does_not_depend_on_the_window(mel, stacked):
    """Recordings of 1, 20 and 38 positions in windows of 40, 41, 80 and all; noise where padding is makes it strict."""
    encode = jax.jit(masked_encoder(stacked=stacked))
    frames = np.array([1, 20, 38])
    mel = np.concatenate([mel, mel[:1] + 1])
    found = {window: encode(mel[:, :, : 2 * window], frames) for window in (40, 41, 80, CONFIG.max_position)}
    for window, features in found.items():
        assert features.shape == (3, window, CONFIG.hidden_size)
        for row, count in enumerate(frames):
            np.testing.assert_allclose(features[row, :count], found[40][row, :count], atol=2e-5)
            assert np.abs(features[row, :count]).min(axis=1).max() > 0
            assert not np.any(features[row, count:])
    other = encode(mel + np.where(np.arange(mel.shape[2]) > 2 * 38 + 2, 1, 0).astype(np.float32), frames)
    np.testing.assert_allclose(other, found[CONFIG.max_position], atol=2e-5)


def test_masked_encoder_of_a_full_recording_is_whisper(mel):
    full = np.full(2, CONFIG.max_position)
    expected = WhisperEncoder(CONFIG, stacked=False, rngs=nnx.Rngs(3))(mel)
    np.testing.assert_allclose(masked_encoder(stacked=False)(mel, full), expected, atol=1e-5)


def test_recording_frames_ignores_zeros_at_the_end():
    audio = np.zeros((6, 3200), np.float32)
    for row, length in enumerate((0, 1, 319, 320, 3199, 3200)):
        audio[row, :length] = 1
    audio[3, 5:100] = 0
    expected = [speech_positions(length, 100) for length in (0, 1, 319, 320, 3199, 3200)]
    assert jax.jit(recording_frames)(audio).tolist() == expected


def test_windows_hold_recordings():
    config = replace(CONFIG, max_position=500, mask_padding=True)
    assert [
        config.window(samples) for samples in (0, 123 * 320 - 1, 124 * 320, 248 * 320 + 319, 249 * 320, 160_000)
    ] == [
        125,
        125,
        250,
        250,
        500,
        500,
    ]
    assert config.windows == (125, 250, 500)
    assert CONFIG.windows == (CONFIG.max_position,)
    assert CONFIG.window(0) == CONFIG.max_position


@pytest.mark.parametrize("T", [0, CONFIG.max_position - 1, CONFIG.max_position + 1])
def test_encoder_refuses_other_lengths(T):
    mel = np.zeros((1, CONFIG.num_mel_bins, 2 * T), np.float32)
    with pytest.raises(ValueError, match=r"expected mel as \[B, 20, 320\], found"):
        WhisperEncoder(CONFIG, stacked=False, rngs=nnx.Rngs(3))(mel)


def test_parameters_have_logical_axes():
    expected = {
        "conv1.weight": (None, "mels", "encoder_embed"),
        "conv1.bias": (None,),
        "conv2.weight": (None, None, "encoder_embed"),
        "conv2.bias": (None,),
        "positions": (None, None),
        "norm.scale": (None,),
        "norm.bias": (None,),
    }
    block = {
        "attention_norm.scale": (None,),
        "attention_norm.bias": (None,),
        "q.weight": ("encoder_heads", None, "encoder_embed"),
        "q.bias": ("encoder_heads", None),
        "k.weight": ("encoder_heads", None, "encoder_embed"),
        "v.weight": ("encoder_heads", None, "encoder_embed"),
        "v.bias": ("encoder_heads", None),
        "out.weight": ("encoder_embed", "encoder_heads", None),
        "out.bias": (None,),
        "mlp_norm.scale": (None,),
        "mlp_norm.bias": (None,),
        "up.weight": ("encoder_mlp", "encoder_embed"),
        "up.bias": ("encoder_mlp",),
        "down.weight": ("encoder_embed", "encoder_mlp"),
        "down.bias": (None,),
    }
    listed = {f"layers.{layer}.{name}": axes for layer in range(CONFIG.num_layers) for name, axes in block.items()}
    stacked = {f"layers.{name}": ("layers", *axes) for name, axes in block.items()}
    for layout, layers in ((False, listed), (True, stacked)):
        # Abstract: nothing is allocated, as when a checkpoint is about to fill the shapes.
        model = nnx.eval_shape(lambda layout=layout: WhisperEncoder(CONFIG, stacked=layout, rngs=nnx.Rngs(0)))
        found = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
        assert {name: variable.axes for name, variable in found.items()} == expected | layers
        assert all(len(variable.axes) == len(variable.shape) for variable in found.values())
        assert all(variable.dtype == jnp.float32 for variable in found.values())


def test_encoder_can_be_initialized_under_jit():
    def init():
        return nnx.state(WhisperEncoder(CONFIG, stacked=True, rngs=nnx.Rngs(5)))

    eager, jitted = init(), jax.jit(init)()
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)


def test_initial_weights_have_unit_gain():
    model = WhisperEncoder(CONFIG, stacked=True, rngs=nnx.Rngs(0))
    D, F = CONFIG.hidden_size, CONFIG.intermediate_size
    fan_ins = {"q": D, "k": D, "v": D, "out": D, "up": D, "down": F}
    for name, fan_in in fan_ins.items():
        weight = getattr(model.layers, name).weight[...]
        np.testing.assert_allclose(weight.std() * np.sqrt(fan_in), 1.0, atol=0.05)
        assert np.abs(weight[0] - weight[1]).max() > 0.01  # layers differ
    np.testing.assert_allclose(model.conv1.weight[...].std() * np.sqrt(3 * CONFIG.num_mel_bins), 1.0, atol=0.05)


@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
def test_sinusoids_equal_transformers(width, monkeypatch):
    exp = torch.exp
    # On some processors torch's float32 exp misses the last bit, which the position multiplies by up to 1500.
    monkeypatch.setattr(torch, "exp", lambda x: exp(x.double()).float())
    np.testing.assert_allclose(sinusoids(1500, width), modeling_whisper.sinusoids(1500, width), atol=1e-5)


def test_sinusoids_by_hand():
    np.testing.assert_allclose(
        sinusoids(3, 4),
        [
            [0, 0, 1, 1],
            [np.sin(1), np.sin(1e-4), np.cos(1), np.cos(1e-4)],
            [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)],
        ],
        atol=1e-6,
    )


def test_encoder_refuses_another_shape():
    model = WhisperEncoder(CONFIG, stacked=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected mel as \[B, 20, 320\], found \(1, 20, 319\)"):
        model(jnp.zeros((1, 20, 319)))
