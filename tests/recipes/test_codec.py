"""The training of the codec, with a tiny configuration."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.checkpoint.safetensors_io import SafetensorsFile
from omni_jax.codec.snac import Snac
from omni_jax.config.model import CodecConfig
from recipes.nano import codec as codecs
from recipes.nano import training

pytestmark = pytest.mark.slow

TINY = CodecConfig(
    encoder_dim=8, encoder_rates=(32, 16), decoder_dim=16, decoder_rates=(16, 32), codebook_size=16, noise=False
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to compute in a step."""
    sizes = {"BATCH_SIZE": 2, "CROP_FRAMES": 2, "FILL_BATCHES": 6, "VALIDATION_BATCHES": 1, "RESOLUTIONS": ((256, 20),)}
    for name, value in sizes.items():
        monkeypatch.setattr(codecs, name, value)


@pytest.fixture(scope="module")
def voice() -> list[np.ndarray]:
    """Tones that rise and fall."""
    rng, tones = np.random.default_rng(0), []
    for _ in range(84):
        seconds = np.arange(int(rng.integers(8_000, 30_000))) / 24_000
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * seconds + 3 * np.sin(20 * seconds))
        tones.append((tone * 32767).astype(np.int16))
    return tones


def test_quantize_matches_snac():
    codec = Snac(TINY, rngs=nnx.Rngs(0))
    latents = jax.random.normal(jax.random.key(0), (2, 8, 32))
    ours, commitment, given = codecs.quantize(codec, latents, quantized=True)
    theirs = codec.quantize(latents)
    np.testing.assert_array_equal(ours, theirs.latents)
    np.testing.assert_allclose(commitment, theirs.commitment_loss, rtol=1e-6)
    slots = [np.asarray(codes).reshape(2, 2, -1) for _, codes in given]
    np.testing.assert_array_equal(slots[0][..., 0], theirs.codes[..., 0])
    np.testing.assert_array_equal(slots[1], theirs.codes[..., (1, 4)])
    np.testing.assert_array_equal(slots[2], theirs.codes[..., (2, 3, 5, 6)])


def test_quantize_unquantized_passes_through_projections():
    codec = Snac(TINY, rngs=nnx.Rngs(0))
    latents = jax.random.normal(jax.random.key(0), (1, 4, 32))
    total, _, _ = codecs.quantize(codec, latents, quantized=False)
    expected, residual = 0, latents
    for quantizer in codec.quantizers:
        pooled = residual.reshape(1, -1, quantizer.stride, 32).mean(2)
        part = jnp.repeat(quantizer.project_out(quantizer.project_in(pooled)), quantizer.stride, axis=1)
        expected, residual = expected + part, residual - part
    np.testing.assert_allclose(total, expected, atol=1e-6)


def test_spectral_distance_grows_with_noise():
    audio = 0.1 * jax.random.normal(jax.random.key(0), (2, 8192))
    noise = jax.random.normal(jax.random.key(1), (2, 8192))
    distances = [float(codecs.spectral_distance(audio + level * noise, audio)) for level in (0.0, 0.01, 0.1)]
    assert distances[0] == 0
    assert distances[0] < distances[1] < distances[2]


def test_magnitudes_of_a_sine():
    # Amplitude 1 at the center of bin 32: half of it in that bin, a quarter in its neighbors under a Hann window.
    time = np.arange(4096)
    levels = np.asarray(codecs._magnitudes(jnp.asarray(np.sin(2 * np.pi * time * 32 / 512))[None], 512))
    np.testing.assert_allclose(levels[0, 10, 31:34], [0.25, 0.5, 0.25], atol=1e-3)


@pytest.mark.parametrize(("window", "mels"), codecs.RESOLUTIONS)
def test_mel_filters_sum_to_one(window: int, mels: int):
    filters = codecs.mel_filters(24_000, window, mels)
    assert filters.shape == (window // 2 + 1, mels)
    assert filters.min() >= 0
    np.testing.assert_allclose(filters.sum(0), 1, rtol=1e-5)
    assert np.all(np.diff(filters.argmax(0)) >= 0)


def test_update_codebook_moves_codes_to_their_inputs():
    usage = codecs.Usage(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    vectors = jnp.array([[3.0, 0.0], [5.0, 0.0], [0.0, 2.0]])
    usage, codebook = codecs.update_codebook(usage, vectors, jnp.array([0, 0, 1]), jax.random.key(0), jnp.array(True))
    # Code 0: 0.99 * 1 + 0.01 * (3 + 5) over 0.99 * 1 + 0.01 * 2.
    np.testing.assert_allclose(codebook, [[1.07 / 1.01, 0], [0, 1.01]], rtol=1e-5)
    np.testing.assert_allclose(usage.counts, [1.01, 1.0], rtol=1e-5)


@pytest.mark.parametrize("revive", [True, False])
def test_update_codebook_revives_rare_codes(revive: bool):
    usage = codecs.Usage(jnp.array([1.0, 1e-3]), jnp.array([[1.0, 0.0], [0.0, 1e-3]]))
    vectors = jnp.full((3, 2), 7.0)
    _, codebook = codecs.update_codebook(usage, vectors, jnp.zeros(3, int), jax.random.key(0), jnp.array(revive))
    np.testing.assert_allclose(codebook[1], [7, 7] if revive else [0, 1], rtol=1e-5)


def test_k_means_finds_directions():
    rng = np.random.default_rng(0)
    directions = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    vectors = directions[rng.integers(0, 3, 300)] * rng.uniform(1, 2, (300, 1)) + 0.01 * rng.standard_normal((300, 2))
    # One start may put two centers into one cluster; of a few, one doesn't.
    found = [codecs.k_means(vectors.astype(np.float32), 3, np.random.default_rng(seed))[0] for seed in range(5)]
    best = max(found, key=lambda centers: np.max(directions @ centers.T, axis=1).min())
    np.testing.assert_allclose(np.max(directions @ best.T, axis=1), 1.5, atol=0.1)


@pytest.mark.nightly
@pytest.mark.usefixtures("small")
def test_train_reduces_loss_resumes_and_exports(
    voice: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intervals = training.Intervals(log_steps=2, eval_steps=6, save_seconds=0)

    def train(out: Path) -> None:
        codecs.train(voice, out, config=TINY, steps=12, unquantized_steps=4, intervals=intervals)

    train(tmp_path / "whole")
    entries = training.read_metrics(tmp_path / "whole")
    distances = [entry["distance"] for entry in entries if "distance" in entry]
    assert distances[-1] < distances[0]
    assert [entry["step"] for entry in entries if "validation" in entry] == [6, 12]
    assert (tmp_path / "whole" / "curve.png").exists()
    file = SafetensorsFile(tmp_path / "whole" / codecs.CODEC)
    codec = Snac.from_params(TINY, {name: file.read(name).astype(np.float32) for name in file.tensors})
    assert codec.quantize(np.zeros((1, 8, 32), np.float32)).codes.shape == (1, 2, 7)

    make = codecs.Crops.batch

    def interrupted(crops: codecs.Crops, size: int, seed: list[int]) -> np.ndarray:
        if seed[1:] == [0, 7]:
            raise KeyboardInterrupt
        return make(crops, size, seed)

    with monkeypatch.context() as patch:
        patch.setattr(codecs.Crops, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "resumed")
    train(tmp_path / "resumed")
    assert training.read_metrics(tmp_path / "resumed")[-1]["step"] == 12
    whole, resumed = ((tmp_path / name / codecs.CODEC).read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
