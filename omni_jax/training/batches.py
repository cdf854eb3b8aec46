"""From a batch on the host to arrays on the devices."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.data import pipeline
from omni_jax.training.step import Batch

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
