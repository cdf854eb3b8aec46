"""What the codec's and the ear's training share: the loop, its state on disk, metrics as JSON lines, the curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from flax import traverse_util
from matplotlib.figure import Figure

from omni_jax.checkpoint import safetensors_io
from omni_jax.checkpoint.release import dotted_name

STATE = "state.safetensors"
METRICS = "metrics.jsonl"
OPTIONS = "run.json"

T = TypeVar("T")


class State(Protocol):
    """A pytree of arrays that counts its steps."""

    @property
    def step(self) -> Any:
        """An integer."""


S = TypeVar("S", bound=State)


def learn(
    out: Path,
    state: S,
    steps: int,
    options: Mapping[str, Any],
    step: Callable[[S, int], tuple[S, dict[str, Any]]],
    validate: Callable[[S, int], dict[str, float]],
    curves: Sequence[str],
    *,
    log_every: int,
    validate_every: int,
    save_seconds: float,
) -> S:
    """Train to the end, or go on from what is on disk.

    Args:
        out: folder of the run.
        state: to begin with.
        steps: of the whole run.
        options: what makes it this run and no other, as JSON can hold it.
        step: from a state and the steps done so far to the next state and scalars to be logged, as their means.
        validate: from a state and the steps done to scalars to be logged.
        curves: names of what is drawn.
        log_every: steps.
        validate_every: steps.
        save_seconds: between states on disk.

    Returns:
        The last state.

    Raises:
        omni_jax.tensorfile.CheckpointError: another run is there already.
    """
    out.mkdir(parents=True, exist_ok=True)
    options, path = {"steps": steps, **options}, out / OPTIONS
    if not path.exists():
        path.write_text(json.dumps(options) + "\n", encoding="utf-8")
    elif (found := json.loads(path.read_text(encoding="utf-8"))) != options:
        raise safetensors_io.CheckpointError(
            f"{path}: expected the run {options}, found {found}: choose another folder"
        )
    state = restore(out, state) or state
    saved = last = time.monotonic()
    since: list[dict[str, Any]] = []
    for number in range(int(state.step), steps):
        state, values = step(state, number)
        since.append(values)
        done = number + 1
        if done % log_every == 0 or done == steps:
            seconds, last = (time.monotonic() - last) / len(since), time.monotonic()
            means = {name: float(np.mean([entry[name] for entry in since])) for name in values}
            log(out, {"step": done, "seconds": seconds} | means)
            since = []
        if done % validate_every == 0 or done == steps:
            outcome = validate(state, done)
            log(out, {"step": done} | outcome)
            draw(out, curves)
            print(f"step {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in outcome.items()), flush=True)
        if time.monotonic() - saved > save_seconds or done == steps:
            save(out, state)
            saved = time.monotonic()
    return state


def save(folder: Path, state: Any) -> None:
    """Write a pytree of arrays; a run that is killed meanwhile finds the one before."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    safetensors_io.write(folder / STATE, {name: safetensors_io.LazyTensor.of(array) for name, array in arrays.items()})


def restore(folder: Path, like: T) -> T | None:
    """The state that was saved, or None where there is none.

    Args:
        folder: of the run.
        like: a pytree of the same structure, shapes and types.

    Raises:
        omni_jax.tensorfile.CheckpointError: it has other tensors: lists them.
    """
    if not (folder / STATE).exists():
        return None
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    file = safetensors_io.TensorFile(folder / STATE)
    expected = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    if wrong := safetensors_io.differences(file.tensors, expected):
        raise safetensors_io.CheckpointError(f"{file.path}: the state of another run:\n" + "\n".join(wrong))
    return jax.tree_util.tree_unflatten(tree, [jax.numpy.asarray(file.read(name)) for name in expected])


def export(path: Path, params: Any) -> None:
    """Write a dict of dicts of parameters as a release's tensors, in float16: as they will be shipped."""
    flat = traverse_util.flatten_dict(params)
    tensors = {
        dotted_name(keys): safetensors_io.LazyTensor.of(np.asarray(leaf, np.float16)) for keys, leaf in flat.items()
    }
    safetensors_io.write(path, tensors)


def log(folder: Path, values: dict[str, float]) -> None:
    """Append one line to the run's metrics."""
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")


def metrics(folder: Path) -> list[dict[str, float]]:
    """Every line of the metrics, those that a resumed run has written twice only as they were last."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    by_step = {(entry["step"], *sorted(entry)): entry for entry in map(json.loads, lines)}
    return sorted(by_step.values(), key=lambda entry: entry["step"])


def draw(folder: Path, names: Sequence[str]) -> None:
    """Draw metrics over steps into `curve.png`, a panel each; one that was not noted twice yet is left out."""
    entries = metrics(folder)
    curves = {name: [(entry["step"], entry[name]) for entry in entries if name in entry] for name in names}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return
    figure = Figure(figsize=(7, 2 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        steps, values = np.array(points, float).T
        axis.plot(steps, values, marker="." if len(points) < 50 else "")
        axis.set_title(name.replace("_", " "), loc="left", fontsize=9)
        axis.grid(alpha=0.3)
        # What the first steps are above the rest would leave nothing to see of it.
        low, high = values.min(), np.quantile(values, 0.98)
        margin = 0.05 * (high - low) or 0.5
        axis.set_ylim(low - margin, high + margin)
    axes[-1].set_xlabel("step")
    figure.savefig(folder / "curve.png", dpi=100)
