"""TODO: omni_jax/training/checkpointing.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from omni_jax import sharding
from omni_jax.checkpoint import release as checkpoint
from omni_jax.config.run import RunConfig
from omni_jax.data import pipeline
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import Params
from omni_jax.training.step import TrainState, optimizer


def begin(
    setup: TrainingSetup, manager: ocp.CheckpointManager, shapes: TrainState, places: TrainState
) -> tuple[TrainState, Params, dict[str, Any] | None]:
    """The state, the frozen parameters and what `write` noted of the data: of the last checkpoint, or at step 0."""
    latest = manager.latest_step()
    if latest is not None:
        _, frozen_shapes = setup.split(setup.shapes)
        _, frozen_places = setup.split(setup.shardings)

        def at(shape: Any, place: Any) -> Any:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

        found = manager.restore(
            latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(at, shapes, places)),
                frozen=ocp.args.StandardRestore(jax.tree.map(at, frozen_shapes, frozen_places)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return found["state"], found["frozen"], found["data"]
    model = setup.start.model(stacked=setup.stacked, dtype=setup.dtype, mesh=setup.mesh)
    learning, frozen = setup.split(nnx.to_pure_dict(nnx.state(model)))
    del model
    tx = optimizer(setup.config.optimizer)
    moments = jax.jit(tx.init, out_shardings=places.moments)(learning)

    def zero() -> jax.Array:
        return jax.device_put(np.int32(0), sharding.replicated(setup.mesh))

    return TrainState(zero(), learning, moments, zero(), zero()), frozen, None


def open_data(setup: TrainingSetup, step: int, noted: dict[str, Any] | None) -> tuple[pipeline.Batches, int]:
    """This process's part of the data, from where the run stands.

    Args:
        setup: of the run.
        step: how many are done.
        noted: by `write`; None: nothing is read yet.

    Returns:
        The data, and the seed of its order.
    """
    config = setup.config
    share, shares = row_share(setup.mesh, jax.process_index())
    order, points = config.seed, None
    if noted is not None:
        order, points = noted.get("order", config.seed), noted["points"]
        if len(points) != shares:
            # Which records each process has seen cannot be shared out among another number of them; in the order of
            # before they would begin with those that all have seen.
            print(f"data: {len(points)} readers before, {shares} now: the records are shuffled anew")
            order, points = int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]), None
    data = pipeline.batches(
        config.data,
        setup.start.config,
        setup.start.tokenizer,
        seed=order,
        process_index=share,
        process_count=shares,
    )
    if points is not None:
        data.set_state(points[share])
    return data, order


def checkpoint_manager(config: RunConfig, out: Path) -> ocp.CheckpointManager:
    """Saves in the background; a checkpoint has its name only when it is whole."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint.max_to_keep,
        keep_period=config.checkpoint.keep_period,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(out / checkpoint.RUN, options=options)


def write(
    manager: ocp.CheckpointManager, step: int, state: TrainState, frozen: Params, order: int, point: dict[str, Any]
) -> None:
    """Start saving a checkpoint: parameters, moments, step, and where each reader stands in data of which order."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            frozen=ocp.args.StandardSave(frozen),
            data=ocp.args.JsonSave({"points": gather_points(point), "order": order}),
        ),
        force=True,
    )


def gather_points(point: dict[str, Any]) -> list[dict[str, Any]]:
    """The data's state of every reader, in the order of their shares."""
    if jax.process_count() == 1:
        return [point]
    text = np.frombuffer(json.dumps(point).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.zeros(longest, np.uint8)
    padded[: len(text)] = text
    gathered = multihost_utils.process_allgather(padded)
    points = [json.loads(bytes(row).rstrip(b"\0")) for row in gathered]
    # Processes that share rows read the same.
    order = sorted({p["layout"]["process_index"]: p for p in points}.items())
    return [p for _, p in order]
