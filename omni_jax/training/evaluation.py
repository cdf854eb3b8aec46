"""Evaluation on held-out exchanges during training: losses per task and head, and a few sample answers."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax import sharding
from omni_jax.api import Omni, Request, Turn
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.codec.snac import make_decoder
from omni_jax.data import pipeline
from omni_jax.data.records import Exchange, Records, from_bytes
from omni_jax.errors import AudioError, ConfigError
from omni_jax.tasks import Task
from omni_jax.training.batches import shard_batch
from omni_jax.training.loss import HEADS, Sums
from omni_jax.training.metrics import MetricsWriter
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import Params
from omni_jax.training.step import Batch, forward

logger = logging.getLogger(__name__)

MAX_SAMPLE_STEPS = 256
"""Decode steps of the longest sample answer: 21 s."""


class HeldOutEvaluation:
    """Evaluates parameters on the held-out records of a run; does nothing if the run has none."""

    def __init__(self, setup: TrainingSetup):
        self.setup = setup

        def sums(params: Params, batch: Batch) -> Sums:
            # The sums depend neither on the weights of the heads in the loss nor on the number of targets.
            return forward(nnx.merge(setup.graph, params), batch, jnp.ones(len(HEADS)), setup.config)[1]

        self.sums = jax.jit(sums, out_shardings=sharding.replicated(setup.mesh))

    def __call__(self, step: int, params: Params, writer: MetricsWriter) -> None:
        """Evaluate all parameters of the model, and write the metrics and sample answers."""
        config = self.setup.config
        if not config.data.held_out:
            return
        numbers: dict[str, float] = {}
        for task in config.data.tasks:
            total = self._total(task, params)
            for index, name in enumerate(HEADS):
                if total and total["count"][index]:
                    numbers[f"held_out/{task}/loss/{name}"] = float(total["loss"][index] / total["count"][index])
                    numbers[f"held_out/{task}/accuracy/{name}"] = float(total["correct"][index] / total["count"][index])
        writer.scalars(step, numbers)
        # Decoding is driven by one process: on a pod, the release is evaluated after training.
        if jax.process_count() == 1 and config.num_samples:
            self._write_samples(step, params, writer)

    def _total(self, task: str, params: Params) -> dict[str, np.ndarray]:
        """The sums of one task over all held-out records; empty if none serves it."""
        config, start, mesh = self.setup.config, self.setup.start, self.setup.mesh
        share, num_shares = row_share(mesh, jax.process_index())
        data = replace(config.data, tasks={task: 1.0})
        batches = pipeline.held_out(data, start.config, start.tokenizer, process_index=share, process_count=num_shares)
        total: dict[str, np.ndarray] = {}
        for batch in batches:
            arrays = shard_batch(batch, mesh).arrays
            with jax.set_mesh(mesh):
                sums = self.sums(params, arrays)
            total = {name: total.get(name, 0.0) + value for name, value in jax.device_get(sums).items()}
        return total

    def _write_samples(self, step: int, params: Params, writer: MetricsWriter) -> None:
        start = self.setup.start
        omni = Omni(nnx.merge(self.setup.graph, params), make_decoder(start.codec()), start.tokenizer)
        records = Records(self.setup.config.data.held_out[0].path)
        for index in range(min(self.setup.config.num_samples, len(records))):
            exchange = from_bytes(records[index], codebook_size=start.config.vocab.audio)
            try:
                reply = omni.generate(_request(exchange), max_steps=MAX_SAMPLE_STEPS)
            except (AudioError, ConfigError) as error:
                logger.warning("sample %d is skipped: %s", index, error)
                continue
            writer.sample(step, str(index), exchange.question_text, exchange.answer_text, reply)


def _request(exchange: Exchange) -> Request:
    """The question of an exchange; without one, its answer to be read aloud."""
    history = [Turn(turn.question, turn.answer) for turn in exchange.history]
    if exchange.question_audio is not None:
        audio = exchange.question_audio
        return Request(audio=audio, sample_rate=SAMPLE_RATE, system=exchange.system, history=history)
    if exchange.question_text:
        return Request(text=exchange.question_text, system=exchange.system, history=history)
    return Request(text=exchange.answer_text, task=Task.T1A1)
