"""A decode step of the real shape on this machine: ours, transformers, and reading the weights once.

Float32, random weights, every row through the trunk, the text head and the seven audio heads.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.torch_reference import TorchOmni
from omni_jax.config.model import PRESETS
from omni_jax.inference.decode import Routing
from omni_jax.inference.runner import ModelRunner
from omni_jax.model.omni import OmniModel

SLOTS = 512
POSITION = 150
STEPS = 4
ROUNDS = 7


def main() -> None:
    config = PRESETS["mini_omni"]
    programs = ModelRunner(jax.jit(lambda: OmniModel(config, stacked=False, dtype=jnp.float32, rngs=nnx.Rngs(0)))())
    theirs = TorchOmni(config, SLOTS)
    used = [programs.weights[part] for part in ("embed", "trunk", "norm")]
    size = sum(x.nbytes for x in jax.tree.leaves(used))

    @jax.jit
    def read(weights: object) -> jax.Array:
        return sum(jnp.sum(x) for x in jax.tree.leaves(weights))  # type: ignore[return-value]

    print(f"weights {size / 1e9:.2f} GB; cache {SLOTS} positions, at position {POSITION}; median of {ROUNDS} rounds")
    print(f"{'batch':>5} {'ours ms':>8} {'torch ms':>9} {'read ms':>8} {'torch/ours':>10} {'read/ours':>9}")
    for B in (1, 2, 8):
        runner = Runner(programs, B)
        theirs.start(B, POSITION)

        def torch_steps(tokens: torch.Tensor = torch.zeros(B, 8, dtype=torch.long)) -> None:  # noqa: B008
            for _ in range(STEPS):
                tokens = theirs.step(tokens)

        times = alternate(runner.run, torch_steps, lambda: read(used).block_until_ready())
        ours, other, once = times[0] / STEPS, times[1] / STEPS, times[2]
        print(
            f"{B:>5} {ours:>8.1f} {other:>9.1f} {once:>8.1f} {other / ours:>9.2f}x {once / ours:>9.0%}",
            flush=True,
        )


class Runner:
    """A batch in which every row writes and speaks, kept running for ever."""

    def __init__(self, programs: ModelRunner, slots: int):
        self.programs = programs
        state = programs.empty(programs.weights, slots, SLOTS)
        requests = dataclasses.replace(
            state.requests, outputs_audio=jnp.ones(slots, bool), limit=jnp.full(slots, SLOTS, jnp.int32)
        )
        self.state = dataclasses.replace(
            state,
            positions=jnp.full(slots, POSITION, jnp.int32),
            writing=jnp.ones(slots, bool),
            requests=requests,
        )
        every = jnp.arange(slots, dtype=jnp.int32)
        self.routing = Routing(jnp.zeros(0, jnp.int32), every, every, every)

    def run(self) -> None:
        """STEPS steps."""
        # Random weights may say the end at any time: say again that every row runs and writes.
        going = dataclasses.replace(
            self.state,
            running=jnp.ones(self.state.running.shape, bool),
            writing=jnp.ones(self.state.running.shape, bool),
        )
        self.state, tokens, _ = self.programs.chunk(self.programs.weights, going, self.routing, jnp.int32(STEPS))
        tokens.block_until_ready()


def alternate(*functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each, in turns after one warm-up, so that a drifting machine is fair to all."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append((time.perf_counter() - start) * 1e3)
    return [float(np.median(taken)) for taken in times]


if __name__ == "__main__":
    main()
