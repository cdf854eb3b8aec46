"""What can be known to be wrong with a run before it writes anything: data, packages, disk, its last checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from omni_jax.checkpoint.release import RELEASE, RUN
from omni_jax.data.pipeline import data_layout, layout_difference, open_sources, serves_none
from omni_jax.data.records import Records
from omni_jax.errors import ConfigError, MissingExtraError, OmniError
from omni_jax.model.layers import Int8
from omni_jax.tasks import Task
from omni_jax.training.checksums import SUMS
from omni_jax.training.describe import count_parameters
from omni_jax.training.feature_cache import require_release
from omni_jax.training.lora import read_start
from omni_jax.training.setup import TrainingSetup, row_share
from omni_jax.training.stages import module_of

ANSWER_PACKAGES = ("jiwer", "whisper_normalizer")
"""Packages that `evaluation.num_answers` needs."""


@dataclass(frozen=True)
class SavedRun:
    """What the last checkpoint of a run says about itself."""

    step: int
    trainable: dict[str, tuple[int, ...]]
    """Name and shape of each trainable parameter."""
    frozen: dict[str, tuple[int, ...]]
    """Name and shape of each frozen parameter."""
    layouts: list[dict[str, Any]]
    """Of the data, for each reader; see `omni_jax.data.pipeline.data_layout`."""
    seed: int
    """Of the order of the records."""


def saved_steps(out: Path) -> list[int]:
    """The steps of the checkpoints in the folder of a run that have all their files, from the last to the first."""
    found = (path for path in (out / RUN).glob("*") if path.name.isdecimal() and (path / SUMS).exists())
    return sorted((int(path.name) for path in found), reverse=True)


def is_finished(setup: TrainingSetup, out: Path) -> bool:
    """Whether a run has its release, and has taken all steps of its configuration."""
    steps = saved_steps(out)
    return (out / RELEASE).exists() and (not steps or steps[0] >= setup.config.optimizer.steps)


def check_run(setup: TrainingSetup, out: Path, *, reshuffle: bool = False) -> None:
    """Check all that a run needs besides its start, which `TrainingSetup.of` has checked.

    Args:
        setup: of the run.
        out: its folder.
        reshuffle: whether the run may go on with other data than it has begun with.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    if found := problems(setup, out, reshuffle=reshuffle):
        raise ConfigError("\n".join(found))


def problems(setup: TrainingSetup, out: Path, *, reshuffle: bool = False) -> list[str]:
    """A sentence for each thing that is wrong; see `check_run`."""
    found: list[str] = []
    sources = None
    try:
        require_release(setup)
        sources = open_sources(setup.config.data.sources)
        found += _unserved(setup, sources)
    except OmniError as error:
        found.append(str(error))
    found += [*_held_out(setup), *_packages(setup)]
    saved = read_saved_run(out)
    if saved is None:
        found += _lora_start(setup)
        found += _disk(setup, out, num_there=0)
    else:
        found += _disk(setup, out, num_there=sum(path.name.isdigit() for path in (out / RUN).iterdir()))
        found += _other_parameters(setup, saved)
        if sources is not None and not reshuffle:
            found += _other_data(setup, sources, saved)
    return found


def read_saved_run(out: Path) -> SavedRun | None:
    """Read the last checkpoint that can be read, without its arrays; None if there is none.

    Whether the arrays are whole is known when they are restored.
    """
    for step in saved_steps(out):
        try:
            return _read_saved_run(out, step)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _read_saved_run(out: Path, step: int) -> SavedRun:
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "frozen": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
    }
    with ocp.CheckpointManager(out / RUN, item_handlers=handlers) as manager:
        metadata = manager.item_metadata(step)
        data = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
    layouts = [state.get("layout", {}) for state in data["states"]]
    if not all(isinstance(layout, dict) for layout in layouts):
        raise TypeError("a layout of the data that is none")
    return SavedRun(
        step,
        _shapes(metadata["state"].tree["trainable"]),
        _shapes(metadata["frozen"].tree),
        layouts,
        data["seed"],
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    # A weight in eight bits has two arrays, which a checkpoint has by the names of the fields.
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict | list | Int8))
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _unserved(setup: TrainingSetup, sources: list[Records]) -> Iterator[str]:
    """The sources that have nothing for a task that they are configured to serve."""
    data = setup.config.data
    for records, source in zip(sources, data.sources, strict=True):
        for task in data.tasks:
            if task in source.tasks and not records.count(Task(task)):
                yield serves_none(records, task)


def _held_out(setup: TrainingSetup) -> Iterator[str]:
    data = setup.config.data
    if not data.held_out:
        return
    try:
        folders = open_sources(data.held_out)
    except OmniError as error:
        yield f"data.held_out: {error}"
        return
    if not any(
        records.count(Task(task))
        for records, source in zip(folders, data.held_out, strict=True)
        for task in data.tasks
        if task in source.tasks
    ):
        yield f"data.held_out: expected exchanges that can serve one of {', '.join(data.tasks)}, found none"


def _packages(setup: TrainingSetup) -> Iterator[str]:
    config = setup.config
    if config.wandb and importlib.util.find_spec("wandb") is None:
        yield "wandb: the package is not installed: pip install wandb"
    missing = [name for name in ANSWER_PACKAGES if importlib.util.find_spec(name) is None]
    if config.evaluation.num_answers and config.data.held_out and missing:
        yield str(MissingExtraError(f"evaluation.num_answers needs {', '.join(missing)}", "evaluation"))
    if config.evaluation.keep_best not in (None, "loss") and jax.process_count() > 1:
        yield (
            f"evaluation.keep_best: {config.evaluation.keep_best} is measured in runs of one process: expected loss, "
            f"or one process, found {jax.process_count()}"
        )


def _lora_start(setup: TrainingSetup) -> Iterator[str]:
    lora = setup.config.lora
    if lora is not None and lora.start is not None:
        try:
            read_start(setup)
        except OmniError as error:
            yield str(error)


def _disk(setup: TrainingSetup, out: Path, *, num_there: int) -> Iterator[str]:
    """Whether the checkpoints of the run, and its release, fit on the disk."""
    config = setup.config
    state, _ = setup.state_shapes()
    # In a release they are float32.
    parameters = 4 * sum(count_parameters(setup).values())
    checkpoint = _bytes(state) + _bytes(setup.split(setup.shapes)[1])
    num_saved = -(-config.optimizer.steps // config.checkpoint.save_interval_steps)
    if config.checkpoint.keep_period is None:
        # While one is written, those before it are still there.
        num_saved = min(num_saved, config.checkpoint.max_to_keep + 1)
    num_releases = 1 + (config.evaluation.keep_best is not None)
    needed = max(num_saved - num_there, 0) * checkpoint + num_releases * parameters
    folder = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"out: expected {needed / 1e9:.1f} GB of free disk for checkpoints of {checkpoint / 1e9:.1f} GB each and a "
            f"release of {parameters / 1e9:.1f} GB, found {free / 1e9:.1f} GB in {folder}"
        )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _other_parameters(setup: TrainingSetup, saved: SavedRun) -> Iterator[str]:
    """What keeps the parameters of the checkpoint from being those of the run."""
    trainable, frozen = map(_shapes, setup.split(setup.shapes))
    mine, theirs = trainable | frozen, saved.trainable | saved.frozen
    if differing := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
        name = differing[0]
        yield (
            f"start: expected the model of the checkpoint of step {saved.step}; {len(differing)} tensors differ, such "
            f"as {name}: expected {theirs.get(name, 'none')}, found {mine.get(name, 'none')}; another model needs "
            "another folder as out"
        )
    elif trainable.keys() != saved.trainable.keys():
        yield (
            f"trainable: expected {', '.join(_modules(saved.trainable))}, as in the checkpoint of step {saved.step}, "
            f"found {', '.join(_modules(trainable))}; to train other modules, start another run from this one"
        )


def _modules(names: dict[str, tuple[int, ...]]) -> list[str]:
    return sorted({module_of(tuple(name.split("."))) for name in names})


def _other_data(setup: TrainingSetup, sources: list[Records], saved: SavedRun) -> Iterator[str]:
    """What keeps the position of the checkpoint in its data from being one in the data of the run."""
    share, num_shares = row_share(setup.mesh, jax.process_index())
    if len(saved.layouts) != num_shares:
        # Another number of readers reshuffles in any case.
        return
    layout = data_layout(setup.config.data, sources, seed=saved.seed, process_index=share, process_count=num_shares)
    if difference := layout_difference(layout, saved.layouts[share]):
        yield f"{difference}; --reshuffle continues from step {saved.step} with the records in a new order"
