"""What every training here needs: a state on disk to go on from, metrics as JSON lines, a drawing of the curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image, ImageDraw

from omni_jax import tensorfile

STATE = "state.safetensors"
METRICS = "metrics.jsonl"

T = TypeVar("T")


def save(folder: Path, state: Any) -> None:
    """Write a pytree of arrays; a run that is killed meanwhile finds the one before."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    tensorfile.write(folder / STATE, {name: tensorfile.LazyTensor.of(array) for name, array in arrays.items()})


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
    file = tensorfile.TensorFile(folder / STATE)
    expected = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    if wrong := tensorfile.differences(file.tensors, expected):
        raise tensorfile.CheckpointError(f"{file.path}: the state of another run:\n" + "\n".join(wrong))
    return jax.tree_util.tree_unflatten(tree, [jax.numpy.asarray(file.read(name)) for name in expected])


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
    """Draw metrics over steps into `curve.png`, a panel each."""
    entries = metrics(folder)
    width, height, margin = 480, 200, 40
    image = Image.new("RGB", (width, height * len(names)), "white")
    pen = ImageDraw.Draw(image)
    for panel, name in enumerate(names):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        top, bottom = panel * height + 20, (panel + 1) * height - 20
        pen.text((margin, top - 16), name, "black")
        pen.line([(margin, top), (margin, bottom), (width - 10, bottom)], "black")
        if len(points) < 2:
            continue
        steps, values = np.array(points, float).T
        # What the first steps are above the rest would leave nothing to see of it.
        high, low = np.quantile(values, 0.98), values.min()
        x = margin + (width - 10 - margin) * steps / steps[-1]
        y = bottom - (bottom - top) * (values.clip(max=high) - low) / max(high - low, 1e-9)
        pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), "blue")
        pen.text((2, top), f"{high:.3g}", "black")
        pen.text((2, bottom - 12), f"{low:.3g}", "black")
        pen.text((width - 60, bottom + 4), f"{int(steps[-1])} steps", "black")
    image.save(folder / "curve.png")
