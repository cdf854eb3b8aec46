"""What is wrong with a run is said before it writes anything."""

import importlib.util
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omni_jax.config.run import RunConfig
from omni_jax.data.records import Exchange, RecordWriter
from omni_jax.errors import ConfigError
from omni_jax.training import checks
from omni_jax.training.checkpointing import Checkpoints, DataPosition, open_data
from omni_jax.training.checks import check_run, is_finished, problems, read_saved_run, saved_steps
from omni_jax.training.loop import train
from omni_jax.training.setup import TrainingSetup
from tests.training.test_loop import records, run_config

__all__ = ["records"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, records: Path) -> tuple[RunConfig, Path]:
    """A run with a checkpoint of step 0."""
    out = tmp_path_factory.mktemp("runs") / "saved"
    config = run_config(out, records)
    setup = TrainingSetup.of(config)
    out.mkdir()
    with Checkpoints(config, out) as checkpoints:
        state, frozen, _ = checkpoints.restore_or_init(setup)
        data, seed = open_data(setup, 0, None)
        checkpoints.save(4, state, frozen, DataPosition(seed, [data.get_state()]))
        data.close()
    return config, out


def of(config: RunConfig, **changes) -> TrainingSetup:
    return TrainingSetup.of(replace(config, **changes))


def test_check_run_passes_what_fits(saved: tuple[RunConfig, Path], tmp_path: Path):
    config, out = saved
    assert saved_steps(out) == [4]
    assert saved_steps(tmp_path) == []
    check_run(of(config), out)
    check_run(of(config), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_problems_names_every_source_and_package_at_once(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = run_config(tmp_path / "out", records)
    data = replace(values.data, sources=(replace(values.data.sources[0], path=str(tmp_path / "none")),))
    data = replace(data, held_out=(replace(values.data.held_out[0], path=str(tmp_path / "neither")),))
    config = replace(values, data=data, wandb="project", evaluation=replace(values.evaluation, num_answers=2))
    find_spec = importlib.util.find_spec
    missing = ("wandb", "jiwer")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    found = problems(TrainingSetup.of(config), tmp_path / "out")
    assert [line.split(": ")[0] for line in found] == [
        str(tmp_path / "none"),
        "data.held_out",
        "wandb",
        "evaluation.num_answers needs jiwer",
    ]
    assert "pip install 'omni-jax[evaluation]'" in found[-1]
    with pytest.raises(ConfigError, match="found no such folder"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_problems_names_a_source_without_exchanges_for_a_task(records: Path, tmp_path: Path):
    with RecordWriter(tmp_path / "text") as writer:
        writer.write(Exchange(question_text="q", answer_text="a"))
    config = run_config(tmp_path / "out", records)
    text = replace(config.data.sources[0], path=str(tmp_path / "text"))
    data = replace(config.data, sources=(*config.data.sources, text), held_out=(text,))
    found = problems(of(config, data=data), tmp_path / "out")
    assert [line.removeprefix(f"{tmp_path / 'text'}: ") for line in found] == [
        *(f"expected exchanges that can serve {task}, found none" for task in config.data.tasks),
        "data.held_out: expected exchanges that can serve one of A1A2, A1T1, T1A1, found none",
    ]


def test_problems_counts_the_checkpoints_that_the_disk_must_hold(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1000))
    setup = TrainingSetup.of(run_config(tmp_path / "a" / "b", records))
    (line,) = problems(setup, tmp_path / "a" / "b")
    assert line.endswith(f"found 0.0 GB in {tmp_path}")
    # A trainable parameter has two moments.
    parameters = 4 * sum(np.prod(shape) for shape in checks._shapes(setup.shapes).values())
    trainable = 4 * sum(np.prod(shape) for shape in checks._shapes(setup.split(setup.shapes)[0]).values())
    # Two are kept while the third is written.
    needed = 3 * (parameters + 2 * trainable + 4 * 4) + parameters
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed))
    assert not problems(setup, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed - 1))
    assert problems(setup, tmp_path)


def test_resumed_run_with_other_trainable_modules_is_refused(saved: tuple[RunConfig, Path]):
    config, out = saved
    (line,) = problems(of(config, trainable=("adapter",)), out)
    assert line.startswith(
        "trainable: expected adapter, audio_embedding, trunk, as in the checkpoint of step 4, found adapter;"
    )


def test_resumed_run_of_another_model_is_refused(saved: tuple[RunConfig, Path], tiny_release: Path):
    config, out = saved
    setup = of(config, start=str(tiny_release))
    # The same shapes are no other model.
    assert not problems(setup, out)
    shapes = dict(setup.shapes)
    shapes["norm"] = {"scale": np.zeros(7, np.float32)}
    (line,) = problems(replace(setup, shapes=shapes), out)
    assert "1 tensors differ, such as norm.scale: expected (48,), found (7,)" in line


def test_resumed_run_with_other_data_needs_reshuffle(saved: tuple[RunConfig, Path], records: Path):
    config, out = saved
    for data, message in (
        (replace(config.data, num_workers=1), "data.num_workers: expected 0 as saved, found 1;"),
        (replace(config.data, tasks={"A1A2": 1.0}), "data.tasks: expected {"),
        (replace(config.data, sources=config.data.sources * 2), "data.sources: expected [{"),
        (replace(config.data, batch_size=16), "data.batch_size (rows of a process): expected 8 as saved, found 16;"),
    ):
        (line,) = problems(of(config, data=data), out)
        assert line.startswith(message)
        assert line.endswith("--reshuffle continues from step 4 with the records in a new order")
        assert not problems(of(config, data=data), out, reshuffle=True)


def test_open_data_reshuffles_only_other_data(saved: tuple[RunConfig, Path], caplog: pytest.LogCaptureFixture):
    config, out = saved
    with Checkpoints(config, out) as checkpoints:
        _, _, position = checkpoints.restore_or_init(of(config))
    data, seed = open_data(of(config), 4, position, reshuffle=True)
    data.close()
    assert seed == config.seed
    assert not caplog.records
    other = of(config, data=replace(config.data, tasks={"A1A2": 1.0}))
    data, seed = open_data(other, 4, position, reshuffle=True)
    assert next(data)["tokens"].shape == (8, 8, 128)
    data.close()
    assert seed != config.seed
    assert "data.tasks: expected" in caplog.text
    assert "reshuffling the records" in caplog.text


def test_is_finished_asks_for_the_last_step(saved: tuple[RunConfig, Path]):
    config, out = saved
    read = read_saved_run(out)
    assert read is not None
    assert (read.step, read.seed) == (4, 0)
    setup = of(config, optimizer=replace(config.optimizer, steps=4))
    assert not is_finished(setup, out)
    (out / "release").mkdir()
    try:
        assert is_finished(setup, out)
        assert not is_finished(of(config), out)
    finally:
        (out / "release").rmdir()


def test_read_saved_run_takes_the_last_that_can_be_read(saved: tuple[RunConfig, Path], tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(saved[1], out)
    shutil.copytree(out / "checkpoints" / "4", out / "checkpoints" / "8")
    for file in (out / "checkpoints" / "8").rglob("*"):
        if file.is_file() and file.name != "SHA256SUMS":
            file.write_bytes(b"")
    read = read_saved_run(out)
    assert read is not None
    assert read.step == 4
    assert not problems(of(saved[0]), out)
