"""Training on cached features of the audio encoder is training on the recordings."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.checkpoint.release import Release, open_release
from omni_jax.config.load import build_config, to_dict
from omni_jax.config.run import RunConfig, SourceConfig
from omni_jax.data.examples import RecordsOfTask
from omni_jax.data.pipeline import batches, held_out
from omni_jax.data.records import Exchange, Records, RecordWriter
from omni_jax.errors import ConfigError
from omni_jax.tasks import Task
from omni_jax.training import feature_cache
from omni_jax.training.feature_cache import open_caches, open_held_out_caches
from omni_jax.training.setup import TrainingSetup
from omni_jax.training.step import adapt, encode_audio, forward
from tests import models


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    config = models.tiny_config()
    folder = tmp_path_factory.mktemp("release") / "stacking"
    models.release_folder(folder, replace(config, adapter=replace(config.adapter, stack=3)))
    return open_release(folder)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "noise"
    rng = np.random.default_rng(0)
    with RecordWriter(folder) as writer:
        for number, length in enumerate([321, 320, 319, 32_000, 31_999, *range(4000, 16_000, 1000)]):
            sound = rng.integers(-3000, 3000, length).astype(np.int16)
            writer.write(Exchange(question_text=f"q{number}", question_audio=sound, answer_text=f"a{number}"))
    return folder


def setup(release: Release, records: Path, out: Path, **cache: Any) -> TrainingSetup:
    values = {
        "out": str(out / "run"),
        "start": str(release.folder),
        "trainable": ["adapter"],
        "data": {
            "sources": [{"path": str(records)}],
            "tasks": {"A1T1": 1, "T1T2": 1},
            "batch_size": 8,
            "max_length": 128,
            "max_clips": 4,
            "num_workers": 0,
            "cached_features": {"path": str(out / "features"), "dtype": "float32", **cache},
        },
        "optimizer": {"steps": 2, "peak_lr": 1e-3},
        "dtype": "float32",
    }
    return TrainingSetup.of(build_config(RunConfig, values, "test"))


def test_cached_features_give_the_embeddings_of_the_recordings(release: Release, records: Path, tmp_path: Path) -> None:
    run = setup(release, records, tmp_path)
    config, tokenizer = run.start.config, run.start.tokenizer
    cached = batches(run.config.data, config, tokenizer, seed=0, caches=open_caches(run))
    plain = batches(replace(run.config.data, cached_features=None), config, tokenizer, seed=0)
    model = release.load_model(stacked=False, dtype=jnp.float32)
    for _ in range(3):
        features, sounds = next(cached), next(plain)
        assert "sound" not in features
        assert "features" not in sounds
        for name in sounds.keys() - {"sound"}:
            np.testing.assert_array_equal(features[name], sounds[name])
        used = np.unique(features["speech_index"][features["speech_index"] >= 0])
        assert len(used) > 20
        rows = features["speech_index"].max(axis=1) >= 0
        assert rows.any()
        for row in np.flatnonzero(rows):
            index = np.unique(features["speech_index"][row])[1:]
            found = adapt(model, jnp.asarray(features["features"][row : row + 1]))[0, index]
            expected = encode_audio(model, jnp.asarray(sounds["sound"][row : row + 1]))[0, index]
            np.testing.assert_allclose(found, expected, atol=2e-5)
        losses = [
            forward(model, {name: jnp.asarray(array) for name, array in batch.items()}, jnp.ones(8), run.config)[0]
            for batch in (features, sounds)
        ]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_held_out_recordings_are_cached_without_augmentation(release: Release, records: Path, tmp_path: Path) -> None:
    run = setup(release, records, tmp_path, versions=2)
    data = replace(run.config.data, held_out=(SourceConfig(str(records)), SourceConfig(str(records), tasks=("T1T2",))))
    run = replace(run, config=replace(run.config, data=data))
    caches = open_held_out_caches(run)
    assert caches is not None
    assert caches[0] is not None
    assert caches[0].versions == 1
    assert caches[1] is None
    cached, plain = (list(held_out(data, run.start.config, run.start.tokenizer, caches=of)) for of in (caches, None))
    assert len(cached) == len(plain) > 0
    for features, sounds in zip(cached, plain, strict=True):
        assert "sound" not in features
        for name in sounds.keys() - {"sound"}:
            np.testing.assert_array_equal(features[name], sounds[name])
    assert (
        open_held_out_caches(replace(run, config=replace(run.config, data=replace(data, cached_features=None)))) is None
    )


def test_caches_are_shared_by_runs_with_the_same_audio_encoder(
    release: Release, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[tuple[dict[str, Any], int]] = [
        ({}, 1),
        ({}, 0),
        ({"versions": 2}, 1),
        ({"dtype": "int8"}, 1),
        ({"dtype": "int8"}, 0),
    ]
    with caplog.at_level(logging.INFO, feature_cache.__name__):
        for changes, computed in runs:
            caplog.clear()
            caches = open_caches(setup(release, records, tmp_path, **changes))
            assert len(caplog.records) == computed
            assert caches is not None
            assert caches[0] is not None
            assert caches[0].versions == changes.get("versions", 1)


def test_sources_of_text_have_no_cache_and_the_encoder_is_made_once(
    release: Release, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    make = feature_cache.make_encoder
    monkeypatch.setattr(feature_cache, "make_encoder", lambda *of: made.append(of) or make(*of))
    run = setup(release, records, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(records, other)
    spoken, written = SourceConfig(str(records)), SourceConfig(str(records), tasks=("T1T2",))
    data = replace(run.config.data, sources=(spoken, written, SourceConfig(str(other))))
    caches = open_caches(replace(run, config=replace(run.config, data=data)))
    assert caches is not None
    assert [cache is None for cache in caches] == [False, True, False]
    assert len(made) == 1


def test_every_version_is_drawn_for_tasks_with_audio(release: Release, records: Path, tmp_path: Path) -> None:
    caches = open_caches(setup(release, records, tmp_path, versions=3))
    assert caches is not None
    folder = Records(records)
    spoken = RecordsOfTask(folder, Task.A1T1, 0, caches[0])
    assert len(spoken) == 3 * len(folder)
    drawn = [spoken[index] for index in range(len(spoken))]
    assert {each.record for each in drawn} == set(range(len(folder)))
    features = [each.features.features.tobytes() for each in drawn if each.features is not None]
    # Augmentation may make the longest recordings longer than the audio encoder takes.
    too_long = features.count(b"")
    assert len(features) == len(spoken)
    assert too_long <= 4
    assert len(set(features) - {b""}) == len(spoken) - too_long
    assert len(RecordsOfTask(folder, Task.T1T2, 0, caches[0])) == len(folder)


def test_cached_features_need_trained_weights(records: Path, release: Release, tmp_path: Path) -> None:
    run = setup(release, records, tmp_path)
    random = TrainingSetup.of(replace(run.config, start="preset:tiny"))
    with pytest.raises(ConfigError, match="expected a release as start"):
        open_caches(random)
    with pytest.raises(ConfigError, match="needs a frozen audio_encoder"):
        build_config(RunConfig, {**to_dict(run.config), "trainable": ["audio_encoder"]}, "test")
