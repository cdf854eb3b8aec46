"""What a training leaves on disk, and finds again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from nano import run
from omni_jax.errors import CheckpointError


class State(NamedTuple):
    step: Any
    params: dict[str, Any]
    moments: tuple[Any, ...]


def state(fill: float) -> State:
    weight = jnp.full((2, 3), fill, jnp.float32)
    return State(jnp.asarray(7, jnp.int32), {"a.b": weight, "c": weight[0].astype(jnp.bfloat16)}, (weight + 1, None))


def test_a_state_comes_back(tmp_path: Path):
    assert run.restore(tmp_path, state(0)) is None
    run.save(tmp_path, state(0.3))
    found = run.restore(tmp_path, state(0))
    assert found is not None
    assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(state(0))
    for ours, theirs in zip(jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(state(0.3)), strict=True):
        assert isinstance(ours, jax.Array)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_only_the_last_state_is_kept_and_none_is_half_written(tmp_path: Path):
    for fill in (1.0, 2.0):
        run.save(tmp_path, state(fill))
    assert [path.name for path in tmp_path.iterdir()] == [run.STATE]
    found = run.restore(tmp_path, state(0))
    assert found is not None
    assert found.params["a.b"][0, 0] == 2
    with pytest.raises(CheckpointError):
        run.save(tmp_path, {"name": np.array("text")})
    assert run.restore(tmp_path, state(0)) is not None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (state(0)._replace(step=jnp.zeros(2)), r"\.step: expected \(2,\), found \(\)"),
        (state(0)._replace(params={}), "unknown, found"),
        (state(0)._replace(moments=(jnp.zeros((2, 3)), jnp.zeros(4))), r"missing, expected \(4,\)"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path: Path, other: State, words: str):
    run.save(tmp_path, state(0))
    with pytest.raises(CheckpointError, match=rf"state\.safetensors: the state of another run:\n(.|\n)*{words}"):
        run.restore(tmp_path, other)


class Counter(NamedTuple):
    step: Any
    total: Any


def learn(out: Path, steps: int, seed: int, stop_at: int | None = None) -> Counter:
    """Add up the numbers of the steps."""

    def step(state: Counter, number: int) -> tuple[Counter, dict[str, Any]]:
        if number == stop_at:
            raise KeyboardInterrupt
        return Counter(state.step + 1, state.total + number), {"number": jnp.asarray(number)}

    start = Counter(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return run.trainable(
        *(out, start, steps, {"seed": seed}, step),
        lambda state, done: {"total": float(state.total)},
        ["number"],
        log_interval_steps=4,
        validate_every=6,
        save_seconds=0,
    )


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, 10, 0, stop_at=7)
    state = learn(tmp_path, 10, 0)
    assert int(state.step) == 10
    assert int(state.total) == sum(range(10))
    assert (tmp_path / "curve.png").exists()
    entries = run.metrics(tmp_path)
    assert [(entry["step"], entry["number"]) for entry in entries if "number" in entry] == [(4, 1.5), (8, 7), (10, 8.5)]
    assert [(entry["step"], entry["total"]) for entry in entries if "total" in entry] == [(6, 15), (10, 45)]
    # Once it is done, nothing more is done.
    assert int(learn(tmp_path, 10, 0, stop_at=10).total) == 45


@pytest.mark.parametrize(("steps", "seed"), [(11, 0), (10, 1)])
def test_another_run_does_not_go_on_with_it(tmp_path: Path, steps: int, seed: int):
    learn(tmp_path, 10, 0)
    before = (tmp_path / run.STATE).read_bytes()
    with pytest.raises(CheckpointError, match=r"run\.json: expected the run .*, found .*: choose another folder"):
        learn(tmp_path, steps, seed)
    assert (tmp_path / run.STATE).read_bytes() == before


def test_metrics_are_in_order_and_the_last_of_each_counts(tmp_path: Path):
    for entry in ({"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation": 5.0}):
        run.log(tmp_path, entry)
    # Stopped after step 2 was logged and before it was saved.
    run.log(tmp_path, {"step": 2, "loss": 2.25})
    run.log(tmp_path, {"step": 10, "loss": 1.23456789})
    run.log(tmp_path, {"step": 3, "loss": 1.5})
    assert run.metrics(tmp_path) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.25},
        {"step": 2, "validation": 5.0},
        {"step": 3, "loss": 1.5},
        {"step": 10, "loss": 1.234568},
    ]


def curve(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Which pixels of each panel are of the curve's blue."""
    run.draw(folder, names)
    image = np.asarray(Image.open(folder / "curve.png").convert("RGB")).astype(int)
    blue = (image[..., 2] - image[..., 0]) > 100
    rows = np.flatnonzero(blue.any(1))
    return np.split(blue, [(a + b) // 2 for a, b in itertools.pairwise(rows) if b - a > 30])


def test_a_curve_is_drawn(tmp_path: Path):
    for step in range(1, 101):
        run.log(tmp_path, {"step": step, "falling": 1 - step / 100, "flat": 2.0, "first": 1e9 if step == 1 else step})
    run.log(tmp_path, {"step": 100, "once": 1.0})
    falling, flat, first = curve(tmp_path, ["falling", "flat", "first", "once", "never"])
    rows, columns = np.nonzero(falling)
    assert rows[columns.argmin()] + 100 < rows[columns.argmax()]
    assert np.ptp(columns) > 400
    assert np.ptp(np.nonzero(flat)[0]) < 8
    # One value far above the rest does not flatten them.
    rows, columns = np.nonzero(first)
    assert np.ptp(rows[columns > columns.min() + 30]) > 100


def test_nothing_is_drawn_before_there_is_a_curve(tmp_path: Path):
    run.log(tmp_path, {"step": 1, "once": 1.0})
    run.draw(tmp_path, ["once", "never"])
    assert not (tmp_path / "curve.png").exists()
