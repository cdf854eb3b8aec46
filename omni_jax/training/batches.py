"""TODO: omni_jax/training/batches.py"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.data import pipeline
from omni_jax.training.step import Batch

IN_BATCH = ("tokens", "targets", "mask", "positions", "segments", "speech_index", "sound")
"""Arrays of a batch that the step takes."""


@dataclasses.dataclass(frozen=True)
class ShardedBatch:
    """A batch on its way to the devices, with what the host counted in it."""

    arrays: Batch
    positions: int
    """Positions of this process that hold something."""
    capacity: int
    """Positions of this process."""


def shard_batch(batch: pipeline.Batch, mesh: Mesh) -> ShardedBatch:
    """Send this process's rows to its devices; returns at once."""
    spot = sharding.rows(mesh)
    arrays = {name: jax.make_array_from_process_local_data(spot, batch[name]) for name in IN_BATCH}
    return ShardedBatch(arrays, int(np.count_nonzero(batch["segments"])), batch["segments"].size)
