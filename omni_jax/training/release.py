"""The release that a run ends with."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from omni_jax.checkpoint import release as releases
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.checkpoint.tensors import model_tensors
from omni_jax.training.setup import TrainingSetup
from omni_jax.training.stages import Params


def write_release(setup: TrainingSetup, params: Params, folder: Path) -> None:
    """Write the trained model, with the codec and tokenizer of the initial model, as a release folder.

    One that is there is replaced once the new one is complete. All processes call this together.
    """
    complete = folder.with_name(f".{folder.name}.new")
    if jax.process_index() == 0:
        shutil.rmtree(complete, ignore_errors=True)
    _write(setup, params, complete)
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        complete.replace(folder)
    multihost_utils.sync_global_devices(f"release {folder.name}")


def _write(setup: TrainingSetup, params: Params, folder: Path) -> None:
    start = setup.start
    tensors = model_tensors(nnx.merge(setup.graph, params))
    if start.release is not None:
        codec, files = start.release.codec_tensors(), start.release.files_to_keep()
        releases.save_release(folder, start.config, tensors, codec, files)
        return
    codec = {name: LazyTensor.of(np.asarray(value)) for name, value in start.codec().params().items()}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer, settings = (Path(temporary) / name for name in releases.TOKENIZER_FILES)
        start.tokenizer.save(str(tokenizer))
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        releases.save_release(folder, start.config, tensors, codec, [tokenizer, settings])
