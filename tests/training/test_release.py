"""The release of a run: what it takes over from the initial model."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.checkpoint.release import open_release, save_release
from omni_jax.config.load import build_config
from omni_jax.config.run import RunConfig
from omni_jax.convert.table import cast
from omni_jax.training.release import write_release
from omni_jax.training.setup import TrainingSetup


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_release_of_a_run_keeps_what_is_not_trained(tiny_release: Path, tmp_path: Path, dtype: str) -> None:
    """To the bit, in the types that it came in; the model_config.yaml of an imported Mini-Omni; a second time, too."""
    folder = tmp_path / "start"
    imported = open_release(tiny_release)
    tensors = cast(imported.model_tensors(), dtype, "test")
    save_release(folder, imported.config, tensors, imported.codec_tensors(), imported.tokenizer_files())
    (folder / "model_config.yaml").write_text("# as it came\n")
    values = {
        "out": str(tmp_path / "out"),
        "start": str(folder),
        "trainable": ["adapter"],
        "data": {"sources": [{"path": str(tmp_path)}], "tasks": {"A1T1": 1}, "batch_size": 8, "max_length": 64},
        "optimizer": {"steps": 1, "peak_lr": 1e-3},
    }
    setup = TrainingSetup.of(build_config(RunConfig, values, "test"))
    start = open_release(folder)
    model = setup.start.model(stacked=setup.stacked, dtype=jnp.float32, mesh=setup.mesh)
    for _ in range(2):
        write_release(setup, nnx.to_pure_dict(nnx.state(model)), tmp_path / "release")
    for file in folder.iterdir():
        if file.suffix in (".yaml", ".json"):
            assert (tmp_path / "release" / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = start.model_tensors(), open_release(tmp_path / "release").model_tensors()
    for name, tensor in before.items():
        found = after[name].read()
        assert found.dtype == (np.float32 if name.startswith("adapter.") else tensor.dtype), name
        np.testing.assert_array_equal(found, tensor.read().astype(found.dtype), err_msg=name)
