"""TODO: omni_jax/training/evaluation.py"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax import sharding
from omni_jax.api import Omni, Request
from omni_jax.audio.io import SAMPLE_RATE
from omni_jax.codec.snac import make_decoder
from omni_jax.data import pipeline
from omni_jax.data.records import Records, from_bytes
from omni_jax.errors import AudioError, ConfigError
from omni_jax.tasks import Task
from omni_jax.training.batches import shard_batch
from omni_jax.training.metrics import HEADS, MetricsWriter
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import Params
from omni_jax.training.step import Batch, forward


class HeldOutEvaluation:
    """Losses of the held-out exchanges per task and head, and a few of them answered aloud."""

    def __init__(self, setup: TrainingSetup):
        self.setup = setup

        def sums(params: Params, batch: Batch) -> dict[str, jax.Array]:
            # The sums don't depend on the weights of the heads in the loss, nor so on how many targets there are.
            return forward(nnx.merge(setup.graph, params), batch, jnp.ones(len(HEADS)), setup.config)[1]

        self.sums = jax.jit(sums, out_shardings=sharding.replicated(setup.mesh))

    def __call__(self, step: int, params: Params, report: MetricsWriter) -> None:
        """Evaluate parameters; nothing happens when the run holds nothing out."""
        config, start = self.setup.config, self.setup.start
        if not config.data.held_out:
            return
        numbers: dict[str, float] = {}
        share, shares = row_share(self.setup.mesh, jax.process_index())
        for task in config.data.tasks:
            only = dataclasses.replace(config.data, tasks={task: 1.0})
            batches = pipeline.held_out(only, start.config, start.tokenizer, process_index=share, process_count=shares)
            total: dict[str, np.ndarray] = {}
            for batch in batches:
                found = jax.device_get(self.sums(params, shard_batch(batch, self.setup.mesh).arrays))
                total = {name: total.get(name, 0.0) + value for name, value in found.items()}
            for index, name in enumerate(HEADS):
                if total and total["count"][index]:
                    numbers[f"held_out/{task}/loss/{name}"] = float(total["loss"][index] / total["count"][index])
                    numbers[f"held_out/{task}/accuracy/{name}"] = float(total["correct"][index] / total["count"][index])
        report.scalars(step, numbers)
        # Decoding is driven by one host: a pod evaluates its release afterwards.
        if jax.process_count() == 1 and config.num_samples:
            self._answer(step, params, report)

    def _answer(self, step: int, params: Params, report: MetricsWriter) -> None:
        start = self.setup.start
        omni = Omni(nnx.merge(self.setup.graph, params), make_decoder(start.codec()), start.tokenizer)
        records = Records(self.setup.config.data.held_out[0].path)
        for index in range(min(self.setup.config.num_samples, len(records))):
            exchange = from_bytes(records[index], codebook_size=start.config.vocab.audio)
            if exchange.question_audio is not None:
                ask = Request(audio=exchange.question_audio, sample_rate=SAMPLE_RATE)
            elif exchange.question_text:
                ask = Request(text=exchange.question_text)
            else:
                ask = Request(text=exchange.answer_text, task=Task.T1A1)
            try:
                reply = omni.batch([ask], max_steps=MAX_SAMPLE_STEPS)[0]
            except (AudioError, ConfigError) as error:
                report.say(f"sample {index} is left out: {error}")
                continue
            report.sample(step, str(index), exchange.question_text, exchange.answer_text, reply)


MAX_SAMPLE_STEPS = 256
"""Longest sample answer: 21 s."""
