"""The training loop of codec and audio encoder: checkpoints, metrics, curves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from omni_jax.checkpoint.safetensors_io import SafetensorsFile
from recipes.nano import training

pytestmark = pytest.mark.slow


class Counter(NamedTuple):
    step: Any
    total: Any


def count(out: Path, steps: int, stop_at: int | None = None) -> Counter:
    """Add up the numbers of the steps."""

    def step(state: Counter, number: int) -> tuple[Counter, dict[str, Any]]:
        if number == stop_at:
            raise KeyboardInterrupt
        return Counter(state.step + 1, state.total + number), {"number": jnp.asarray(number)}

    start = Counter(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    intervals = training.Intervals(log_steps=4, eval_steps=6, save_seconds=0)
    return training.run(out, start, steps, step, lambda state, done: {"total": float(state.total)}, intervals)


def test_run_resumes_after_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        count(tmp_path, 10, stop_at=7)
    state = count(tmp_path, 10)
    assert (int(state.step), int(state.total)) == (10, sum(range(10)))
    entries = training.read_metrics(tmp_path)
    assert [(entry["step"], entry["number"]) for entry in entries if "number" in entry] == [(4, 1.5), (8, 7), (10, 8.5)]
    assert [(entry["step"], entry["total"]) for entry in entries if "total" in entry] == [(6, 15), (10, 45)]
    # A finished run takes no step.
    assert int(count(tmp_path, 10, stop_at=10).total) == 45


def test_moving_average_weighs_first_steps_less() -> None:
    assert float(training.moving_average(jnp.zeros(()), jnp.ones(()), 0, 0.99)) == pytest.approx(0.9)
    assert float(training.moving_average(jnp.zeros(()), jnp.ones(()), 10_000, 0.99)) == pytest.approx(0.01)


def test_export_names_tensors_as_a_release(tmp_path: Path) -> None:
    training.export(tmp_path / "a.safetensors", {"layers": {0: {"weight": jnp.full((2, 3), 0.3)}}})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(file.read("layers.0.weight"), np.full((2, 3), 0.3, np.float16))


def test_read_metrics_is_in_order_and_keeps_the_last_of_a_step(tmp_path: Path) -> None:
    for entry in ({"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation": 5.0}):
        training.log(tmp_path, entry)
    # Stopped after step 2 was logged and before it was saved.
    for entry in ({"step": 2, "loss": 2.25}, {"step": 10, "loss": 1.25}, {"step": 3, "loss": 1.5}):
        training.log(tmp_path, entry)
    assert training.read_metrics(tmp_path) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.25},
        {"step": 2, "validation": 5.0},
        {"step": 3, "loss": 1.5},
        {"step": 10, "loss": 1.25},
    ]


def curve(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Which pixels of each panel have the blue of the curve."""
    training.draw_curves(folder, names)
    image = np.asarray(Image.open(folder / "curve.png").convert("RGB")).astype(int)
    blue = (image[..., 2] - image[..., 0]) > 100
    rows = np.flatnonzero(blue.any(1))
    return np.split(blue, [(a + b) // 2 for a, b in itertools.pairwise(rows) if b - a > 30])


def test_draw_curves(tmp_path: Path) -> None:
    for step in range(1, 101):
        values = {"step": step, "falling": 1 - step / 100, "flat": 2.0, "first": 1e9 if step == 1 else step}
        training.log(tmp_path, values)
    training.log(tmp_path, {"step": 100, "once": 1.0})
    falling, flat, first = curve(tmp_path, ["falling", "flat", "first", "once", "never"])
    rows, columns = np.nonzero(falling)
    assert rows[columns.argmin()] + 100 < rows[columns.argmax()]
    assert np.ptp(columns) > 400
    assert np.ptp(np.nonzero(flat)[0]) < 8
    # One value far above the rest does not flatten them.
    rows, columns = np.nonzero(first)
    assert np.ptp(rows[columns > columns.min() + 30]) > 100


def test_draw_curves_writes_nothing_for_single_points(tmp_path: Path) -> None:
    training.log(tmp_path, {"step": 1, "once": 1.0})
    training.draw_curves(tmp_path, ["once", "never"])
    assert not (tmp_path / "curve.png").exists()
