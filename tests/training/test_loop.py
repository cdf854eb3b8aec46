"""Whole runs: train, stop, kill, resume, start the next stage, release."""

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.experimental import topologies

from omni_jax import sharding
from omni_jax.api import Omni
from omni_jax.checkpoint.release import open_release
from omni_jax.checkpoint.tensors import init_model, model_tensors
from omni_jax.codec.snac import make_decoder
from omni_jax.compile_report.topology import Topology
from omni_jax.config.load import build_config
from omni_jax.config.model import PRESETS
from omni_jax.config.run import RunConfig
from omni_jax.data.pipeline import REASONS
from omni_jax.data.records import Exchange, RecordWriter
from omni_jax.errors import CheckpointError, ConfigError, FolderInUseError, PeerLostError, TrainingError
from omni_jax.folder_lock import FolderLock
from omni_jax.training import checkpointing, loop
from omni_jax.training.checkpointing import Checkpoints, DataPosition, open_data
from omni_jax.training.checks import read_saved_run
from omni_jax.training.checksums import SUMS, find_damage, write_checksums
from omni_jax.training.describe import describe
from omni_jax.training.evaluation import HeldOutEvaluation
from omni_jax.training.loop import train
from omni_jax.training.metrics import MetricsWriter
from omni_jax.training.setup import TrainingSetup, make_run_mesh, row_share
from omni_jax.training.stop_signal import SIGNALS, StopSignal

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
        "trainable": ["adapter", "trunk", "audio_embedding"],
        "data": {
            "sources": [{"path": str(records)}],
            "held_out": [{"path": str(records)}],
            "tasks": {"A1A2": 2, "A1T1": 1, "T1A1": 1},
            "batch_size": 8,
            "max_length": 128,
            "max_clips": 4,
            "num_workers": 0,
        },
        "optimizer": {"steps": steps, "peak_lr": 3e-3, "warmup_steps": 2},
        "loss": {"chunk_size": 64},
        "remat": "none",
        "checkpoint": {"save_interval_steps": 2, "max_to_keep": 2},
        "log_interval_steps": 1,
        "evaluation": {"num_samples": 1},
    }
    return {**values, **changes}


def run_config(out: Path, records: Path, **changes) -> RunConfig:
    return build_config(RunConfig, run_values(out, records, **changes), "test")


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, records: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run_config(out, records)) == out / "release"
    return out


def whole_checkpoints(out: Path) -> list[str]:
    """Names of the checkpoints that have their hashes, which are written last."""
    return [path.parent.name for path in (out / "checkpoints").glob("*/SHA256SUMS") if path.parent.name.isdecimal()]


def spawn(
    config: dict, folder: Path, *extra: str, environment: dict[str, str] | None = None, name: str | None = None
) -> subprocess.Popen:
    """`train.py` as a process of its own, by default on 8 virtual devices like this one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name or len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "train.py", str(file), *extra]
    with (folder / f"{file.stem}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and max(losses(out), default=0) >= step:
            return
        assert process.poll() is None, f"train.py ended early with {process.returncode}"
        time.sleep(0.05)
    raise AssertionError("no progress")


def test_train_writes_metrics_checkpoints_and_release(finished: Path):
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
    # All metrics that docs/training.md lists, and no others.
    heads = [*(f"audio_{codebook}" for codebook in range(7)), "text"]
    names = {name for line in lines if "loss" in line for name in line} - {f"loss/{head}" for head in heads}
    assert names - {f"accuracy/{head}" for head in heads} - {f"skipped_records/{reason}" for reason in REASONS} == {
        "step",
        "loss",
        "grad_norm",
        "update_norm",
        "param_norm",
        "learning_rate",
        "skipped_steps",
        "seconds_per_step",
        "positions_per_second",
        "audio_seconds_per_second",
        "padding_fraction",
        "data_wait_fraction",
        "model_flops_per_second",
    }


def test_train_leaves_frozen_audio_encoder_and_text_embedding_bit_identical(finished: Path):
    stacked, dtype = sharding.default_layout()
    mesh = sharding.make_mesh(8)
    before = model_tensors(init_model(PRESETS["tiny"], stacked=stacked, dtype=dtype, seed=0, mesh=mesh))
    after = open_release(finished / "release").model_tensors()
    changed = {name for name, tensor in after.items() if not np.array_equal(tensor.read(), before[name].read())}
    assert not {name for name in changed if name.startswith(("audio_encoder.", "embed.text"))}
    assert {name.split(".")[0] for name in changed} == {"adapter", "trunk", "norm", "embed"}


def test_train_does_not_repeat_a_finished_run(finished: Path, records: Path):
    before = (finished / "metrics.jsonl").read_text()
    assert train(run_config(finished, records)) == finished / "release"
    assert (finished / "metrics.jsonl").read_text() == before


def test_train_refuses_a_folder_that_another_run_writes_to(records: Path, tmp_path: Path):
    out = tmp_path / "out"
    with (
        FolderLock(out, "omni-jax train"),
        pytest.raises(FolderInUseError, match=rf"{out}: expected one run at a time, found `omni-jax train` of .*"),
    ):
        train(run_config(out, records))
    assert not list(out.iterdir())


def test_train_says_what_it_cannot_write(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "run.yaml")

    monkeypatch.setattr(loop, "save_config", fail)
    with pytest.raises(TrainingError, match=r"run.yaml: Read-only file system; once that is repaired,"):
        train(run_config(tmp_path / "out", records))
    monkeypatch.undo()
    (tmp_path / "out" / "run.yaml").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"run.yaml: Is a directory; once that is repaired,"):
        train(run_config(tmp_path / "out", records))


def test_notice_lost_peer_tells_a_lost_process_from_other_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lost = "UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer\nmore"
    with (
        pytest.raises(PeerLostError, match=r"another process of the run has ended .*reset by peer\)$"),
        loop.notice_lost_peer(),
    ):
        raise jax.errors.JaxRuntimeError(lost)
    with pytest.raises(jax.errors.JaxRuntimeError), loop.notice_lost_peer():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.")
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(jax.errors.JaxRuntimeError), loop.notice_lost_peer():
        raise jax.errors.JaxRuntimeError(lost)


def test_finished_run_goes_on_with_more_steps_and_keeps_the_best_model(
    finished: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out = tmp_path / "longer"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("tensorboard"))
    before = (out / "release" / "model.safetensors").read_bytes()
    # As if the run had been killed between its last checkpoint and the evaluation.
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if "held_out" not in line))
    evaluation = {"num_samples": 0, "num_answers": 2, "max_batches": 1, "interval_steps": 2, "keep_best": "loss"}
    with caplog.at_level("INFO"):
        assert train(run_config(out, records, steps=8, evaluation=evaluation)) == out / "release"
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (out / "release" / "model.safetensors").read_bytes() != before
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line for line in found if "held_out/loss" in line}
    assert list(evaluations) == [6, 8]
    # As training weighs them: the shares of the tasks, and the sum over heads.
    last, heads = evaluations[8], [*(f"audio_{codebook}" for codebook in range(7)), "text"]
    total = sum(
        share * sum(last.get(f"held_out/{task}/loss/{head}", 0.0) for head in heads)
        for task, share in {"A1A2": 2, "A1T1": 1, "T1A1": 1}.items()
    )
    assert last["held_out/loss"] == pytest.approx(total / 4)
    # An untrained model transcribes nothing.
    assert last["held_out/wer"] > 0.5
    assert last["held_out/A1A2/answer_accuracy"] == last["held_out/answer_accuracy"] == 0.0
    best = min(evaluations, key=lambda step: evaluations[step]["held_out/loss"])
    tensors = {name: open_release(out / name).model_tensors() for name in ("best", "release")}
    same = all(np.array_equal(x.read(), tensors["release"][name].read()) for name, x in tensors["best"].items())
    assert same == (best == 8)
    messages = [record.message for record in caplog.records]
    for expected in (
        "resuming from step 6: ",
        "evaluating at step 6: ",
        "compiling the train step: ",
        "memory per device: ",
        "step 7/8: loss ",
        "evaluating at step 8: ",
        "held out: loss ",
        "writing the release: ",
        "goodput of ",
    ):
        assert any(message.startswith(expected) for message in messages), expected


def test_start_takes_the_run_folder_of_an_earlier_stage(finished: Path, records: Path, tmp_path: Path):
    config = run_config(tmp_path / "next", records, steps=1, start=str(finished), trainable=["trunk", "text_embedding"])
    setup = TrainingSetup.of(config)
    assert setup.start.release is not None
    assert setup.start.release.folder == finished / "release"


def test_start_refuses_an_unfinished_run(tmp_path: Path, records: Path):
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="not finished"):
        TrainingSetup.of(run_config(tmp_path / "next", records, start=str(tmp_path / "half")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3}}, "8 devices"),
        ({"mesh": {"fsdp": 3}}, "8 devices"),
        ({"start": "preset:nothing"}, "preset"),
        ({"trainable": ["tts_adapter"]}, "tts_adapter"),
    ],
)
def test_training_setup_names_the_field_that_does_not_fit(tmp_path: Path, records: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainingSetup.of(run_config(tmp_path / "x", records, **changes))


def chips(topology: str, slices: int) -> list[jax.Device]:
    """Devices of several slices as the TPU compiler knows them."""
    # This also tells libtpu that there are no chips on this machine.
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
def test_row_share_gives_every_row_to_one_reader(topology: str, slices: int, sizes: tuple[int, int, int], shares: int):
    devices = chips(topology, slices)
    mesh = sharding.make_mesh(*sizes, devices)
    hosts = sorted({device.process_index for device in devices})
    found = {host: row_share(mesh, host) for host in hosts}
    assert set(found.values()) == {(index, shares) for index in range(shares)}
    # Hosts that read the same rows are those whose chips hold them.
    grid = mesh.devices.reshape(sizes[0] * sizes[1], sizes[2])
    rows = {host: {r for r, row in enumerate(grid) for d in row if d.process_index == host} for host in hosts}
    for one in hosts:
        for other in hosts:
            assert (rows[one] == rows[other]) == (found[one] == found[other])
            assert rows[one] == rows[other] or not rows[one] & rows[other]


def test_make_run_mesh_splits_the_batch_over_slices(tmp_path: Path, records: Path):
    devices = chips("v5e:4x4", 2)
    mesh = sharding.make_mesh(4, 8, 1, devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    config = run_config(tmp_path / "out", records, mesh={"data": 1, "fsdp": 32})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=32))
    with pytest.raises(ConfigError, match="mesh: expected data to be a multiple of the 2 slices, found 1"):
        make_run_mesh(config, devices)


def test_describe_counts_trainable_and_frozen_parameters(tmp_path: Path, records: Path):
    setup = TrainingSetup.of(run_config(tmp_path / "x", records))
    rows = {line.split()[0]: line.split() for line in describe(setup).splitlines()}
    model = PRESETS["tiny"]
    # gate, up and down
    adapter = model.adapter.intermediate_size * (2 * model.audio_encoder.hidden_size * model.adapter.stack + 48)
    assert rows["adapter"][1:3] == [f"{adapter:,}", "trainable"]
    # 300 + 12 rows of 48
    assert rows["text_embedding"][1:3] == ["14,976", "frozen"]
    assert "on 8 x cpu" in " ".join(rows["mesh:"])
    assert not (tmp_path / "x").exists()


def test_open_data_reshuffles_for_another_number_of_readers(
    records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    setup = TrainingSetup.of(run_config(tmp_path / "out", records))

    def tokens(step: int, position: DataPosition | None) -> tuple[np.ndarray, int]:
        data, seed = open_data(setup, step, position)
        try:
            return next(data)["tokens"], seed
        finally:
            data.close()

    first, seed = tokens(0, None)
    assert seed == setup.config.seed
    of_two = DataPosition(seed, [{}, {}])
    other, new_seed = tokens(5, of_two)
    assert "read by 2 before, by 1 now: reshuffling" in caplog.text
    assert new_seed != seed
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(other, tokens(5, of_two)[0])
    # The new order is kept when the run is resumed again.
    data, _ = open_data(setup, 5, of_two)
    next(data)
    state = data.get_state()
    second = next(data)["tokens"]
    data.close()
    found, same = tokens(6, DataPosition(new_seed, [state]))
    assert same == new_seed
    np.testing.assert_array_equal(found, second)


def test_open_data_logs_on_process_0_only(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    setup = TrainingSetup.of(run_config(tmp_path / "out", records))
    monkeypatch.setattr(checkpointing, "row_share", lambda mesh, process: (0, 1))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    data, _ = open_data(setup, 5, DataPosition(0, [{}, {}]))
    data.close()
    assert not caplog.records


def test_train_stopped_at_once_saves_nothing(
    finished: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "stopped"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("release", "6", "tensorboard"))
    monkeypatch.setattr(StopSignal, "requested", lambda self, step: True)
    for interval in (2, 3):
        checkpoint = {"save_interval_steps": interval, "max_to_keep": 2}
        config = run_config(out, records, checkpoint=checkpoint, evaluation={"num_samples": 0})
        assert train(config) is None
    assert max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()) == 4


def copy_run(finished: Path, out: Path) -> Path:
    """The run as it was when it had all its checkpoints and no release yet."""
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("release", "tensorboard"))
    return out


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_train_moves_a_damaged_checkpoint_aside_and_goes_on_from_the_one_before(
    finished: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out = copy_run(finished, tmp_path / "damaged")
    newest = out / "checkpoints" / "6"
    flip_byte(max(newest.rglob("*"), key=lambda path: path.stat().st_size), 1000)
    (out / "checkpoints" / "9").mkdir()
    (out / "checkpoints" / "7").write_text("stray")
    (out / "metrics.jsonl").unlink()
    assert train(run_config(out, records, evaluation={"num_samples": 0})) == out / "release"
    assert losses(out) == {step: losses(finished)[step] for step in (5, 6)}
    assert sorted(path.name for path in (out / "damaged_checkpoints").iterdir()) == ["6-1", "7-1", "9-1"]
    warnings = [record.getMessage() for record in caplog.records if "whole checkpoint" in record.getMessage()]
    assert len(warnings) == 3
    assert warnings[0].startswith(f"{out}/checkpoints/9: expected a whole checkpoint, found no SHA256SUMS: move")
    assert warnings[1].startswith(f"{out}/checkpoints/7: expected a whole checkpoint, found a file: move")
    assert warnings[2].startswith(f"{out}/checkpoints/6: expected a whole checkpoint, found other bytes in ")
    assert warnings[2].endswith(f"move it to {out}/damaged_checkpoints/6-1, go on from the one before")
    # Those that were written again are whole.
    assert {find_damage(path) for path in (out / "checkpoints").iterdir()} == {None}


def test_flips_at_50_random_places_of_a_checkpoint_are_noticed(finished: Path):
    checkpoint = finished / "checkpoints" / "6"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    rng = np.random.default_rng(0)
    for place in rng.integers(0, sum(sizes), 50):
        index = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        at = int(place) - sum(sizes[:index])
        flip_byte(files[index], at)
        assert find_damage(checkpoint), f"{files[index]} at {at}"
        flip_byte(files[index], at)
    assert find_damage(checkpoint) is None


def test_checkpoints_begin_at_step_0_where_no_whole_one_is_left(
    finished: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out = copy_run(finished, tmp_path / "damaged")
    for step in (4, 6):
        flip_byte(out / "checkpoints" / str(step) / "state" / "manifest.ocdbt", 20)
    # Another one was moved aside before.
    (out / "damaged_checkpoints" / "4-1").mkdir(parents=True)
    with closing(Checkpoints(run_config(out, records), out)) as checkpoints:
        assert checkpoints.latest_step() is None
    assert "damaged_checkpoints/4-2, begin at step 0, as there is no other" in caplog.text


def test_checkpoints_of_another_configuration_are_refused(finished: Path, records: Path, tmp_path: Path):
    out = copy_run(finished, tmp_path / "other")
    config = run_config(out, records, trainable=["adapter"])
    with (
        closing(Checkpoints(config, out)) as checkpoints,
        pytest.raises(CheckpointError, match="checkpoints/6: expected the arrays of this configuration"),
    ):
        checkpoints.restore_or_init(TrainingSetup.of(config))


@pytest.mark.parametrize(
    "data", [None, {"seed": 1}, {"seed": 1, "states": [{"layout": 5}]}, {"seed": [], "states": []}]
)
def test_checkpoints_that_are_not_of_a_run_are_refused(
    finished: Path, records: Path, tmp_path: Path, data: dict | None
):
    """With the right hashes: made by someone, not damaged."""
    out = copy_run(finished, tmp_path / "other")
    folder = out / "checkpoints" / "6"
    if data is None:
        shutil.rmtree(folder / "state")
    else:
        (folder / "data" / "metadata").write_text(json.dumps(data))
    (folder / SUMS).unlink()
    write_checksums(folder, {})
    config = run_config(out, records)
    read_saved_run(out)
    with (
        closing(Checkpoints(config, out)) as checkpoints,
        pytest.raises(CheckpointError, match="checkpoints/6: expected"),
    ):
        checkpoints.restore_or_init(TrainingSetup.of(config))


def test_checkpoints_are_not_saved_where_there_is_no_room(
    finished: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = copy_run(finished, tmp_path / "full")
    setup = TrainingSetup.of(run_config(out, records))
    with closing(Checkpoints(setup.config, out)) as checkpoints:
        state, frozen, position = checkpoints.restore_or_init(setup)
        usage = shutil.disk_usage(out)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        with pytest.raises(
            TrainingError,
            match=r"/7: expected \d\.\d MB of free space .*, found 0.1 MB; .* from step 6",
        ):
            checkpoints.save(7, state, frozen, position)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["4", "6"]


def test_checkpoints_say_why_a_save_failed_and_keep_the_others(
    finished: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = copy_run(finished, tmp_path / "full")
    setup = TrainingSetup.of(run_config(out, records))

    def fail(folder: Path, known: dict[str, str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with closing(Checkpoints(setup.config, out)) as checkpoints:
        state, frozen, position = checkpoints.restore_or_init(setup)
        with monkeypatch.context() as patch:
            patch.setattr(checkpointing, "write_checksums", fail)
            checkpoints.save(7, state, frozen, position)
            while checkpoints._manager.is_saving_in_progress():
                time.sleep(0.01)
            with pytest.raises(TrainingError) as failed:
                checkpoints.check()
        assert str(failed.value) == (
            f"{out}/checkpoints/7: the checkpoint could not be saved: No space left on device; "
            "once it can be saved, the same command continues from step 6"
        )
        checkpoints.save(8, state, frozen, position)
    assert {path.name for path in (out / "checkpoints").iterdir() if find_damage(path) is None} == {"4", "6", "8"}


def test_a_sample_that_cannot_be_answered_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, PRESETS["tiny"].vocab.audio, (4, 7))
    with RecordWriter(tmp_path / "records") as writer:
        too_long = rng.integers(-3000, 3000, 40 * 16_000).astype(np.int16)
        writer.write(Exchange("q", too_long, "a", codes, "noise"))
        writer.write(Exchange("", None, "a", codes, "noise"))
        writer.write(Exchange("q", too_long[:8000], "a", codes, "noise"))
    data = {**run_values(tmp_path, tmp_path)["data"], "tasks": {"T1A1": 1}}
    data |= {"sources": [{"path": str(tmp_path / "records")}], "held_out": [{"path": str(tmp_path / "records")}]}
    setup = TrainingSetup.of(
        run_config(tmp_path / "out", tmp_path / "records", data=data, evaluation={"num_samples": 3})
    )
    model = setup.start.model(stacked=setup.stacked, dtype=setup.dtype, mesh=setup.mesh)
    (tmp_path / "out").mkdir()
    written: list[str] = []
    monkeypatch.setattr(MetricsWriter, "sample", lambda self, step, name, *_: written.append(name))
    omni = Omni(model, make_decoder(setup.start.codec()), setup.start.tokenizer)
    with closing(MetricsWriter(setup.config, 0)) as writer:
        HeldOutEvaluation(setup, tmp_path / "out")._write_samples(1, omni, writer)
    assert "sample 0 is skipped" in caplog.text
    assert written == ["1", "2"]


@pytest.mark.slow
def test_train_resumes_on_another_mesh(finished: Path, records: Path, tmp_path: Path):
    out = tmp_path / "moved"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("release", "6", "tensorboard"))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    assert dict(make_run_mesh(run_config(finished, records)).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    train(run_config(out, records, mesh={"data": 2, "fsdp": 2, "tensor": 2}, evaluation={"num_samples": 0}))
    mine, theirs = losses(out), losses(finished)
    assert sorted(mine) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([mine[5], mine[6]], [theirs[5], theirs[6]], rtol=1e-5)
    tensors = (open_release(folder / "release").model_tensors() for folder in (out, finished))
    for moved, whole in zip(*(x.values() for x in tensors), strict=True):
        np.testing.assert_allclose(moved.read(), whole.read(), atol=1e-5)


@pytest.mark.slow
def test_train_profiles_a_resumed_run(finished: Path, records: Path, tmp_path: Path):
    out = tmp_path / "resumed"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("release", "6", "tensorboard"))
    handlers = [signal.getsignal(number) for number in SIGNALS]
    train(
        run_config(out, records, evaluation={"num_samples": 0}, log_interval_steps=10),
        profile=str(tmp_path / "profile"),
    )
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    # The trace has ended: another one can start.
    with jax.profiler.trace(str(tmp_path / "other")):
        pass


@pytest.mark.slow
def test_run_killed_ten_times_at_random_after_its_first_checkpoint_has_the_same_losses(records: Path, tmp_path: Path):
    """On one device, whose compiled programs are kept: every start but the first takes seconds."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    checkpoint = {"save_interval_steps": 3, "max_to_keep": 2}

    def start(out: Path) -> subprocess.Popen:
        values = run_values(
            out, records, steps=100_000, checkpoint=checkpoint, evaluation={"num_samples": 0}, mesh={"data": 1}
        )
        return spawn(values, tmp_path / "logs", environment=environment)

    rng, out, whole = random.Random(0), tmp_path / "killed", tmp_path / "whole"
    for attempt in range(10):
        process = start(out)
        begun = max(map(int, whole_checkpoints(out)), default=0)
        while max(map(int, whole_checkpoints(out)), default=0) <= begun:
            assert process.poll() is None, (tmp_path / "logs" / f"{attempt}.log").read_text()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {step: {line["loss"] for line in lines if line["step"] == step and "loss" in line} for step in losses(out)}
    process = start(whole)
    wait_for_step(whole, max(found), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    expected = losses(whole)
    assert found == {step: {expected[step]} for step in found}


@pytest.mark.slow
def test_killed_and_resumed_run_is_bit_identical(finished: Path, records: Path, tmp_path: Path):
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
def test_run_killed_during_a_save_resumes_from_the_last_checkpoint(finished: Path, records: Path, tmp_path: Path):
    out = tmp_path / "killed"
    values = run_values(out, records, steps=6, checkpoint={"save_interval_steps": 1, "max_to_keep": 2})
    first = spawn(values, tmp_path / "logs")
    deadline = time.monotonic() + 240
    saved = out / "checkpoints" / "2"

    def half_saved() -> list[Path]:
        # A save has another name until it is complete.
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
    assert steps.count(1) == steps.count(2) == 1, "resumed from before its last checkpoint"
    assert losses(out) == losses(finished)


@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_the_run_within_5_s(records: Path, tmp_path: Path):
    out = tmp_path / "out"
    process = spawn(run_values(out, records), tmp_path / "logs")
    deadline = time.monotonic() + 120
    while not (out / "run.yaml").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Loading, tracing and compiling take seconds from here on.
    time.sleep(1)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert time.monotonic() - start < 5
    assert (tmp_path / "logs" / "0.log").read_text().count("stopped before the first step") == 1
    assert not (out / "checkpoints" / "1").exists()
    assert not (out / ".lock").exists()


@pytest.mark.slow
def test_run_that_cannot_write_any_more_says_so_and_resumes(finished: Path, records: Path, tmp_path: Path):
    out = tmp_path / "full"
    values = run_values(
        out, records, evaluation={"num_samples": 0}, checkpoint={"save_interval_steps": 1, "max_to_keep": 2}
    )
    process = spawn(values, tmp_path / "logs")
    wait_for_step(out, 2, process)
    # From now on no file may be larger than 100 kB, more than the log needs, as if the disk were full.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    assert process.wait(timeout=120) == 2
    shown = (tmp_path / "logs" / "0.log").read_text()
    assert "File too large; once" in shown
    assert "Traceback" not in shown
    assert not (out / ".lock").exists()
    assert spawn(values, tmp_path / "logs").wait(timeout=280) == 0, (tmp_path / "logs" / "1.log").read_text()
    assert losses(out) == losses(finished)


def spawn_two(
    values: dict, folder: Path, name: str, port: int, *extra: str
) -> tuple[list[subprocess.Popen], list[Path]]:
    """The two processes of a run, with four devices each, and their logs."""
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4")}
    environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    processes, logs = [], []
    for index in range(2):
        options = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(index), *extra]
        processes.append(spawn(values, folder, *options, environment=environment, name=f"{name}{index}"))
        logs.append(folder / f"{name}{index}.log")
    return processes, logs


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_with_75(records: Path, tmp_path: Path):
    out, checkpoint = tmp_path / "stopped", {"save_interval_steps": 10_000, "max_to_keep": 2}

    def start(name: str, port: int, steps: int) -> tuple[list[subprocess.Popen], list[Path]]:
        values = run_values(out, records, steps=steps, checkpoint=checkpoint, evaluation={"num_samples": 0})
        return spawn_two(values, tmp_path / "logs", name, port)

    processes, logs = start("first", 12357, 100_000)
    wait_for_step(out, 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=180) == 75, log.read_text()
    saved = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(saved) == 1
    assert saved[0] >= 2
    # Each process finds its own position in the data.
    processes, logs = start("second", 12358, saved[0] + 2)
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=180) == 0, log.read_text()
        assert "reshuffling" not in log.read_text()
    assert sorted(losses(out)) == list(range(1, saved[0] + 3))
    assert (out / "release").is_dir()


@pytest.mark.slow
def test_run_of_two_processes_says_that_one_is_lost_and_goes_on_from_a_whole_checkpoint(records: Path, tmp_path: Path):
    out, checkpoint = tmp_path / "lost", {"save_interval_steps": 2, "max_to_keep": 3}

    def start(name: str, port: int, steps: int, *extra: str) -> tuple[list[subprocess.Popen], list[Path]]:
        values = run_values(out, records, steps=steps, checkpoint=checkpoint, evaluation={"num_samples": 0})
        return spawn_two(values, tmp_path / "logs", name, port, *extra)

    processes, logs = start("first", 12359, 100_000, "--heartbeat-timeout", "20")
    while len(whole_checkpoints(out)) < 2:
        assert {process.poll() for process in processes} == {None}, logs[0].read_text()
        time.sleep(0.05)
    processes[1].kill()
    killed = time.monotonic()
    assert processes[0].wait(timeout=60) == 75, logs[0].read_text()
    assert time.monotonic() - killed < 25
    assert logs[0].read_text().count("another process of the run has ended or cannot be reached") == 1
    processes[1].wait()
    assert not (out / ".lock").exists()

    before, newest = sorted(map(int, whole_checkpoints(out)))[-2:]
    flip_byte(out / "checkpoints" / str(newest) / "state" / "manifest.ocdbt", 30)
    processes, logs = start("second", 12360, newest + 2)
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=180) == 0, log.read_text()
    assert f"/{newest}: expected a whole checkpoint, found other bytes in state/manifest.ocdbt" in logs[0].read_text()
    assert "whole checkpoint" not in logs[1].read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps[-(newest + 2 - before) :] == list(range(before + 1, newest + 3))
