"""The release that a run ends with, and its LoRA."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.experimental import multihost_utils

from omni_jax.checkpoint import release as releases
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.checkpoint.tensors import model_tensors, tensor_names
from omni_jax.convert import peft
from omni_jax.training.setup import TrainingSetup
from omni_jax.training.stages import Params


def write_release(setup: TrainingSetup, params: Params, folder: Path) -> None:
    """Write the trained model, with the codec and tokenizer of the initial model, as a release folder.

    The changes of LoRA are in its weights. A release that is there is replaced once the new one is complete. All
    processes call this together.
    """
    _replace(folder, lambda new: _write(setup, params, new))


def write_lora(setup: TrainingSetup, params: Params, folder: Path) -> None:
    """Write the LoRA of a run as a folder of PEFT, as `write_release` writes the release."""
    lora = setup.config.lora
    assert lora is not None
    # All processes gather what the first one writes.
    tensors = {
        name: LazyTensor.of(tensor.read()) for name, tensor in _tensors(setup, params).items() if peft.is_lora(name)
    }

    def write(new: Path) -> None:
        if jax.process_index() == 0:
            peft.write(new, setup.start.config.trunk, lora, tensors)

    _replace(folder, write)


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a new folder, and put it in the place of the one that is there. Called by all processes."""
    complete = folder.with_name(f".{folder.name}.new")
    if jax.process_index() == 0:
        shutil.rmtree(complete, ignore_errors=True)
    write(complete)
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        complete.replace(folder)
    multihost_utils.sync_global_devices(f"release {folder.name}")


def _tensors(setup: TrainingSetup, params: Params) -> dict[str, LazyTensor]:
    """All tensors of a run: frozen ones as they are in the release that it started from, to the bit."""
    tensors = model_tensors(nnx.merge(setup.graph, params))
    if setup.start.release is not None:
        original = setup.start.release.model_tensors()
        frozen = traverse_util.flatten_dict(setup.split(setup.shapes)[1])
        names = [name for path, shape in frozen.items() for name in tensor_names(path, shape.shape)]
        tensors |= {name: original[name] for name in names}
    return tensors


def _write(setup: TrainingSetup, params: Params, folder: Path) -> None:
    start, tensors = setup.start, _tensors(setup, params)
    if setup.config.lora is not None:
        tensors = peft.merge(tensors, setup.config.lora.scale)
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
