"""Checkpoints of a run: parameters, optimizer state, step, and the position of every process in the data."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from omni_jax import sharding
from omni_jax.checkpoint.release import RUN
from omni_jax.config.run import RunConfig
from omni_jax.data import pipeline
from omni_jax.errors import CheckpointError, PeerLostError, TrainingError
from omni_jax.training.checksums import SUMS, find_damage, hash_items, write_checksums
from omni_jax.training.feature_cache import open_caches
from omni_jax.training.lora import init_lora
from omni_jax.training.optimizer import adamw
from omni_jax.training.setup import TrainingSetup, row_share, to_frozen_dtype
from omni_jax.training.stages import Params, combine
from omni_jax.training.step import TrainState

logger = logging.getLogger(__name__)

DAMAGED = "damaged_checkpoints"
"""Folder of a run for checkpoints that are not whole."""


@dataclass(frozen=True)
class DataPosition:
    """Where a run is in its data."""

    seed: int
    """Of the order of the records."""
    states: list[dict[str, Any]]
    """State of the iterator of each reader, in the order of their shares. Processes that share rows are one reader."""

    def check(self) -> None:
        """See that it can be a position. Raises: TypeError: it cannot."""
        if type(self.seed) is not int or not isinstance(self.states, list):
            raise TypeError("a position in the data without a seed or states")
        if not all(isinstance(state, dict) and isinstance(state.get("layout"), dict) for state in self.states):
            raise TypeError("a position in the data without a layout")


class Checkpoints:
    """The checkpoints of a run: saved in the background, and whole or not there.

    A checkpoint counts from the moment on that its hashes are written, which is the last step of a save. One that is
    not whole is moved to the folder `damaged_checkpoints`, and the run continues from the one before.

    Attributes:
        folder: of the checkpoints.
    """

    def __init__(self, config: RunConfig, out: Path):
        self.folder = out / RUN
        _set_damaged_aside(self.folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.max_to_keep,
            keep_period=config.checkpoint.keep_period,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            temporary_path_class=_HashedPath,
            # The metadata of a checkpoint that has not been checked is not read.
            lightweight_initialize=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._saving: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A save waits for all processes, and would wait for the lost one until JAX gives up.
        if kind is None or not issubclass(kind, PeerLostError):
            self.close()

    def latest_step(self) -> int | None:
        """The step of the last checkpoint, which may still be written."""
        return self._manager.latest_step()

    def restore_or_init(self, setup: TrainingSetup) -> tuple[TrainState, Params, DataPosition | None]:
        """The train state, the frozen parameters and the position in the data: of the last checkpoint, or of step 0.

        The position is None at step 0.

        Raises:
            CheckpointError: the last checkpoint is of a model or an optimizer with other arrays, or not of a run.
        """
        step = self.latest_step()
        return _init(setup) if step is None else self._restore(setup, step)

    def _restore(self, setup: TrainingSetup, step: int) -> tuple[TrainState, Params, DataPosition]:
        state, frozen = setup.abstract()
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(state),
            frozen=ocp.args.StandardRestore(frozen),
            data=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=args)
            position = DataPosition(**restored["data"])
            position.check()
        except (ValueError, KeyError, TypeError) as error:
            found = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{self.folder / str(step)}: expected the arrays of this configuration, found those of another one; "
                f"continue with the configuration that the run began with, or choose another out ({found})"
            ) from error
        return restored["state"], restored["frozen"], position

    def save(self, step: int, state: TrainState, frozen: Params, position: DataPosition) -> None:
        """Start saving a checkpoint; `wait` waits for its end. Called by all processes.

        Raises:
            TrainingError: there is no room for it, or the checkpoint before could not be saved.
        """
        self.wait()
        self._require_space(step, (state, frozen))
        self._saving = step
        with self._saves():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    frozen=ocp.args.StandardSave(frozen),
                    data=ocp.args.JsonSave({"seed": position.seed, "states": position.states}),
                ),
                force=True,
            )

    def check(self) -> None:
        """See whether a save in the background has failed, without waiting for it.

        Raises:
            TrainingError: it has.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is saved.

        Raises:
            TrainingError: it could not be saved.
        """
        with self._saves():
            self._manager.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        """Wait, and release everything.

        Raises:
            TrainingError: the checkpoint could not be saved.
        """
        with self._saves():
            self._manager.close()

    @contextmanager
    def _saves(self) -> Iterator[None]:
        """Turn what goes wrong in a save into an error that says what is left."""
        try:
            yield
        except (OSError, ValueError) as error:
            step, self._saving = self._saving, None
            raise TrainingError(
                f"{self.folder / str(step)}: the checkpoint could not be saved: {_reason(error)}; {self._left()}"
            ) from error

    def _require_space(self, step: int, arrays: object) -> None:
        needed = sum(array.nbytes for array in jax.tree.leaves(arrays))
        # The same answer on all processes, or some would wait for the others.
        free = gather(shutil.disk_usage(self.folder).free)[0]
        if free < needed:
            raise TrainingError(
                f"{self.folder / str(step)}: expected {needed / 1e6:,.1f} MB of free space for the checkpoint, found "
                f"{free / 1e6:,.1f} MB; {self._left()}"
            )

    def _left(self) -> str:
        steps = [step for step in _steps(self.folder) if (self.folder / step / SUMS).exists()]
        begins = f"from step {max(map(int, steps))}" if steps else "from the beginning"
        return f"once it can be saved, the same command continues {begins}"


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore raises ValueError, with the number of the system's error in a text of many lines.
    found = re.search(r"OS error (\d+)|os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1] or found[2])) if found else str(error)


class _HashedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Gives a checkpoint its hashes once it has its name, and before Orbax deletes the oldest one.

    Where folders are not renamed as a whole, as on a mounted bucket, the hashes still come last.
    """

    async def finalize(self) -> None:
        """Rename, and write the hashes. Called by the first process, in the background."""
        folder = Path(self.get_final())
        if not folder.name.isdecimal():
            # An item of a checkpoint.
            await super().finalize()
            return
        # What takes time comes before the rename: a checkpoint that is cut off before it leaves nothing but a temporary
        # folder. The rename comes with changes to the files of the folder itself, which are small.
        hashes = await asyncio.to_thread(hash_items, Path(self.get()))
        await super().finalize()
        await asyncio.to_thread(write_checksums, folder, hashes)


def _set_damaged_aside(folder: Path) -> None:
    """Move checkpoints that are not whole out of the way, from the newest to the first that is whole.

    Called by all processes, which share the reading.

    Raises:
        CheckpointError: one cannot be moved.
    """
    process, count = jax.process_index(), jax.process_count()
    while names := gather(_steps(folder))[0]:
        name = max(names, key=int)
        damage = next(filter(None, gather(find_damage(folder / name, process, count))), None)
        if damage is None:
            return
        target, error = gather(_move_aside(folder / name) if process == 0 else None)[0]
        if error:
            raise CheckpointError(f"{folder / name}: expected a whole checkpoint, found {damage}; {error}")
        if process == 0:
            rest = "go on from the one before" if len(names) > 1 else "begin at step 0, as there is no other"
            logger.warning(
                "%s: expected a whole checkpoint, found %s: move it to %s, %s", folder / name, damage, target, rest
            )


def _steps(folder: Path) -> list[str]:
    """Names of what looks like checkpoints, also of what is not whole."""
    return [path.name for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []


def _move_aside(path: Path) -> tuple[str, str | None]:
    """Where it was moved to, and why it could not be moved."""
    aside = path.parent.with_name(DAMAGED)
    target = next(target for number in itertools.count(1) if not (target := aside / f"{path.name}-{number}").exists())
    try:
        aside.mkdir(exist_ok=True)
        shutil.move(path, target)
    except OSError as error:
        return str(target), f"it cannot be moved to {target}: {error.strerror}"
    return str(target), None


def _init(setup: TrainingSetup) -> tuple[TrainState, Params, None]:
    _, shardings = setup.state_shapes()
    model = setup.start.model(
        stacked=setup.stacked, dtype=setup.dtype, mesh=setup.mesh, convert=partial(to_frozen_dtype, config=setup.config)
    )
    params = combine(nnx.to_pure_dict(nnx.state(model)), init_lora(setup))
    trainable, frozen = setup.split(params)
    tx = adamw(setup.config.optimizer)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(trainable)

    def zero() -> jax.Array:
        return jax.device_put(np.int32(0), sharding.replicated(setup.mesh))

    return TrainState(zero(), trainable, opt_state, zero(), zero()), frozen, None


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
    # Processes that share rows have the same state.
    by_share = {state["layout"]["process_index"]: state for state in gather(state)}
    return [by_share[share] for share in sorted(by_share)]


def barrier(name: str, seconds: float) -> None:
    """Wait for all processes, up to so many seconds. Called by all of them."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(seconds * 1000))


def gather(value: Any) -> list[Any]:
    """A value of every process, in their order; it must be possible as JSON. Called by all processes."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.zeros(longest, np.uint8)
    padded[: len(text)] = text
    return [json.loads(bytes(row).rstrip(b"\0")) for row in multihost_utils.process_allgather(padded)]
