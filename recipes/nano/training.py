"""The training loop of the codec and of the audio encoder: checkpoints, metrics as JSON lines, learning curves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import typer
from flax import traverse_util
from matplotlib.figure import Figure

from omni_jax.checkpoint.release import dotted_name
from omni_jax.checkpoint.safetensors_io import LazyTensor, write_safetensors

METRICS = "metrics.jsonl"


class State(Protocol):
    """A pytree of arrays that counts its steps."""

    @property
    def step(self) -> Any:
        """Steps done, int32 []."""


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Intervals:
    """Of what happens besides the steps."""

    log_steps: int
    eval_steps: int
    save_seconds: float = 120.0


def run(
    out: Path,
    state: S,
    steps: int,
    step: Callable[[S, int], tuple[S, dict[str, Any]]],
    validate: Callable[[S, int], dict[str, float]],
    intervals: Intervals,
) -> S:
    """Train from the last checkpoint in `out`, if there is one, to the end.

    Args:
        out: folder of the run.
        state: of step 0.
        steps: of the whole run.
        step: from a state and the number of steps done to the next state and scalars, whose means are logged.
        validate: from a state and the number of steps done to scalars.
        intervals: of logging, validation and checkpoints.

    Returns:
        The last state.
    """
    folder = out.resolve() / "checkpoints"
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        saved = logged = time.monotonic()
        values: list[dict[str, Any]] = []
        for number in range(int(state.step), steps):
            state, found = step(state, number)
            values.append(found)
            done = number + 1
            last = done == steps
            if last or done % intervals.log_steps == 0:
                means = {name: float(np.mean([entry[name] for entry in values])) for name in found}
                seconds, logged = (time.monotonic() - logged) / len(values), time.monotonic()
                log(out, {"step": done, "seconds": seconds, **means})
                values = []
            if last or done % intervals.eval_steps == 0:
                outcome = validate(state, done)
                log(out, {"step": done, **outcome})
                typer.echo(f"step {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in outcome.items()))
            if last or time.monotonic() - saved > intervals.save_seconds:
                manager.save(done, args=ocp.args.StandardSave(state))
                saved = time.monotonic()
    return state


def moving_average(old: Any, new: Any, step: Any, decay: float) -> Any:
    """Parameters averaged over steps, with less weight on the old ones in the first steps."""
    decay = jax.numpy.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


def export(path: Path, params: Mapping[str, Any]) -> None:
    """Write nested parameters as tensors of a release, in float16."""
    flat = traverse_util.flatten_dict(params)
    write_safetensors(
        path, {dotted_name(keys): LazyTensor.of(np.asarray(leaf, np.float16)) for keys, leaf in flat.items()}
    )


def log(folder: Path, values: Mapping[str, float]) -> None:
    """Append a line to the metrics of a run."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of the metrics by step; of lines that a resumed run wrote twice, the last."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    by_step = {(entry["step"], *sorted(entry)): entry for entry in map(json.loads, lines)}
    return sorted(by_step.values(), key=lambda entry: entry["step"])


def draw_curves(folder: Path, names: Sequence[str]) -> None:
    """Plot metrics over steps into `curve.png`, a panel each; one with less than two points is left out."""
    entries = read_metrics(folder)
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
        # The first steps are far above the rest, and would take the whole panel.
        low, high = values.min(), np.quantile(values, 0.98)
        margin = 0.05 * (high - low) or 0.5
        axis.set_ylim(low - margin, high + margin)
    axes[-1].set_xlabel("step")
    figure.savefig(folder / "curve.png", dpi=100)
