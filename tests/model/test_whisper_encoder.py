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
from omni_jax.model import whisper_encoder
from omni_jax.model.whisper_encoder import WhisperEncoder, attention, sinusoids
from tests.lazy import read_all, to_lazy

# 160 positions, where attention is in blocks, are one and a bit; every dimension differs from every other.
CONFIG = AudioEncoderConfig(num_mel_bins=20, hidden_size=48, num_layers=3, num_heads=4, intermediate_size=72, max_position=160)


@pytest.fixture(scope="module")
def reference():
    config = WhisperConfig(
        num_mel_bins=CONFIG.num_mel_bins,
        d_model=CONFIG.hidden_size,
        encoder_layers=CONFIG.layers,
        encoder_attention_heads=CONFIG.heads,
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
            rows = [params.pop(f"layers.{layer}.{name}") for layer in range(CONFIG.layers)]
            params[f"layers.{name}"] = np.stack(rows)
    model = WhisperEncoder(CONFIG, stacked=stacked, dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, slots = nnx.split(model)
    slots = nnx.to_flat_state(slots)
    assert {".".join(map(str, path)) for path, _ in slots} == set(params)
    for path, slot in slots:
        value = params[".".join(map(str, path))]
        assert slot[...].shape == value.shape
        slot[...] = jnp.asarray(value)
    return nnx.merge(graphdef, nnx.from_flat_state(slots))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("short_clip", [CONFIG.max_position, CONFIG.max_position - 1])
def test_encoder_is_whispers(reference, mel, stacked, short_clip, monkeypatch):
    monkeypatch.setattr(whisper_encoder, "SHORT_CLIP", short_clip)
    with torch.no_grad():
        expected = reference(torch.from_numpy(mel)).last_hidden_state.numpy()
    found = jax.jit(filled(reference, stacked=stacked))(mel)
    assert found.shape == (2, CONFIG.max_position, CONFIG.hidden_size)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_layouts_agree_and_share_their_seed(mel):
    one, other = (jax.jit(WhisperEncoder(CONFIG, stacked=stacked, rngs=nnx.Rngs(3)))(mel) for stacked in (False, True))
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)
    assert np.abs(one - jax.jit(WhisperEncoder(CONFIG, stacked=True, rngs=nnx.Rngs(4)))(mel)).max() > 0.1


@pytest.mark.parametrize("stacked", [False, True])
def test_bfloat16(reference, mel, stacked):
    exact = jax.jit(filled(reference, stacked=stacked))(mel)
    found = jax.jit(filled(reference, stacked=stacked, dtype=jnp.bfloat16))(mel)
    assert found.dtype == jnp.bfloat16
    difference = np.abs(found.astype(jnp.float32) - exact)
    assert 1e-4 < difference.mean() < 0.05  # eight bits of mantissa, three layers


def test_every_parameter_names_its_axes():
    expected = {
        "conv1.kernel": (None, "mels", "encoder_embed"),
        "conv1.bias": (None,),
        "conv2.kernel": (None, None, "encoder_embed"),
        "conv2.bias": (None,),
        "norm.scale": (None,),
        "norm.bias": (None,),
    }
    block = {
        "attention_norm.scale": (None,),
        "attention_norm.bias": (None,),
        "q.kernel": ("encoder_embed", "encoder_heads", None),
        "q.bias": ("encoder_heads", None),
        "k.kernel": ("encoder_embed", "encoder_heads", None),
        "v.kernel": ("encoder_embed", "encoder_heads", None),
        "v.bias": ("encoder_heads", None),
        "out.kernel": ("encoder_heads", None, "encoder_embed"),
        "out.bias": (None,),
        "ffn_norm.scale": (None,),
        "ffn_norm.bias": (None,),
        "up.kernel": ("encoder_embed", "encoder_mlp"),
        "up.bias": ("encoder_mlp",),
        "down.kernel": ("encoder_mlp", "encoder_embed"),
        "down.bias": (None,),
    }
    listed = {f"layers.{layer}.{name}": axes for layer in range(CONFIG.layers) for name, axes in block.items()}
    stacked = {f"layers.{name}": ("layers", *axes) for name, axes in block.items()}
    for layout, layers in ((False, listed), (True, stacked)):
        # Abstract: nothing is allocated, as when a checkpoint is about to fill the shapes.
        model = nnx.eval_shape(lambda layout=layout: WhisperEncoder(CONFIG, stacked=layout, rngs=nnx.Rngs(0)))
        found = {".".join(map(str, path)): slot for path, slot in nnx.to_flat_state(nnx.state(model))}
        assert {name: slot.axes for name, slot in found.items()} == expected | layers
        assert all(len(slot.axes) == len(slot.shape) for slot in found.values())
        assert all(slot.dtype == jnp.float32 for slot in found.values())


def test_initialised_under_jit():
    def init():
        return nnx.state(WhisperEncoder(CONFIG, stacked=True, rngs=nnx.Rngs(5)))

    eager, jitted = init(), jax.jit(init)()
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)


def test_initial_weights_have_unit_gain():
    model = WhisperEncoder(CONFIG, stacked=True, rngs=nnx.Rngs(0))
    D, F = CONFIG.hidden_size, CONFIG.intermediate_size
    kernels = {"q": D, "k": D, "v": D, "out": D, "up": D, "down": F}
    for name, fan_in in kernels.items():
        kernel = getattr(model.layers, name).kernel[...]
        np.testing.assert_allclose(kernel.std() * np.sqrt(fan_in), 1.0, atol=0.05)
        assert np.abs(kernel[0] - kernel[1]).max() > 0.01  # layers differ
    np.testing.assert_allclose(model.conv1.kernel[...].std() * np.sqrt(3 * CONFIG.num_mel_bins), 1.0, atol=0.05)


@pytest.mark.parametrize("positions", [1, 7, 512, 513, 600])
def test_attention_in_blocks_is_attention(positions):
    rng = np.random.default_rng(2)
    q, k, v = (2 * rng.normal(size=(2, positions, 3, 8)) for _ in range(3))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    found = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
def test_sinusoids_are_whispers(width, monkeypatch):
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


def test_wrong_shape():
    model = WhisperEncoder(CONFIG, stacked=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected mel as \[B, 20, 320\], found \(1, 20, 319\)"):
        model(jnp.zeros((1, 20, 319)))
