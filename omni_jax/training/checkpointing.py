"""Checkpoints of a run: parameters, optimizer state, step, and the position of every process in the data."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from omni_jax import sharding
from omni_jax.checkpoint.release import RUN
from omni_jax.config.run import RunConfig
from omni_jax.data import pipeline
from omni_jax.training.feature_cache import open_caches
from omni_jax.training.optimizer import adamw
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import Params
from omni_jax.training.step import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataPosition:
    """Where a run is in its data."""

    seed: int
    """Of the order of the records."""
    states: list[dict[str, Any]]
    """State of the iterator of each reader, in the order of their shares. Processes that share rows are one reader."""


def checkpoint_manager(config: RunConfig, out: Path) -> ocp.CheckpointManager:
    """Saves in the background; a checkpoint gets its name only when it is complete."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint.max_to_keep,
        keep_period=config.checkpoint.keep_period,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(out / RUN, options=options)


def restore_or_init(
    setup: TrainingSetup, manager: ocp.CheckpointManager
) -> tuple[TrainState, Params, DataPosition | None]:
    """The train state, the frozen parameters and the position in the data: of the last checkpoint, or of step 0.

    The position is None at step 0.
    """
    step = manager.latest_step()
    return _init(setup) if step is None else _restore(setup, manager, step)


def _init(setup: TrainingSetup) -> tuple[TrainState, Params, None]:
    _, shardings = setup.state_shapes()
    model = setup.start.model(stacked=setup.stacked, dtype=setup.dtype, mesh=setup.mesh)
    trainable, frozen = setup.split(nnx.to_pure_dict(nnx.state(model)))
    tx = adamw(setup.config.optimizer)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(trainable)

    def zero() -> jax.Array:
        return jax.device_put(np.int32(0), sharding.replicated(setup.mesh))

    return TrainState(zero(), trainable, opt_state, zero(), zero()), frozen, None


def _restore(
    setup: TrainingSetup, manager: ocp.CheckpointManager, step: int
) -> tuple[TrainState, Params, DataPosition]:
    state, frozen = setup.abstract()
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(state),
            frozen=ocp.args.StandardRestore(frozen),
            data=ocp.args.JsonRestore(),
        ),
    )
    return restored["state"], restored["frozen"], DataPosition(**restored["data"])


def save_checkpoint(
    manager: ocp.CheckpointManager, step: int, state: TrainState, frozen: Params, position: DataPosition
) -> None:
    """Start saving a checkpoint; `manager.wait_until_finished` waits for its end."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            frozen=ocp.args.StandardSave(frozen),
            data=ocp.args.JsonSave({"seed": position.seed, "states": position.states}),
        ),
        force=True,
    )


def open_data(
    setup: TrainingSetup, step: int, position: DataPosition | None, *, reshuffle: bool = False
) -> tuple[pipeline.Batches, int]:
    """This process's share of the data, from the position of the run.

    Args:
        setup: of the run.
        step: number of steps done.
        position: of the checkpoint; None: from the beginning.
        reshuffle: whether to take the records in a new order if the position is one in other data.

    Returns:
        The data, and the seed of its order.
    """
    config = setup.config
    share, num_shares = row_share(setup.mesh, jax.process_index())
    caches = open_caches(setup)

    def opened(seed: int) -> pipeline.Batches:
        return pipeline.batches(
            config.data,
            setup.start.config,
            setup.start.tokenizer,
            seed=seed,
            process_index=share,
            process_count=num_shares,
            caches=caches,
        )

    if position is None:
        return opened(config.seed), config.seed
    if len(position.states) == num_shares:
        data = opened(position.seed)
        difference = pipeline.layout_difference(data.layout, position.states[share]["layout"])
        if difference is None or not reshuffle:
            data.set_state(position.states[share])
            return data, position.seed
        data.close()
    else:
        difference = f"read by {len(position.states)} before, by {num_shares} now"
    # The records that have been read cannot be told from the others; in the same order they would be the first ones.
    if jax.process_index() == 0:
        logger.warning("data: %s: reshuffling the records", difference)
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0])
    return opened(seed), seed


def gather_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The iterator states of all readers, in the order of their shares. Called by all processes."""
    if jax.process_count() == 1:
        return [state]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.zeros(longest, np.uint8)
    padded[: len(text)] = text
    gathered = multihost_utils.process_allgather(padded)
    states = [json.loads(bytes(row).rstrip(b"\0")) for row in gathered]
    # Processes that share rows have the same state.
    by_share = {state["layout"]["process_index"]: state for state in states}
    return [by_share[share] for share in sorted(by_share)]
