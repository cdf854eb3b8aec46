"""Rates, skipped steps and FLOPs that a run reports."""

import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from omni_jax.errors import TrainingError
from omni_jax.training.batches import ShardedBatch
from omni_jax.training.metrics import METRICS, MetricsWriter, Tally, log_step, model_flops, peak_flops
from omni_jax.training.setup import TrainingSetup
from tests.training.test_step import run_config


@pytest.fixture(scope="module")
def setup() -> TrainingSetup:
    return TrainingSetup.of(replace(run_config(trainable=("adapter",)), max_skipped_steps=3))


def test_tally_rates(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    tally = Tally(start=now)
    for _ in range(4):
        tally.add(ShardedBatch({}, positions=30, capacity=40))
    with tally.waiting():
        now += 2.0
    now += 6.0
    assert tally.rates(num_readers=2) == {
        "seconds_per_step": 2.0,
        "positions_per_second": 30.0,
        "padding_fraction": 0.25,
        "data_wait_fraction": 0.25,
    }


@pytest.mark.parametrize("left", ["", '{"step": 2, "lo', "\x00\x00"])
def test_metrics_writer_drops_the_half_line_that_a_full_disk_left(tmp_path: Path, setup: TrainingSetup, left: str):
    file = tmp_path / METRICS
    file.write_text('{"step": 1, "loss": 2.0}\n' + left)
    with closing(MetricsWriter(replace(setup.config, out=str(tmp_path)), 1)) as writer:
        writer.scalars(2, {"loss": 1.0})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
    ]


def test_log_step_refuses_max_skipped_steps_in_a_row(setup: TrainingSetup):
    metrics = {"num_skipped_in_a_row": 3}
    writer = None
    with pytest.raises(TrainingError, match="steps 5 to 7: the loss or its gradient was not finite 3 times in a row"):
        log_step(setup, writer, 7, metrics, Tally(), {})


def test_model_flops_counts_trainable_and_frozen_parameters(setup: TrainingSetup):
    adapter = 96 * (2 * 32 + 48)
    everything = TrainingSetup.of(run_config(trainable=("adapter", "trunk", "text_embedding", "audio_embedding")))
    frozen = model_flops(everything, 1.0) / 6 - adapter
    assert model_flops(setup, 10.0) == pytest.approx(10 * (6 * adapter + 4 * frozen))
    assert peak_flops(setup.mesh) is None
