"""The release of a run: what it takes over from the initial model."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from omni_jax.checkpoint.release import open_release
from omni_jax.training.release import write_release


def test_release_of_a_run_keeps_the_files_of_its_start(tiny_release: Path, tmp_path: Path) -> None:
    """With the model_config.yaml of a Mini-Omni that the initial model was imported from; a second one replaces it."""
    folder = shutil.copytree(tiny_release, tmp_path / "start")
    (folder / "model_config.yaml").write_text("# as it came\n")
    start = open_release(folder)
    graph, state = nnx.split(start.load_model(stacked=False, dtype=jnp.float32))
    setup: Any = SimpleNamespace(
        graph=graph,
        config=SimpleNamespace(frozen_dtype="float32"),
        start=SimpleNamespace(release=start, config=start.config),
    )
    for _ in range(2):
        write_release(setup, nnx.to_pure_dict(state), tmp_path / "release")
    for file in folder.iterdir():
        if file.suffix in (".yaml", ".json"):
            assert (tmp_path / "release" / file.name).read_bytes() == file.read_bytes(), file.name
    assert open_release(tmp_path / "release").fingerprint() == start.fingerprint()
