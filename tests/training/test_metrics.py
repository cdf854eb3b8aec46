"""Rates, skipped steps and FLOPs that a run reports."""

import json
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from omni_jax.errors import TrainingError
from omni_jax.training.batches import ShardedBatch
from omni_jax.training.goodput import WAITING, Goodput
from omni_jax.training.metrics import (
    METRICS,
    WANDB_ID,
    MetricsWriter,
    Tally,
    log_step,
    model_flops,
    peak_flops,
    read_metrics,
)
from omni_jax.training.progress import Progress
from omni_jax.training.setup import TrainingSetup
from tests.training.test_step import run_config


@pytest.fixture(scope="module")
def setup() -> TrainingSetup:
    return TrainingSetup.of(replace(run_config(trainable=("adapter",)), max_skipped_steps=3))


class Clock:
    """Replaces `time.perf_counter`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_tally_rates_leave_out_what_is_not_a_step(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    goodput = Goodput()
    with goodput.measure("compiling"):
        clock.now += 50.0
    tally = Tally(goodput)
    for _ in range(4):
        tally.add(ShardedBatch({}, positions=30, capacity=40))
    with goodput.measure(WAITING):
        clock.now += 2.0
    with goodput.measure("evaluation"):
        clock.now += 30.0
    clock.now += 6.0
    assert tally.rates(num_readers=2) == {
        "seconds_per_step": 2.0,
        "positions_per_second": 30.0,
        "padding_fraction": 0.25,
        "data_wait_fraction": 0.25,
    }
    assert goodput.summary() == (
        "goodput of 0:01:28: steps 6.8%, compiling 56.8%, waiting for data 2.3%, evaluation 34.1%"
    )


def test_goodput_phase_logs_its_duration(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    clock = Clock(monkeypatch)
    with caplog.at_level("INFO"), Goodput().phase("evaluation", "evaluating at step 5"):
        clock.now += 1.25
    assert [record.message for record in caplog.records] == ["evaluating at step 5 ...", "evaluating at step 5: 1.2 s"]


def test_progress_logs_lines_where_stderr_is_no_terminal(caplog: pytest.LogCaptureFixture):
    progress = Progress(0, 100)
    with caplog.at_level("INFO"):
        progress.update(10, 2.0, {"loss": "3.210"})
        progress.update(20, 1.0, {"loss": "3.100"})
    progress.close()
    # The time left is that of 80 steps of 1.7 s: the newest interval weighs 0.3.
    assert [record.message for record in caplog.records] == [
        "step 10/100: loss 3.210, s/step 2, left 0:03:00",
        "step 20/100: loss 3.100, s/step 1, left 0:02:16",
    ]


def test_metrics_writer_of_a_resumed_run_drops_lines_after_its_checkpoint(setup: TrainingSetup, tmp_path: Path):
    config = replace(setup.config, out=str(tmp_path))
    lines = [{"step": 2, "loss": 1.0}, {"step": 2, "held_out/loss": 3.0}, {"step": 3, "loss": 0.5}]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    with closing(MetricsWriter(config, 2)) as writer:
        assert writer.evaluations == lines[1:2]
        writer.scalars(3, {"loss": 0.25})
    found = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert found == [*lines[:2], {"step": 3, "loss": 0.25}]


def test_metrics_writer_keeps_one_run_at_weights_and_biases(
    setup: TrainingSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[dict] = []
    fake = SimpleNamespace(init=lambda **options: started.append(options) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = replace(setup.config, out=str(tmp_path), wandb="project")
    for _ in range(2):
        MetricsWriter(config, 0).close()
    assert started[0]["project"] == "project"
    assert started[0]["id"] == started[1]["id"] == (tmp_path / WANDB_ID).read_text().strip()
    assert {options["resume"] for options in started} == {"allow"}


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
        log_step(setup, writer, 7, metrics, Tally(Goodput()), {})


def test_model_flops_counts_trainable_and_frozen_parameters(setup: TrainingSetup):
    adapter = 96 * (2 * 32 + 48)
    everything = TrainingSetup.of(run_config(trainable=("adapter", "trunk", "text_embedding", "audio_embedding")))
    frozen = model_flops(everything, 1.0) / 6 - adapter
    assert model_flops(setup, 10.0) == pytest.approx(10 * (6 * adapter + 4 * frozen))
    assert peak_flops(setup.mesh) is None


def test_read_metrics_leaves_out_damaged_lines(tmp_path: Path) -> None:
    whole = b'{"step": 1}\n{"step": 3}\n{"step": 2}\n'
    (tmp_path / METRICS).write_bytes(b'\xff{"step": 1}\n5\n{}\n{"step": null}\n' + b"[" * 50_000 + b"\n\0\0\n" + whole)
    assert read_metrics(tmp_path / METRICS, 2) == [{"step": 1}, {"step": 2}]
