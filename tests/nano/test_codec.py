"""The codec's training, at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from nano import codec as codecs
from nano import run
from omni_jax.codec.snac import Snac
from omni_jax.config.model import CodecConfig

TINY = CodecConfig(
    encoder_dim=8, encoder_rates=(32, 16), decoder_dim=16, decoder_rates=(16, 32), codebook_size=16, noise=False
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to compute in a step."""
    for name, value in {"BATCH": 2, "CROP": 2, "FILL": 6, "VALIDATION": 1, "RESOLUTIONS": ((256, 20),)}.items():
        monkeypatch.setattr(codecs, name, value)


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """Shards as nano.synthesize writes them: tones that rise and fall."""
    folder = tmp_path / "made"
    (folder / "answers").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in codecs.PARTS:
        pieces, lines, start = [], [], 0
        for number in range(42):
            seconds = np.arange(int(rng.integers(8_000, 30_000))) / 24_000
            sound = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * seconds + 3 * np.sin(20 * seconds))
            entry = {"text": f"tone {number}", "kind": "answer", "engine": "none", "voice": "tone"}
            lines.append(json.dumps({**entry, "start": start, "samples": len(sound), "varied": {}}))
            pieces.append((sound * 32767).astype(np.int16))
            start += len(sound)
        soundfile.write(folder / f"{part}-00000.flac", np.concatenate(pieces), 24_000, subtype="PCM_16")
        (folder / f"{part}-00000.jsonl").write_text("\n".join(lines))
    return folder


def test_quantize_is_the_codecs_own():
    codec = Snac(TINY, rngs=nnx.Rngs(0))
    latents = jax.random.normal(jax.random.key(0), (2, 8, 32))
    ours, commitment, given = codecs.quantize(codec, latents, rounded=True)
    theirs = codec.quantize(latents)
    np.testing.assert_array_equal(ours, theirs.latents)
    np.testing.assert_allclose(commitment, theirs.commitment_loss, rtol=1e-6)
    slots = [np.asarray(codes).reshape(2, 2, -1) for _, codes in given]
    np.testing.assert_array_equal(slots[0][..., 0], theirs.codes[..., 0])
    np.testing.assert_array_equal(slots[1], theirs.codes[..., (1, 4)])
    np.testing.assert_array_equal(slots[2], theirs.codes[..., (2, 3, 5, 6)])


def test_unrounded_latents_pass_through_the_projections():
    codec = Snac(TINY, rngs=nnx.Rngs(0))
    latents = jax.random.normal(jax.random.key(0), (1, 4, 32))
    total, _, _ = codecs.quantize(codec, latents, rounded=False)
    expected, residual = 0, latents
    for quantizer in codec.quantizers:
        pooled = residual.reshape(1, -1, quantizer.stride, 32).mean(2)
        part = jnp.repeat(quantizer.project_out(quantizer.project_in(pooled)), quantizer.stride, axis=1)
        expected, residual = expected + part, residual - part
    np.testing.assert_allclose(total, expected, atol=1e-6)


def test_distance_is_zero_for_the_same_and_grows_with_noise():
    audio = 0.1 * jax.random.normal(jax.random.key(0), (2, 8192))
    noise = jax.random.normal(jax.random.key(1), (2, 8192))
    distances = [float(codecs.spectral_distance(audio + level * noise, audio)) for level in (0.0, 0.01, 0.1)]
    assert distances[0] == 0
    assert distances[0] < distances[1] < distances[2]


def test_magnitude_of_a_sine():
    # Amplitude 1 at the center of bin 32: half of it in that bin, a quarter in its neighbors under a Hann window.
    time = np.arange(4096)
    levels = np.asarray(codecs._magnitudes(jnp.asarray(np.sin(2 * np.pi * time * 32 / 512))[None], 512))
    np.testing.assert_allclose(levels[0, 10, 31:34], [0.25, 0.5, 0.25], atol=1e-3)


@pytest.mark.parametrize(("window", "mels"), codecs.RESOLUTIONS)
def test_every_mel_bin_is_a_mean_of_something(window: int, mels: int):
    filters = codecs.mel_filters(24_000, window, mels)
    assert filters.shape == (window // 2 + 1, mels)
    assert filters.min() >= 0
    np.testing.assert_allclose(filters.sum(0), 1, rtol=1e-5)
    assert np.all(np.diff(filters.argmax(0)) >= 0)


def test_codes_move_to_what_they_stand_for():
    usage = codecs.Usage(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    vectors = jnp.array([[3.0, 0.0], [5.0, 0.0], [0.0, 2.0]])
    usage, codebook = codecs.learn_codes(usage, vectors, jnp.array([0, 0, 1]), jax.random.key(0), jnp.array(True))
    # Code 0: 0.99 * 1 + 0.01 * (3 + 5) over 0.99 * 1 + 0.01 * 2.
    np.testing.assert_allclose(codebook, [[1.07 / 1.01, 0], [0, 1.01]], rtol=1e-5)
    np.testing.assert_allclose(usage.counts, [1.01, 1.0], rtol=1e-5)


@pytest.mark.parametrize("revive", [True, False])
def test_a_dead_code_is_revived(revive: bool):
    usage = codecs.Usage(jnp.array([1.0, 1e-3]), jnp.array([[1.0, 0.0], [0.0, 1e-3]]))
    vectors = jnp.full((3, 2), 7.0)
    _, codebook = codecs.learn_codes(usage, vectors, jnp.zeros(3, int), jax.random.key(0), jnp.array(revive))
    np.testing.assert_allclose(codebook[1], [7, 7] if revive else [0, 1], rtol=1e-5)


def test_k_means_finds_directions():
    rng = np.random.default_rng(0)
    directions = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    vectors = directions[rng.integers(0, 3, 300)] * rng.uniform(1, 2, (300, 1)) + 0.01 * rng.standard_normal((300, 2))
    # One start may put two centres into one cluster; of a few, one doesn't.
    found = [codecs.k_means(vectors.astype(np.float32), 3, np.random.default_rng(seed))[0] for seed in range(5)]
    best = max(found, key=lambda centres: np.max(directions @ centres.T, axis=1).min())
    np.testing.assert_allclose(np.max(directions @ best.T, axis=1), 1.5, atol=0.1)


@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_training_learns_resumes_and_exports(voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"config": TINY, "steps": 12, "unrounded": 4, "log_every": 2, "validate_every": 6, "save_seconds": 0}
    codecs.train(voice, tmp_path / "whole", **options)
    entries = run.metrics(tmp_path / "whole")
    distances = [entry["distance"] for entry in entries if "distance" in entry]
    assert distances[-1] < distances[0]
    assert [entry["step"] for entry in entries if "validation" in entry] == [6, 12]
    assert (tmp_path / "whole" / "curve.png").exists()

    codec = codecs.read(tmp_path / "whole" / "codec.safetensors", TINY)
    latents = np.zeros((1, 8, 32), np.float32)
    assert codec.quantize(latents).codes.shape == (1, 2, 7)

    # An interrupted run goes on as if nothing had been.
    saves = []
    save = run.save

    def save_and_stop(folder: Path, state: codecs.State) -> None:
        save(folder, state)
        saves.append(int(state.step))
        if len(saves) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        codecs.train(voice, tmp_path / "parts", **options)
    codecs.train(voice, tmp_path / "parts", **options)
    assert saves == list(range(1, 13))
    whole, parts = ((tmp_path / name / run.STATE).read_bytes() for name in ("whole", "parts"))
    assert whole == parts
