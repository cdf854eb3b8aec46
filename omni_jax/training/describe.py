"""What `--dry-run` prints: modules, parameters, shapes, mesh and memory of a run that is not started."""

from __future__ import annotations

import numpy as np
from flax import traverse_util

from omni_jax import sharding
from omni_jax.config.run import RunConfig
from omni_jax.training.setup import TrainingSetup
from omni_jax.training.stages import module_of
from omni_jax.vocab import Vocab

FLOAT32_BYTES = 4
TRAINABLE_COPIES = 4
"""Arrays of the size of a trainable parameter: itself, its gradient and AdamW's two moments."""


def describe(config: RunConfig) -> str:
    """A table of the modules, and an estimate of the memory, without loading weights or data.

    Raises:
        ConfigError, CheckpointError: the run cannot be started.
    """
    setup = TrainingSetup.of(config)
    mesh = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    devices = setup.mesh.devices
    lines = [f"mesh: {mesh}, on {devices.size} x {devices.flat[0].device_kind}"]
    lines += _module_table(setup)
    lines.append(_step_estimate(setup))
    optimizer = config.optimizer
    lines.append(f"run: {optimizer.steps} steps, peak learning rate {optimizer.peak_lr:g}, output in {config.out}")
    return "\n".join(lines)


def _module_table(setup: TrainingSetup) -> list[str]:
    """Parameters and bytes per device of each module, and their totals."""
    shardings = traverse_util.flatten_dict(setup.shardings)
    counts: dict[str, int] = {}
    memory: dict[str, int] = {}
    for path, shape in traverse_util.flatten_dict(setup.shapes).items():
        module = module_of(path)
        local = int(np.prod(shardings[path].shard_shape(shape.shape))) * FLOAT32_BYTES
        local *= TRAINABLE_COPIES if module in setup.config.trainable else 1
        counts[module] = counts.get(module, 0) + int(np.prod(shape.shape))
        memory[module] = memory.get(module, 0) + local
    lines = [f"{'module':<16} {'parameters':>12}  {'':<9} {'bytes per device':>17}"]
    for module, count in counts.items():
        kind = "trainable" if module in setup.config.trainable else "frozen"
        lines.append(f"{module:<16} {count:>12,}  {kind:<9} {memory[module]:>17,}")
    trainable = sum(count for module, count in counts.items() if module in setup.config.trainable)
    total, gib = sum(counts.values()), sum(memory.values()) / 2**30
    return [*lines, f"{'total':<16} {total:>12,}  {trainable:,} trainable; {gib:.2f} GiB per device"]


def _step_estimate(setup: TrainingSetup) -> str:
    """Rows of a step, and roughly the memory of its activations and logits."""
    config, model = setup.config, setup.start.config
    micro_batches = config.optimizer.gradient_accumulation_steps
    rows = config.data.batch_size / micro_batches / sharding.num_shards("batch", setup.mesh)
    hidden = rows * config.data.max_length * model.trunk.hidden_size * np.dtype(setup.dtype).itemsize
    # The trunk's residual stream at every layer, and about eight arrays of its size within a layer.
    activations = hidden * (model.trunk.num_layers + 8) / 2**30
    # The logits of a chunk and their gradient.
    chunk = min(config.loss.chunk_size, rows * config.data.max_length)
    logits = chunk * Vocab(model.vocab).text_rows * FLOAT32_BYTES * 2 / 2**30
    return (
        f"step: {config.data.batch_size} rows of {config.data.max_length} positions in {micro_batches} micro-batch(es);"
        f" estimated activations {activations:.2f} GiB (remat {config.remat}), logits {logits:.2f} GiB per device"
    )
