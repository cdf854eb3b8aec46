"""Whole runs: train, stop, kill, resume, start the next stage, release."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from omni_jax import config as configs
from omni_jax.checkpoint import open_release
from omni_jax.config import PRESETS, ConfigError, RunConfig
from omni_jax.data.records import Exchange, Writer
from omni_jax.tensorfile import CheckpointError
from omni_jax.training import loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "tiny"
    rng = np.random.default_rng(0)
    with Writer(folder) as writer:
        for index in range(8):
            writer.write(
                Exchange(
                    question_text=f"q{index}",
                    question_audio=rng.integers(-3000, 3000, 4000 + 800 * index).astype(np.int16),
                    answer_text=f"a{index}",
                    answer_codes=rng.integers(0, PRESETS["tiny"].vocab.audio, (4 + index, 7)),
                    source="noise",
                )
            )
    return folder


def run_values(out: Path, records: Path, steps: int = 6, **changes) -> dict:
    values = {
        "out": str(out),
        "start": "preset:tiny",
        "learn": ["adapter", "trunk", "audio_embedding"],
        "data": {
            "sources": [{"path": str(records)}],
            "held_out": [{"path": str(records)}],
            "tasks": {"A1A2": 2, "A1T1": 1, "T1A1": 1},
            "batch": 8,
            "length": 128,
            "clips": 4,
            "workers": 0,
        },
        "optimizer": {"steps": steps, "peak": 3e-3, "warmup": 2},
        "loss": {"chunk": 64},
        "remat": "none",
        "checkpoint": {"every": 2, "keep": 2},
        "log_every": 1,
        "samples": 1,
    }
    return {**values, **changes}


def run_config(out: Path, records: Path, **changes) -> RunConfig:
    return configs.build(RunConfig, run_values(out, records, **changes), "test")


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, records: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert loop.train(run_config(out, records)) == out / "release"
    return out


def spawn(config: dict, folder: Path, *extra: str) -> subprocess.Popen:
    """`train.py` as a process of its own, on 8 virtual devices like this one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump(config))
    with (folder / f"{file.stem}.log").open("w") as log:
        return subprocess.Popen([sys.executable, "train.py", str(file), *extra], cwd=ROOT, stdout=log, stderr=log)


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and max(losses(out), default=0) >= step:
            return
        assert process.poll() is None, f"train.py ended early with {process.returncode}"
        time.sleep(0.05)
    raise AssertionError("no progress")


def test_a_run_leaves_metrics_checkpoints_and_a_release(finished: Path):
    found = losses(finished)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir() if p.name.isdigit()) == [4, 6]
    release = open_release(finished / "release")
    assert release.config == PRESETS["tiny"]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    held_out = next(line for line in lines if "held_out/A1A2/loss/text" in line)
    assert "held_out/T1A1/loss/audio_6" in held_out
    assert "held_out/T1A1/loss/text" not in held_out
    assert list((finished / "tensorboard").glob("events*"))


def test_the_ear_and_the_text_rows_are_bit_identical_after_training(finished: Path):
    from omni_jax.checkpoint import init_model, model_tensors

    stacked, dtype = loop.default_layout()
    mesh = loop.sharding.make_mesh(8)
    before = model_tensors(init_model(PRESETS["tiny"], stacked=stacked, dtype=dtype, seed=0, mesh=mesh))
    after = open_release(finished / "release").model_tensors()
    changed = {name for name, tensor in after.items() if not np.array_equal(tensor.read(), before[name].read())}
    assert not {name for name in changed if name.startswith(("ear.", "embed.text"))}
    assert {name.split(".")[0] for name in changed} == {"adapter", "trunk", "norm", "embed"}


def test_a_finished_run_is_not_run_again(finished: Path, records: Path):
    before = (finished / "metrics.jsonl").read_text()
    assert loop.train(run_config(finished, records)) == finished / "release"
    assert (finished / "metrics.jsonl").read_text() == before


def test_the_next_stage_starts_from_a_run(finished: Path, records: Path, tmp_path: Path):
    config = run_config(tmp_path / "next", records, steps=1, start=str(finished), learn=["trunk", "text_embedding"])
    setup = loop.Setup.of(config)
    assert setup.start.release is not None
    assert setup.start.release.folder == finished / "release"


def test_a_run_that_has_not_finished_is_no_start(tmp_path: Path, records: Path):
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="not finished"):
        loop.Setup.of(run_config(tmp_path / "next", records, start=str(tmp_path / "half")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3}}, "8 devices"),
        ({"mesh": {"fsdp": 3}}, "8 devices"),
        ({"start": "preset:nothing"}, "preset"),
        ({"learn": ["tts_adapter"]}, "tts_adapter"),
    ],
)
def test_a_run_that_cannot_be_says_which_field(tmp_path: Path, records: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        loop.Setup.of(run_config(tmp_path / "x", records, **changes))


def test_describe_counts_what_learns(tmp_path: Path, records: Path):
    text = loop.describe(run_config(tmp_path / "x", records))
    assert "learns" in text
    assert "frozen" in text
    assert str(len(jax.devices())) in text
    assert not (tmp_path / "x").exists()


def test_a_run_goes_on_on_another_mesh(finished: Path, records: Path, tmp_path: Path):
    out = tmp_path / "moved"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("release", "6", "tensorboard"))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    assert dict(loop.mesh_of(run_config(finished, records)).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    loop.train(run_config(out, records, mesh={"data": 2, "fsdp": 2, "tensor": 2}, samples=0))
    mine, theirs = losses(out), losses(finished)
    assert sorted(mine) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([mine[5], mine[6]], [theirs[5], theirs[6]], rtol=1e-5)
    tensors = (open_release(folder / "release").model_tensors() for folder in (out, finished))
    for moved, whole in zip(*(x.values() for x in tensors), strict=True):
        np.testing.assert_allclose(moved.read(), whole.read(), atol=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run_bit_for_bit(finished: Path, records: Path, tmp_path: Path):
    out = tmp_path / "killed"
    values = run_values(out, records, steps=6)
    first = spawn(values, tmp_path / "logs")
    wait_for_step(out, 3, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = spawn(values, tmp_path / "logs")
    assert second.wait(timeout=280) == 0, (tmp_path / "logs" / "1.log").read_text()
    assert losses(out) == losses(finished)
    mine, whole = (open_release(folder / "release").model_tensors() for folder in (out, finished))
    for name, tensor in whole.items():
        np.testing.assert_array_equal(mine[name].read(), tensor.read(), err_msg=name)


@pytest.mark.slow
def test_killed_during_a_save_loses_no_more_than_the_steps_since_the_last(
    finished: Path, records: Path, tmp_path: Path
):
    out = tmp_path / "killed"
    values = run_values(out, records, steps=6, checkpoint={"every": 1, "keep": 2})
    first = spawn(values, tmp_path / "logs")
    deadline = time.monotonic() + 240
    saved = out / "checkpoints" / "2"

    def half_saved() -> list[Path]:
        # A save has another name until it is whole.
        return list((out / "checkpoints").glob("*tmp*")) if saved.exists() else []

    while True:
        assert first.poll() is None, "every save was over before the process could be held"
        assert time.monotonic() < deadline
        if not half_saved():
            continue
        # A save may be over sooner than a signal arrives: hold the process still, and look again.
        first.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        if half_saved():
            break
        first.send_signal(signal.SIGCONT)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert half_saved()
    second = spawn(values, tmp_path / "logs")
    assert second.wait(timeout=280) == 0, (tmp_path / "logs" / "1.log").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps.count(1) == steps.count(2) == 1, "began before its last checkpoint"
    assert losses(out) == losses(finished)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(records: Path, tmp_path: Path):
    out = tmp_path / "stopped"
    values = run_values(out, records, steps=100_000, checkpoint={"every": 10_000, "keep": 2})
    process = spawn(values, tmp_path / "logs")
    wait_for_step(out, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0, (tmp_path / "logs" / "0.log").read_text()
    saved = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [max(losses(out))]
    assert not (out / "release").exists()


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_stop_together(finished: Path, records: Path, tmp_path: Path):
    """2 processes x 4 devices: the same metrics as 8 devices of one process would have on the same rows."""
    out = tmp_path / "two"
    values = run_values(out, records, steps=100_000, checkpoint={"every": 10_000, "keep": 2}, samples=0)
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4")}
    environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(values))
    processes = []
    for index in range(2):
        command = [sys.executable, "train.py", str(file), "--coordinator", "localhost:12357"]
        command += ["--processes", "2", "--process", str(index)]
        with (tmp_path / f"{index}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    wait_for_step(out, 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    for index, process in enumerate(processes):
        assert process.wait(timeout=180) == 0, (tmp_path / f"{index}.log").read_text()
    saved = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(saved) == 1
    assert saved[0] >= 2
