"""Runs the frozen audio encoder over all sources of a run, once; see `omni_jax.data.cached_features`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.audio.features import log_mel
from omni_jax.checkpoint.release import Release
from omni_jax.config.run import CachedFeaturesConfig, SourceConfig
from omni_jax.data.cached_features import (
    BATCH_SIZE,
    CachedFeatures,
    Encode,
    finish_features,
    num_shards,
    write_features,
)
from omni_jax.data.records import INDEX, Records
from omni_jax.errors import ConfigError, PipelineError, RecordError
from omni_jax.model.whisper_encoder import WhisperEncoder, recording_frames
from omni_jax.prompts import speech_positions
from omni_jax.tasks import Task
from omni_jax.training.setup import TrainingSetup

logger = logging.getLogger(__name__)

WINDOW_STEP = 8000
"""Samples; the encoder is compiled for each multiple that occurs."""


def open_caches(setup: TrainingSetup) -> list[CachedFeatures | None] | None:
    """The features of each source, computed where they are missing; None if the run caches none.

    A source that serves no task with audio has none.

    All processes call this together; each computes a share of the shards on its own devices. An interrupted run
    continues with the shards that are missing.

    Raises:
        ConfigError: the run starts from random weights.
        PipelineError: a source cannot be opened.
    """
    return _open_all(setup, setup.config.data.sources, setup.config.data.cached_features)


def open_held_out_caches(setup: TrainingSetup) -> list[CachedFeatures | None] | None:
    """As `open_caches`, of the held-out sources, without augmentation."""
    cache = setup.config.data.cached_features
    return _open_all(setup, setup.config.data.held_out, None if cache is None else replace(cache, versions=1))


def _open_all(
    setup: TrainingSetup, sources: Sequence[SourceConfig], cache: CachedFeaturesConfig | None
) -> list[CachedFeatures | None] | None:
    if cache is None:
        return None
    release, data = require_release(setup), setup.config.data
    assert release is not None
    encoder = fingerprint(setup, release)
    # Loaded and compiled once, for the first source whose features are missing.
    encode = lru_cache(partial(make_encoder, setup, release))
    spoken = {task for task in data.tasks if Task(task).takes_audio}
    return [
        _open_cache(setup, cache, encoder, encode, Path(source.path)) if spoken & set(source.tasks) else None
        for source in sources
    ]


def require_release(setup: TrainingSetup) -> Release | None:
    """The release that a run starts from, which it must have if it caches features.

    Raises:
        ConfigError: the run caches features, and starts from random weights.
    """
    if setup.start.release is None and setup.config.data.cached_features is not None:
        raise ConfigError(
            "data.cached_features: expected a release as start, found random weights", field="data.cached_features"
        )
    return setup.start.release


def fingerprint(setup: TrainingSetup, release: Release) -> str:
    """What the features depend on besides the recordings: the audio encoder and how it is run."""
    digest = hashlib.sha256(repr((release.config.audio_encoder, release.config.adapter.stack)).encode())
    digest.update(str(np.dtype(setup.dtype)).encode())
    for name, tensor in sorted(release.audio_encoder_tensors().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.read()).tobytes())
    return digest.hexdigest()


def _open_cache(
    setup: TrainingSetup, cache: CachedFeaturesConfig, encoder: str, encode: Callable[[], Encode], source: Path
) -> CachedFeatures:
    try:
        records = Records(source)
    except RecordError as error:
        raise PipelineError(str(error)) from None
    content = (source / INDEX).read_bytes() + f"{cache.versions} {cache.dtype} {encoder}".encode()
    folder = Path(cache.path) / f"{source.name}-{hashlib.sha256(content).hexdigest()[:16]}"
    if not (folder / INDEX).exists():
        _compute(setup, cache, encode(), records, folder)
    multihost_utils.sync_global_devices(f"features {folder.name}")
    return CachedFeatures(folder)


def _compute(setup: TrainingSetup, cache: CachedFeaturesConfig, encode: Encode, records: Records, folder: Path) -> None:
    config, total = setup.start.config, num_shards(records)
    logger.info("computing features of %d records, %d versions of each: %s", len(records), cache.versions, folder)
    write_features(
        records,
        folder,
        range(jax.process_index(), total, jax.process_count()),
        encode,
        max_samples=config.audio_encoder.max_samples,
        window=window(setup),
        num_frames=num_frames(setup),
        versions=cache.versions,
        dtype=cache.dtype,
    )
    multihost_utils.sync_global_devices(f"shards {folder.name}")
    if jax.process_index() == 0:
        finish_features(records, folder, cache.versions)


def num_frames(setup: TrainingSetup) -> Callable[[int], int]:
    """From samples of a recording to the frames whose speech positions a prompt has."""
    encoder, stack = setup.start.config.audio_encoder, setup.start.config.adapter.stack
    return lambda samples: min(speech_positions(samples, encoder.max_position, stack) * stack, encoder.max_position)


def window(setup: TrainingSetup) -> Callable[[int], int]:
    """From samples of a recording to the samples that it is padded to for the encoder."""
    encoder = setup.start.config.audio_encoder
    if not encoder.mask_padding:
        return lambda samples: encoder.max_samples
    # In smaller steps than `AudioEncoderConfig.window`: with the mask the features do not depend on the window.
    return lambda samples: min(-(-(samples + 640) // WINDOW_STEP) * WINDOW_STEP, encoder.max_samples)


def make_encoder(setup: TrainingSetup, release: Release) -> Encode:
    """The audio encoder of the run's release, on the devices of this process, each of which encodes some recordings."""
    config = release.config.audio_encoder
    devices = jax.local_devices()
    devices = devices[: np.gcd(len(devices), BATCH_SIZE)]
    mesh = Mesh(np.array(devices), ("data",))
    rows, replicated = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    graph, state = nnx.split(
        nnx.eval_shape(lambda: WhisperEncoder(config, stacked=False, dtype=setup.dtype, rngs=nnx.Rngs(0)))
    )
    tensors = release.audio_encoder_tensors()
    weights = nnx.to_pure_dict(state)
    weights = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.device_put(
            tensors[".".join(str(key.key) for key in path)].read().astype(np.float32), replicated
        ),
        weights,
    )

    @jax.jit
    def encode(weights: object, audio: jax.Array) -> jax.Array:
        mel = log_mel(audio, mels=config.num_mel_bins)
        return nnx.merge(graph, weights)(mel, recording_frames(audio)).astype(np.float32)

    return lambda audio: np.asarray(encode(weights, jax.device_put(audio, rows)))
