"""From a batch on the host to arrays on the devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.data import pipeline
from omni_jax.training.setup import TrainingSetup
from omni_jax.training.step import Batch
from omni_jax.vocab import NUM_STREAMS

STEP_ARRAYS = ("tokens", "targets", "mask", "positions", "segments", "speech_index", "sound", "features")
"""Arrays of a batch that the step takes; one of the last two."""


@dataclass(frozen=True)
class ShardedBatch:
    """A batch on its way to the devices, with what the host counted in it."""

    arrays: Batch
    positions: int
    """Positions of this process's rows that an example fills."""
    capacity: int
    """Positions of this process's rows."""


def shard_batch(batch: pipeline.Batch, mesh: Mesh) -> ShardedBatch:
    """Send this process's rows to its devices; returns at once."""
    rows = sharding.rows(mesh)
    arrays = {name: jax.make_array_from_process_local_data(rows, batch[name]) for name in STEP_ARRAYS if name in batch}
    return ShardedBatch(arrays, int(np.count_nonzero(batch["segments"])), batch["segments"].size)


def abstract_batch(setup: TrainingSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step, with the shapes, dtypes and shardings that `shard_batch` gives it."""
    data, encoder = setup.config.data, setup.start.config.audio_encoder
    B, T = data.batch_size, data.max_length
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": ((B, NUM_STREAMS, T), jnp.int32),
        "targets": ((B, NUM_STREAMS, T), jnp.int32),
        "mask": ((B, NUM_STREAMS, T), jnp.bool_),
        "positions": ((B, T), jnp.int32),
        "segments": ((B, T), jnp.int32),
        "speech_index": ((B, T), jnp.int32),
    }
    if data.cached_features is None:
        arrays["sound"] = ((B, data.max_clips, encoder.max_samples), jnp.int16)
    else:
        stored = jnp.float32 if data.cached_features.dtype == "float32" else jnp.float16
        arrays["features"] = ((B, data.max_clips, encoder.max_position, encoder.hidden_size), stored)
    rows = sharding.rows(setup.mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in arrays.items()}
