"""What `--dry-run` prints: modules, parameters, mesh, and the memory that the compiler plans for a step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import traverse_util

from omni_jax.training.batches import abstract_batch
from omni_jax.training.setup import TrainingSetup, compile_step
from omni_jax.training.stages import module_of

GIB = 2**30


def describe(setup: TrainingSetup) -> str:
    """The mesh, a table of the modules, and the run, without loading weights or data."""
    config, devices = setup.config, setup.mesh.devices
    mesh = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    lines = [f"mesh: {mesh}, on {devices.size} x {devices.flat[0].device_kind}", *_module_table(setup)]
    lines.append(
        f"step: {config.data.batch_size} rows of {config.data.max_length} positions in "
        f"{config.optimizer.gradient_accumulation_steps} micro-batch(es), remat {config.remat}"
    )
    optimizer = config.optimizer
    lines.append(f"run: {optimizer.steps} steps, peak learning rate {optimizer.peak_lr:g}, output in {config.out}")
    return "\n".join(lines)


def _module_table(setup: TrainingSetup) -> list[str]:
    """Parameters of each module, and their totals."""
    counts = count_parameters(setup)
    lines = [f"{'module':<16} {'parameters':>12}"]
    for module, count in counts.items():
        kind = "trainable" if module in setup.config.trained else "frozen"
        lines.append(f"{module:<16} {count:>12,}  {kind}")
    trainable = sum(count for module, count in counts.items() if module in setup.config.trained)
    return [*lines, f"{'total':<16} {sum(counts.values()):>12,}  {trainable:,} trainable"]


def count_parameters(setup: TrainingSetup) -> dict[str, int]:
    """The number of parameters of each module."""
    counts: dict[str, int] = {}
    for path, shape in traverse_util.flatten_dict(setup.shapes).items():
        counts[module_of(path)] = counts.get(module_of(path), 0) + int(np.prod(shape.shape))
    return counts


def compile_abstract_step(setup: TrainingSetup) -> jax.stages.Compiled:
    """The compiled step of a run, without its weights."""
    state, frozen = setup.abstract()
    with jax.set_mesh(setup.mesh):
        return compile_step(setup).lower(state, frozen, abstract_batch(setup)).compile()


def memory_line(compiled: jax.stages.Compiled) -> str:
    """The memory of a compiled step on each device, in a line; says so if the backend does not report it."""
    memory: Any = compiled.memory_analysis()
    if memory is None:
        return "memory per device: not reported by this backend"
    state, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # The state is donated: results overwrite it.
    rest = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    total = (state + temporary + rest) / GIB
    return (
        f"memory per device: {total:.2f} GiB by the compiler's account: {state / GIB:.2f} of parameters, optimizer "
        f"state and batch, {temporary / GIB:.2f} of activations, gradients and logits"
    )
