"""A run from top to bottom: setup, restore, step, log, checkpoint, evaluate, release.

The same code runs on one CPU and on every process of a pod. All that a run needs to continue is in its checkpoints:
kill it at any moment and start it again with the same command.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import jax

from omni_jax.checkpoint.release import RELEASE
from omni_jax.config.load import save_config
from omni_jax.config.run import LORA, RunConfig
from omni_jax.errors import FolderInUseError, OmniError, PeerLostError, TrainingError
from omni_jax.folder_lock import SILENCE_SECONDS, FolderLock
from omni_jax.training.batches import shard_batch
from omni_jax.training.checkpointing import Checkpoints, DataPosition, barrier, gather, gather_states, open_data
from omni_jax.training.checks import check_run, is_finished
from omni_jax.training.describe import memory_line
from omni_jax.training.evaluation import HeldOutEvaluation
from omni_jax.training.goodput import WAITING, Goodput, log_once
from omni_jax.training.metrics import MetricsWriter, Tally, log_step
from omni_jax.training.profiler import ProfilerTrace
from omni_jax.training.release import write_lora, write_release
from omni_jax.training.setup import TrainingSetup, compile_step
from omni_jax.training.stages import combine
from omni_jax.training.stop_signal import StopSignal

logger = logging.getLogger(__name__)

CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR),
)
"""Errors of the system that say that a file cannot be written: space, quota, permissions, a folder in its place."""

LOST_PEER = re.compile("Gloo|peer|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]oordination")
"""In the message of an error: a collective failed because of another process, not for want of memory or the like."""


def train(config: RunConfig, *, profile: str | None = None, reshuffle: bool = False) -> Path | None:
    """Train, from the last checkpoint of `config.out` if there is one.

    Args:
        config: the run.
        profile: folder for a profiler trace of a few steps.
        reshuffle: whether a run whose sources, tasks or workers have changed goes on, with the records in a new order.

    Returns:
        The release folder; None if the run was stopped before its end, after saving a checkpoint.

    Raises:
        ConfigError, CheckpointError: the run cannot be started as configured. Nothing is written then.
        FolderInUseError: another run writes to `config.out`.
        PeerLostError: another process of the run has ended.
        PipelineError: the data cannot be used.
        TrainingError: the loss stayed non-finite, or something cannot be written.
    """
    goodput = Goodput()
    setup = TrainingSetup.of(config)
    out = Path(config.out).resolve()
    # A finished run may be in a folder that cannot be written to.
    if is_finished(setup, out):
        log_once(f"{out}: the run has finished")
        return out / RELEASE
    check_run(setup, out, reshuffle=reshuffle)
    try:
        with notice_lost_peer(), run_lock(out) as lock:
            return _train(setup, out, lock, goodput, profile=profile, reshuffle=reshuffle)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise TrainingError(
            f"{error.filename or out}: {error.strerror}; once that is repaired, the same command continues from the "
            "last checkpoint"
        ) from error


@contextmanager
def run_lock(out: Path) -> Iterator[FolderLock | None]:
    """The lock of a run's folder, which process 0 holds; the others get None. Called by all processes.

    Raises:
        FolderInUseError: another run holds it.
        ConfigError: the folder cannot be written to.
    """
    with ExitStack() as stack:
        lock, error = None, None
        if jax.process_index() == 0:
            try:
                lock = stack.enter_context(FolderLock(out, "omni-jax train"))
            except OmniError as refused:
                error = refused
        # In a collective the others would not wait as long as the first may wait for a sign of life.
        barrier("run lock", 10 * SILENCE_SECONDS)
        if problem := gather(None if error is None else str(error))[0]:
            raise error or FolderInUseError(problem)
        yield lock


@contextmanager
def notice_lost_peer() -> Iterator[None]:
    """Turn the error of a collective whose other processes are gone into one that says so.

    Raises:
        PeerLostError: another process of the run has ended, or cannot be reached.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not LOST_PEER.search(str(error)):
            raise
        reason = str(error).partition("\n")[0]
        raise PeerLostError(
            "another process of the run has ended or cannot be reached: its log says why; the same command on all "
            f"of them continues from the last checkpoint ({reason})"
        ) from error


def _train(
    setup: TrainingSetup,
    out: Path,
    lock: FolderLock | None,
    goodput: Goodput,
    *,
    profile: str | None,
    reshuffle: bool,
) -> Path | None:
    config = setup.config
    # The run that held the lock may have finished meanwhile.
    if is_finished(setup, out):
        return out / RELEASE
    if jax.process_index() == 0:
        save_config(config, out / "run.yaml")
    evaluate, last_step = HeldOutEvaluation(setup, out), config.optimizer.steps
    with (
        StopSignal(None if lock is None else lock.release) as stop,
        Checkpoints(config, out) as checkpoints,
        notice_lost_peer(),
    ):
        with goodput.phase("starting", _first_phase(config, checkpoints.latest_step())):
            state, frozen, position = checkpoints.restore_or_init(setup)
            step = int(state.step)
        with goodput.phase("starting", "opening the data"):
            data, seed = open_data(setup, step, position, reshuffle=reshuffle)
        with (
            closing(data),
            closing(MetricsWriter(config, step)) as writer,
            ProfilerTrace(profile, step, last_step, config.log_interval_steps) as trace,
        ):
            data_state = data.get_state()
            with goodput.measure(WAITING):
                batch = shard_batch(next(data), setup.mesh)
            if step < last_step:
                with goodput.phase("compiling", "compiling the train step"), jax.set_mesh(setup.mesh):
                    step_fn = compile_step(setup).lower(state, frozen, batch.arrays).compile()
                log_once(memory_line(step_fn))
            if step and evaluate.is_due(step) and evaluate.is_missing(step, writer):
                with goodput.phase("evaluation", f"evaluating at step {step}"):
                    evaluate(step, combine(state.trainable, frozen), writer)
            tally = Tally(goodput)
            while step < last_step and not stop.requested(step):
                trace.update(step, state)
                tally.add(batch)
                with jax.set_mesh(setup.mesh):
                    state, metrics = step_fn(state, frozen, batch.arrays)
                step += 1
                stop.started()
                checkpoints.check()
                if lock is not None:
                    lock.check()
                # A checkpoint of this step continues with the batch after it, which is fetched ahead here.
                data_state = data.get_state()
                if step < last_step:
                    # The step has been queued: the host reads and sends the next batch while the device computes.
                    with goodput.measure(WAITING):
                        arrays = next(data)
                    batch = shard_batch(arrays, setup.mesh)
                if step % config.log_interval_steps == 0 or step == last_step:
                    log_step(setup, writer, step, metrics, tally, data.skipped)
                    tally = Tally(goodput)
                if step % config.checkpoint.save_interval_steps == 0 or step == last_step:
                    # Steps that have been queued are steps.
                    jax.block_until_ready(state)
                    with goodput.measure("checkpoints"):
                        checkpoints.save(step, state, frozen, DataPosition(seed, gather_states(data_state)))
                if evaluate.is_due(step):
                    jax.block_until_ready(state)
                    with goodput.phase("evaluation", f"evaluating at step {step}"):
                        evaluate(step, combine(state.trainable, frozen), writer)
            trace.update(step, state)
            with goodput.measure("checkpoints"):
                if step < last_step and checkpoints.latest_step() != step:
                    checkpoints.save(step, state, frozen, DataPosition(seed, gather_states(data_state)))
                checkpoints.wait()
    if step < last_step:
        log_once(goodput.summary())
        if jax.process_index() == 0:
            logger.warning("stopped: saved a checkpoint at step %d; the same command continues from there", step)
        return None
    with goodput.phase("release", "writing the release"):
        params = combine(state.trainable, frozen)
        # The run has finished once it has its release.
        if config.lora is not None:
            write_lora(setup, params, out / LORA)
        write_release(setup, params, out / RELEASE)
    log_once(goodput.summary())
    return out / RELEASE


def _first_phase(config: RunConfig, step: int | None) -> str:
    return f"loading {config.start}" if step is None else f"resuming from step {step}"
