"""The batch that a dry run compiles the step for is the batch of the run."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from omni_jax.config.run import CachedFeaturesConfig
from omni_jax.training.batches import abstract_batch, shard_batch
from omni_jax.training.checkpointing import open_data
from omni_jax.training.setup import TrainingSetup
from tests.training.test_loop import records, run_config

__all__ = ["records"]


@pytest.mark.parametrize("dtype", [None, "int8", "float32"])
def test_abstract_batch_is_that_of_the_data(dtype: str | None, records: Path, tiny_release: Path, tmp_path: Path):
    config = run_config(tmp_path / "out", records, start=str(tiny_release))
    if dtype is not None:
        cache = CachedFeaturesConfig(path=str(tmp_path / "features"), dtype=dtype)
        config = replace(config, data=replace(config.data, cached_features=cache))
    setup = TrainingSetup.of(config)
    data, _ = open_data(setup, 0, None)
    with closing(data):
        arrays = shard_batch(next(data), setup.mesh).arrays
    expected = abstract_batch(setup)
    assert {name: (x.shape, x.dtype, x.sharding) for name, x in arrays.items()} == {
        name: (x.shape, x.dtype, x.sharding) for name, x in expected.items()
    }
