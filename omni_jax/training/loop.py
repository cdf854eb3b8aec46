"""A run, top to bottom: mesh, data, model, resume, step, checkpoint, log, evaluate, release.

The same code on one CPU and on every process of a pod. Everything a run needs to go on is in its checkpoints: kill
it at any moment and start it again with the same command.
"""

from __future__ import annotations

import json
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.checkpoint.tensors import model_tensors
from omni_jax.config.load import save_config
from omni_jax.config.run import RunConfig
from omni_jax.training.batches import shard_batch
from omni_jax.training.checkpointing import begin, checkpoint_manager, open_data, write
from omni_jax.training.evaluation import HeldOutEvaluation
from omni_jax.training.metrics import MetricsWriter, Tally, log
from omni_jax.training.setup import TrainingSetup, compile_step
from omni_jax.training.stages import Params, combine


def train(config: RunConfig, *, profile: str | None = None) -> Path | None:
    """Train, from the last checkpoint of `config.out` if there is one.

    Args:
        config: the run.
        profile: folder for a profiler trace of a few steps after the first log step.

    Returns:
        The release folder; None if the run was asked to stop before its end (it has saved itself).

    Raises:
        ConfigError: the configuration cannot be run.
        PipelineError: the data cannot be used.
        TrainingError: the loss stayed non-finite.
    """
    setup = TrainingSetup.of(config)
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (out / checkpoint.RELEASE).exists():
        return out / checkpoint.RELEASE
    if jax.process_index() == 0:
        save_config(config, out / "run.yaml")
    stop = Stop()
    shapes, places = setup.state_shapes()
    manager = checkpoint_manager(config, out)
    step_fn = compile_step(setup, places)
    state, frozen, noted = begin(setup, manager, shapes, places)
    step = int(state.step)
    data, order = open_data(setup, step, noted)
    report = MetricsWriter(config, step)
    evaluate = HeldOutEvaluation(setup)
    try:
        point = data.get_state()
        batch, tally = shard_batch(next(data), setup.mesh), Tally()
        while step < config.optimizer.steps and not stop.asked(step):
            tally.add(batch)
            state, metrics = step_fn(state, frozen, batch.arrays)
            step += 1
            last = step == config.optimizer.steps
            # Where the data stands for a checkpoint of this step: before the batch that is fetched ahead.
            point = data.get_state()
            if not last:
                # The device is busy with the step just queued: time to put the next batch beside it.
                waiting = time.perf_counter()
                read = next(data)
                report.waited += time.perf_counter() - waiting
                batch = shard_batch(read, setup.mesh)
            if step % config.log_interval_steps == 0 or last:
                log(setup, report, step, metrics, tally, data.skipped)
                tally = Tally()
            if profile and step == config.log_interval_steps:
                jax.profiler.start_trace(profile)
            if profile and step == config.log_interval_steps + PROFILED:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if step % config.checkpoint.save_interval_steps == 0 or last:
                write(manager, step, state, frozen, order, point)
            if last or (config.eval_interval_steps and step % config.eval_interval_steps == 0):
                evaluate(step, combine(state.learning, frozen), report)
        if step < config.optimizer.steps:
            if manager.latest_step() != step:
                write(manager, step, state, frozen, order, point)
            manager.wait_until_finished()
            report.say(f"asked to stop: saved at step {step}; the same command goes on from there")
            return None
        manager.wait_until_finished()
    finally:
        manager.close()
        report.close()
        data.close()
    release(setup, combine(state.learning, frozen), out / checkpoint.RELEASE)
    return out / checkpoint.RELEASE


class Stop:
    """Whether somebody wants the run to end: SIGTERM, as a preempted machine gets it, or Ctrl-C's SIGINT.

    With several processes all must stop at the same step, so they ask JAX's coordination service, which is told of
    a SIGTERM to any of them.
    """

    def __init__(self) -> None:
        self.signalled = False
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._remember)

    def _remember(self, *_: Any) -> None:
        self.signalled = True

    def asked(self, step: int) -> bool:
        """Whether to stop before the next step; all processes get the same answer."""
        if jax.process_count() == 1:
            return self.signalled
        return multihost_utils.reached_preemption_sync_point(step)


PROFILED = 5
"""Steps in a profiler trace."""


def release(setup: TrainingSetup, params: Params, folder: Path) -> None:
    """Write the trained model as a release folder."""
    start = setup.start
    tensors = model_tensors(nnx.merge(setup.graph, params))
    if start.release is not None:
        codec, files = start.release.codec_tensors(), start.release.tokenizer_files()
        checkpoint.save_release(folder, start.config, tensors, codec, files)
        return
    codec = {name: LazyTensor.of(np.asarray(value)) for name, value in start.codec().params().items()}
    with tempfile.TemporaryDirectory() as made:
        tokenizer, settings = (Path(made) / name for name in checkpoint.TOKENIZER_FILES)
        start.tokenizer.save(str(tokenizer))
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        checkpoint.save_release(folder, start.config, tensors, codec, [tokenizer, settings])
