import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from omni_jax.audio import features

SECONDS = np.arange(480_000) / 16_000
RNG = np.random.default_rng(0)
CLIPS = {
    "noise": 0.1 * RNG.normal(size=480_000),
    "quiet noise": 1e-4 * RNG.normal(size=480_000),
    "sine": 0.5 * np.sin(2 * np.pi * 440 * SECONDS),
    "short clip": 0.1 * RNG.normal(size=20_000),
    "odd length": 0.1 * RNG.normal(size=12_345),
    "short sine": 0.9 * np.sin(2 * np.pi * 1000 * SECONDS[:16_000]),
    "offset": 0.5 + 0.1 * np.sin(2 * np.pi * 200 * SECONDS[:80_000]),
    "silence": np.zeros(480_000),
}


@pytest.fixture(scope="module")
def log_mel():
    return jax.jit(features.log_mel, static_argnames="mels")


@pytest.mark.parametrize("name", CLIPS)
def test_log_mel_is_whispers(log_mel, name):
    clip = CLIPS[name].astype(np.float32)
    expected = WhisperFeatureExtractor()(clip, sampling_rate=16_000, return_tensors="np")["input_features"]
    found = log_mel(features.pad(clip, 480_000)[None])
    assert found.shape == (1, 80, 3000)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_batch_and_mel_bins(log_mel):
    clips = [CLIPS[name].astype(np.float32) for name in ("noise", "quiet noise", "short sine")]
    extractor = WhisperFeatureExtractor(feature_size=128)
    expected = extractor(clips, sampling_rate=16_000, return_tensors="np")["input_features"]
    found = log_mel(np.stack([features.pad(clip, 480_000) for clip in clips]), mels=128)
    assert found.shape == (3, 128, 3000)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [201, 479, 480, 16_001])
def test_any_length(samples):
    clip = CLIPS["noise"][:samples].astype(np.float32)
    expected = WhisperFeatureExtractor()(
        clip, sampling_rate=16_000, return_tensors="np", padding=False, truncation=False
    )["input_features"]
    found = features.log_mel(jnp.asarray(clip)[None])
    assert found.shape == (1, 80, samples // 160)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_log_mel_by_hand():
    # A sine at the 5th Fourier frequency (200 Hz) under a Hann window: magnitude 400 / 4 at frequency 5,
    # half of that at its neighbours, nothing elsewhere.
    clip = np.sin(2 * np.pi * 200 * SECONDS[:16_000]).astype(np.float32)
    power = np.zeros(201)
    power[[4, 5, 6]] = np.array([0.25, 1.0, 0.25]) * 100**2
    level = np.log10(np.maximum(power @ features.mel_filters(80), 1e-10))
    loudest = level.max()
    found = features.log_mel(jnp.asarray(clip)[None])[0, :, 50]
    strong = level > loudest - 4
    assert strong.sum() >= 3
    np.testing.assert_allclose(found[strong], (level[strong] + 4) / 4, atol=1e-4)
    np.testing.assert_allclose(found.max() - found.min(), 2.0, atol=1e-4)  # 80 dB are 2


@pytest.mark.parametrize("mels", [80, 128])
def test_mel_filters(mels):
    expected = WhisperFeatureExtractor(feature_size=mels).mel_filters
    np.testing.assert_allclose(features.mel_filters(mels), expected, atol=1e-7)


@pytest.mark.parametrize("shape", [(16_000,), (1, 200), (1, 2, 16_000)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"expected audio as \[B, samples\]"):
        features.log_mel(jnp.zeros(shape))


def test_pad():
    np.testing.assert_array_equal(features.pad(np.array([1.0, 2.0]), 4), np.array([1, 2, 0, 0], np.float32))
    assert features.pad(np.ones((2, 3), np.float32), 5).shape == (2, 5)
    assert features.pad(np.ones(4, np.float32), 4).dtype == np.float32
    with pytest.raises(ValueError, match="at most 3 samples to pad, found 4"):
        features.pad(np.ones(4, np.float32), 3)
