import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from omni_jax.audio import features
from omni_jax.config.run import SpecAugmentConfig

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
def test_log_mel_equals_whisper(log_mel, name):
    clip = CLIPS[name].astype(np.float32)
    expected = WhisperFeatureExtractor()(clip, sampling_rate=16_000, return_tensors="np")["input_features"]
    found = log_mel(features.pad(clip, 480_000)[None])
    assert found.shape == (1, 80, 3000)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_log_mel_of_batch_with_128_bins(log_mel):
    clips = [CLIPS[name].astype(np.float32) for name in ("noise", "quiet noise", "short sine")]
    extractor = WhisperFeatureExtractor(feature_size=128)
    expected = extractor(clips, sampling_rate=16_000, return_tensors="np")["input_features"]
    found = log_mel(np.stack([features.pad(clip, 480_000) for clip in clips]), mels=128)
    assert found.shape == (3, 128, 3000)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [201, 479, 480, 16_001])
def test_log_mel_of_any_length(samples):
    clip = CLIPS["noise"][:samples].astype(np.float32)
    expected = WhisperFeatureExtractor()(
        clip, sampling_rate=16_000, return_tensors="np", padding=False, truncation=False
    )["input_features"]
    found = features.log_mel(jnp.asarray(clip)[None])
    assert found.shape == (1, 80, samples // 160)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_log_mel_of_sine():
    # A sine at the 5th Fourier frequency (200 Hz) under a Hann window: magnitude 400 / 4 at frequency 5,
    # half of that at its neighbors, nothing elsewhere.
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
def test_log_mel_rejects_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"expected audio as \[B, samples\]"):
        features.log_mel(jnp.zeros(shape))


def test_spec_augment_warp_interpolates_between_bins():
    mel = np.asarray(jax.random.normal(jax.random.key(0), (4, 80, 30)))
    ramp = np.broadcast_to(np.arange(80.0, dtype=np.float32)[:, None], (80, 30))
    config = SpecAugmentConfig(max_warp=0.3, num_masks=0)
    augment = jax.jit(features.spec_augment, static_argnums=2)
    # Applied to a ramp, it returns the bins that it reads at.
    sources = np.asarray(augment(np.broadcast_to(ramp, mel.shape), jax.random.key(1), config))[:, :, 0]
    factors = sources[:, 1]
    assert len({*factors.tolist()}) == 4
    assert np.all(np.abs(factors - 1) <= 0.3)
    assert np.ptp(factors) > 0.1
    np.testing.assert_allclose(sources, np.minimum(factors[:, None] * np.arange(80), 79), rtol=1e-4)
    augmented = np.asarray(augment(mel, jax.random.key(1), config))
    for row, original, source in zip(augmented, mel, sources, strict=True):
        expected = [np.interp(source, np.arange(80), original[:, frame]) for frame in range(30)]
        np.testing.assert_allclose(row, np.stack(expected, 1), atol=1e-4)


def test_spec_augment_masks_stripes_with_mean():
    mel = np.asarray(jax.random.normal(jax.random.key(0), (8, 80, 300)))
    config = SpecAugmentConfig(max_warp=0.0, num_masks=2, max_time_mask=10, max_mel_mask=12)
    augmented = np.asarray(features.spec_augment(mel, jax.random.key(2), config))
    changed = augmented != mel
    frames, bins = changed.all(1).sum(1), changed.all(2).sum(1)
    assert frames.max() <= 2 * 10 + 2
    assert bins.max() <= 2 * 12 + 2
    assert frames.min() < frames.max()
    assert frames.max() > 4
    assert bins.max() > 4
    for row in range(8):
        expected = changed[row].all(0)[None, :] | changed[row].all(1)[:, None]
        np.testing.assert_array_equal(changed[row], expected)
        np.testing.assert_allclose(augmented[row][changed[row]], mel[row].mean(), atol=1e-5)
    same = features.spec_augment(mel, jax.random.key(2), SpecAugmentConfig(max_warp=0.0, num_masks=0))
    np.testing.assert_allclose(same, mel, atol=1e-6)


def test_pad():
    np.testing.assert_array_equal(features.pad(np.array([1.0, 2.0]), 4), np.array([1, 2, 0, 0], np.float32))
    assert features.pad(np.ones((2, 3), np.float32), 5).shape == (2, 5)
    assert features.pad(np.ones(4, np.float32), 4).dtype == np.float32
    with pytest.raises(ValueError, match="at most 3 samples to pad, found 4"):
        features.pad(np.ones(4, np.float32), 3)
