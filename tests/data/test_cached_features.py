"""Cached features: stored and read again, every version of every record, interrupted and continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_jax.audio.io import from_pcm16
from omni_jax.data import cached_features
from omni_jax.data.cached_features import (
    CachedFeatures,
    finish_features,
    num_shards,
    pack_features,
    unpack_features,
    write_features,
)
from omni_jax.data.records import INDEX, Exchange, Records, RecordWriter
from omni_jax.errors import PipelineError, RecordError

MAX_SAMPLES = 3200
FRAME = 320


def encode(audio: np.ndarray) -> np.ndarray:
    """Stands for an audio encoder: the first two samples of every frame."""
    return audio.reshape(len(audio), -1, FRAME)[:, :, :2]


def window(samples: int) -> int:
    return min(-(-samples // 1600) * 1600, MAX_SAMPLES)


def num_frames(samples: int) -> int:
    return -(-samples // FRAME)


def write(records: Records, folder: Path, shards: range, versions: int = 1) -> None:
    write_features(
        records,
        folder,
        shards,
        encode,
        max_samples=MAX_SAMPLES,
        window=window,
        num_frames=num_frames,
        versions=versions,
        dtype="float32",
    )


@pytest.fixture
def sounds() -> list[np.ndarray | None]:
    rng = np.random.default_rng(0)
    lengths = [700, None, MAX_SAMPLES, 1, MAX_SAMPLES + 1, *range(800, 840)]
    return [None if length is None else rng.integers(-9000, 9000, length).astype(np.int16) for length in lengths]


@pytest.fixture
def records(tmp_path: Path, sounds: list[np.ndarray | None]) -> Records:
    with RecordWriter(tmp_path / "records") as writer:
        for sound in sounds:
            writer.write(Exchange(question_text="q", question_audio=sound, answer_text="a"))
    return Records(tmp_path / "records")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_pack_features_round_trip(dtype: cached_features.FeatureDtype) -> None:
    features = np.random.default_rng(1).normal(size=(9, 64)).astype(np.float32) * np.logspace(-2, 2, 9)[:, None]
    features[4] = 0
    found = unpack_features(pack_features(2700, features, dtype))
    assert found is not None
    assert (found.samples, found.features.shape) == (2700, (9, 64))
    largest = np.abs(features).max(axis=1, keepdims=True)
    step = {"float32": 2.0**-24, "float16": 2.0**-11, "int8": 0.51 / 127 + 2.0**-11}[dtype]
    assert (np.abs(found.features.astype(np.float64) - features) <= step * largest + 1e-7).all()


@pytest.mark.parametrize("damaged", [b"", b"\x81\xa1a\x01", b"\xff"])
def test_unpack_features_refuses_damaged_entries(damaged: bytes) -> None:
    with pytest.raises(RecordError, match="expected an entry"):
        unpack_features(damaged)


def test_write_features_of_every_record(
    records: Records, sounds: list[np.ndarray | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_features, "SHARD_RECORDS", 10)
    write(records, tmp_path / "features", range(num_shards(records)))
    with pytest.raises(PipelineError, match="expected cached features"):
        CachedFeatures(tmp_path / "features")
    finish_features(records, tmp_path / "features", 1)
    cache = CachedFeatures(tmp_path / "features")
    for number, sound in enumerate(sounds):
        found = cache.read(number, 0)
        if sound is None:
            assert found is None
            continue
        assert found is not None
        assert found.samples == len(sound)
        if len(sound) > MAX_SAMPLES:
            assert found.features.shape == (0, 2)
            continue
        padded = np.zeros((1, window(len(sound))), np.float32)
        padded[0, : len(sound)] = from_pcm16(sound)
        np.testing.assert_array_equal(found.features, encode(padded)[0, : num_frames(len(sound))])


def test_write_features_encodes_recordings_of_similar_length_together(
    records: Records, sounds: list[np.ndarray | None], tmp_path: Path
) -> None:
    shapes = []

    def recorded(audio: np.ndarray) -> np.ndarray:
        shapes.append(audio.shape)
        return encode(audio)

    limits = {"max_samples": MAX_SAMPLES, "window": window, "num_frames": num_frames}
    write_features(records, tmp_path / "features", range(1), recorded, versions=1, dtype="float32", **limits)
    # Two full batches of short recordings, and the rest with the longest that fits.
    assert shapes == [(16, 1600), (16, 1600), (16, 3200)]
    finish_features(records, tmp_path / "features", 1)
    cache = CachedFeatures(tmp_path / "features")
    for number, sound in enumerate(sounds):
        found = cache.read(number, 0)
        assert (found is None) == (sound is None)
        if found is not None and sound is not None and found.samples <= MAX_SAMPLES:
            np.testing.assert_array_equal(
                found.features[0], from_pcm16(sound[:2]) if len(sound) > 1 else [from_pcm16(sound)[0], 0]
            )


def test_write_features_of_several_versions(records: Records, sounds: list[np.ndarray | None], tmp_path: Path) -> None:
    """The first is the recording as it is; the others differ from it and each other, and are the same next time."""
    found = []
    for name in ("one", "two"):
        write(records, tmp_path / name, range(1), versions=3)
        finish_features(records, tmp_path / name, 3)
        cache = CachedFeatures(tmp_path / name)
        assert cache.versions == 3
        assert [cache.read(1, version) for version in range(3)] == [None] * 3
        found.append([cache.read(0, version) for version in range(3)])
    first, second = ([entry.features for entry in entries if entry is not None] for entries in found)
    sound = sounds[0]
    assert sound is not None
    np.testing.assert_array_equal(first[0][0], from_pcm16(sound)[:2])
    assert not np.allclose(first[0][0], first[1][0])
    assert not np.allclose(first[1][0], first[2][0])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_write_features_continues_after_an_interruption(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_features, "SHARD_RECORDS", 10)
    write(records, tmp_path / "features", range(3))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    (tmp_path / "features" / ".00003.array_record.0.part").write_bytes(b"cut")
    write(records, tmp_path / "features", range(num_shards(records)))
    finish_features(records, tmp_path / "features", 1)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert len(after) == num_shards(records) + 1 == 6
    assert {name: after[name] for name in before} == before


def test_write_features_next_to_another_run(records: Records, tmp_path: Path) -> None:
    """Runs that share the features and start at the same time both get them."""
    folder, limits = tmp_path / "features", {"max_samples": MAX_SAMPLES, "window": window, "num_frames": num_frames}

    def slow(audio: np.ndarray) -> np.ndarray:
        if not (folder / INDEX).exists():
            write(records, folder, range(1))
            finish_features(records, folder, 1)
        return encode(audio)

    write_features(records, folder, range(1), slow, versions=1, dtype="float32", **limits)
    finish_features(records, folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.array_record", INDEX]
    assert CachedFeatures(folder).read(0, 0) is not None
