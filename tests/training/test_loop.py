"""Whole runs: train, stop, kill, resume, start the next stage, release."""

import dataclasses
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
from jax.experimental import topologies

from omni_jax import config as configs
from omni_jax import sharding
from omni_jax.checkpoint.release import open_release
from omni_jax.compile_report.topology import Topology
from omni_jax.config.model import PRESETS
from omni_jax.config.run import RunConfig
from omni_jax.data.records import Exchange, RecordWriter
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.training import loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "tiny"
    rng = np.random.default_rng(0)
    with RecordWriter(folder) as writer:
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
    from omni_jax.checkpoint.tensors import init_model, model_tensors

    stacked, dtype = loop.default_layout()
    mesh = loop.sharding.make_mesh(8)
    before = model_tensors(init_model(PRESETS["tiny"], stacked=stacked, dtype=dtype, seed=0, mesh=mesh))
    after = open_release(finished / "release").model_tensors()
    changed = {name for name, tensor in after.items() if not np.array_equal(tensor.read(), before[name].read())}
    assert not {name for name in changed if name.startswith(("audio_encoder.", "embed.text"))}
    assert {name.split(".")[0] for name in changed} == {"adapter", "trunk", "norm", "embed"}


def test_a_finished_run_is_not_run_again(finished: Path, records: Path):
    before = (finished / "metrics.jsonl").read_text()
    assert loop.train(run_config(finished, records)) == finished / "release"
    assert (finished / "metrics.jsonl").read_text() == before


def test_the_next_stage_starts_from_a_run(finished: Path, records: Path, tmp_path: Path):
    config = run_config(tmp_path / "next", records, steps=1, start=str(finished), trainable=["trunk", "text_embedding"])
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


def chips(topology: str, slices: int) -> list[jax.Device]:
    """Those of several slices as the TPU compiler knows them."""
    # This also tells the compiler's library that no chips are here.
    one = Topology.parse(topology).devices()
    return one if slices == 1 else list(topologies.get_topology_desc(topology, "tpu", num_slices=slices).devices)


@pytest.mark.parametrize(
    ("topology", "slices", "sizes", "shares"),
    [
        # A host has a square of 2 x 2 chips.
        ("v5e:16x16", 1, (32, 8, 1), 64),
        ("v5e:4x4", 1, (16, 1, 1), 4),
        ("v5e:4x4", 1, (2, 4, 2), 4),
        ("v5p:4x4x4", 1, (1, 64, 1), 16),
        # Hosts of four share a row.
        ("v5e:4x4", 1, (4, 1, 4), 2),
        ("v5e:4x4", 1, (1, 2, 8), 2),
        ("v5e:4x4", 2, (4, 8, 1), 8),
    ],
)
def test_the_hosts_of_a_slice_read_every_row_once(topology: str, slices: int, sizes: tuple[int, int, int], shares: int):
    devices = chips(topology, slices)
    mesh = sharding.make_mesh(*sizes, devices)
    hosts = sorted({device.process_index for device in devices})
    found = {host: loop.row_share(mesh, host) for host in hosts}
    assert set(found.values()) == {(index, shares) for index in range(shares)}
    # Those that read the same rows have chips that these lie on.
    grid = mesh.devices.reshape(sizes[0] * sizes[1], sizes[2])
    rows = {host: {r for r, row in enumerate(grid) for d in row if d.process_index == host} for host in hosts}
    for one in hosts:
        for other in hosts:
            assert (rows[one] == rows[other]) == (found[one] == found[other])
            assert rows[one] == rows[other] or not rows[one] & rows[other]


def test_slices_divide_the_batch(tmp_path: Path, records: Path):
    devices = chips("v5e:4x4", 2)
    mesh = sharding.make_mesh(4, 8, 1, devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    config = run_config(tmp_path / "out", records, mesh={"data": 1, "fsdp": 32})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=32))
    with pytest.raises(ConfigError, match="mesh: expected data to be a multiple of the 2 slices, found 1"):
        loop.mesh_of(config, devices)


def test_processes_are_told_apart_by_all_or_nothing(tmp_path: Path, records: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values(tmp_path / "out", records)))
    command = [sys.executable, "train.py", str(file), "--processes", "2", "--process", "0"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "expected all of --coordinator, --processes and --process, or none of them" in found.stderr
    assert not (tmp_path / "out").exists()


def test_describe_counts_what_learns(tmp_path: Path, records: Path):
    text = loop.describe(run_config(tmp_path / "x", records))
    assert "learns" in text
    assert "frozen" in text
    assert str(len(jax.devices())) in text
    assert not (tmp_path / "x").exists()


def test_other_readers_get_the_records_in_another_order(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    setup = loop.Setup.of(run_config(tmp_path / "out", records))

    def tokens(step: int, noted: dict | None) -> tuple[np.ndarray, int]:
        data, order = loop.open_data(setup, step, noted)
        try:
            return next(data)["tokens"], order
        finally:
            data.close()

    first, order = tokens(0, None)
    assert order == setup.config.seed
    other, anew = tokens(5, {"points": [{}, {}], "order": order})
    assert "2 readers before, 1 now: the records are shuffled anew" in capsys.readouterr().out
    assert anew != order
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(other, tokens(5, {"points": [{}, {}], "order": order})[0])
    # From then on this is the order, whenever the run goes on.
    data, _ = loop.open_data(setup, 5, {"points": [{}, {}], "order": order})
    next(data)
    point = data.get_state()
    second = next(data)["tokens"]
    data.close()
    found, same = tokens(6, {"points": [point], "order": anew})
    assert same == anew
    np.testing.assert_array_equal(found, second)


def test_a_run_that_is_stopped_at_once_has_nothing_to_save(
    finished: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "stopped"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("release", "6", "tensorboard"))
    monkeypatch.setattr(loop.Stop, "asked", lambda self, step: True)
    for every in (2, 3):
        config = run_config(out, records, checkpoint={"every": every, "keep": 2}, num_samples=0)
        assert loop.train(config) is None
    assert max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()) == 4


def test_a_sample_that_cannot_be_answered_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, PRESETS["tiny"].vocab.audio, (4, 7))
    with RecordWriter(tmp_path / "records") as writer:
        too_long = rng.integers(-3000, 3000, 40 * 16_000).astype(np.int16)
        writer.write(Exchange("q", too_long, "a", codes, "noise"))
        writer.write(Exchange("", None, "a", codes, "noise"))
        writer.write(Exchange("q", too_long[:8000], "a", codes, "noise"))
    data = {**run_values(tmp_path, tmp_path)["data"], "tasks": {"T1A1": 1}, "batch": 8}
    data |= {"sources": [{"path": str(tmp_path / "records")}], "held_out": [{"path": str(tmp_path / "records")}]}
    out = tmp_path / "out"
    loop.train(run_config(out, tmp_path / "records", steps=1, data=data, num_samples=3))
    assert "sample 0 is left out" in capsys.readouterr().out
    assert (out / "release").is_dir()


def test_a_run_goes_on_on_another_mesh(finished: Path, records: Path, tmp_path: Path):
    out = tmp_path / "moved"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("release", "6", "tensorboard"))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    assert dict(loop.mesh_of(run_config(finished, records)).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    loop.train(run_config(out, records, mesh={"data": 2, "fsdp": 2, "tensor": 2}, num_samples=0))
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
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4")}
    environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"

    def start(name: str, port: int, steps: int) -> tuple[list[subprocess.Popen], list[Path]]:
        values = run_values(out, records, steps=steps, checkpoint={"every": 10_000, "keep": 2}, num_samples=0)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        logs = [tmp_path / f"{name}{index}.log" for index in range(2)]
        processes = []
        for index, log in enumerate(logs):
            command = [sys.executable, "train.py", str(file), "--coordinator", f"localhost:{port}"]
            command += ["--processes", "2", "--process", str(index)]
            with log.open("w") as shown:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=shown, stderr=shown))
        return processes, logs

    processes, logs = start("first", 12357, 100_000)
    wait_for_step(out, 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=180) == 75, log.read_text()
    saved = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(saved) == 1
    assert saved[0] >= 2
    # Each finds where it stood.
    processes, logs = start("second", 12358, saved[0] + 2)
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=180) == 0, log.read_text()
        assert "shuffled anew" not in log.read_text()
    assert sorted(losses(out)) == list(range(1, saved[0] + 3))
    assert (out / "release").is_dir()
